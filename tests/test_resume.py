"""A changed configuration after an interruption: refused with the difference, forced on the record, or begun anew. No torch."""

import os
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors.numpy import save_file
from tiny import configured

from runner.config.schema import Config
from runner.durable.lock import is_held, lock
from runner.durable.manifest import SHARED, complete, damage, read_manifest, sealed, write_manifest
from runner.durable.resume import adopt, differences, in_settings, refuse_changed_config, write_facts
from runner.errors import UserError
from runner.plan import Step, plan
from runner.plan_view import results_at_hand


def planned(store: Path, *overrides: str) -> Step:
    """The SFT step of a command."""
    (step,) = plan(replace(configured("stage=sft", *overrides), store=str(store)))
    return step


def interrupt(step: Step, name: str = "demo", at: int = 12) -> None:
    """Leave a step as a run leaves it that was stopped."""
    folder = step.folder / "checkpoints" / f"step_{at}"
    folder.mkdir(parents=True)
    write_facts(step.folder, name, step.facts)
    (folder / "actor.rank_0.safetensors").write_bytes(b"weights")
    files = {"actor.rank_0.safetensors": sealed(folder / "actor.rank_0.safetensors")}
    lines = '{"step": 12}\n'
    (step.folder / "metrics.jsonl").write_text(lines + '{"step": 13}\n')
    manifest = {"step": at, "key": step.key, "score": None, "log": {"bytes": len(lines)}, "files": files}
    write_manifest(folder, manifest)


def test_the_same_configuration_goes_on_in_its_folder(tmp_path):
    step = planned(tmp_path)
    interrupt(step)
    assert planned(tmp_path) == step
    # What does not shape the result may change
    assert planned(tmp_path, "hardware=cpu2", "checkpoint.every=3", "sft.eval_every=7").folder == step.folder


def test_a_step_of_an_earlier_program_is_told_from_one_with_other_settings(tmp_path, monkeypatch):
    """No file has changed, and nobody can type the old version."""

    def dpo(*overrides: str) -> tuple[Config, Step]:
        cfg = configured("stage=dpo", f"store={tmp_path}", *overrides)
        return cfg, plan(cfg)[-1]

    cfg, step = dpo()
    interrupt(step)
    (step.folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(cfg))))
    monkeypatch.setattr("runner.plan.VERSION", 1000)
    for overrides, lines in (((), []), (("dpo.beta=0.2",), ["  dpo.beta: 0.1 -> 0.2"])):
        now, step = dpo(*overrides)
        with pytest.raises(UserError) as caught:
            refuse_changed_config(now, "dpo", step.earlier)
        head, *shown, last = str(caught.value).splitlines()
        assert head.endswith(", and since then this program has changed what its steps mean:")
        assert shown[:-1] == lines and shown[-1].startswith("  version: ") and shown[-1].endswith(" -> 1000")
        assert last.startswith("To resume it, use the program as it was, and the old values. To continue from its checkpoint")


def test_a_changed_one_is_shown_with_the_difference(tmp_path):
    interrupt(planned(tmp_path))
    step = planned(tmp_path, "sft.lr=0.5", "model.max_response_tokens=20")
    assert step.folder != planned(tmp_path).folder and step.earlier.folder == planned(tmp_path).folder
    with pytest.raises(UserError) as caught:
        refuse_changed_config(configured("stage=sft"), "sft", step.earlier)
    text = str(caught.value)
    assert f"stage sft was interrupted at step 12 in {step.earlier.folder}" in text
    was = configured()
    assert f"  model.max_response_tokens: {was.model.max_response_tokens} -> 20\n  sft.lr: {was.sft.lr} -> 0.5\n" in text
    assert "resume=force" in text and "resume=new" in text


def told(store: Path, before: list[str], now: list[str], stage: str = "sft") -> list[str]:
    """The lines about what differs when a command was interrupted and others are typed."""
    shared = [f"stage={stage}", f"store={shlex.quote(str(store))}"]
    old = configured(*shared, *before)
    interrupt(step := plan(old)[-1])
    (step.folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(old))))
    cfg = configured(*shared, *now)
    return in_settings(cfg, stage, plan(cfg)[-1].earlier)


@pytest.mark.parametrize(
    "stage, before, now, expected",
    [
        ("sft", "", "sft.lr=0.5 sft.eval_every=3 model.reward.shape.ffn_dim=8", ["sft.lr: 0.002 -> 0.5"]),
        ("ppo", "reward.epochs=2", "reward.epochs=1", ["reward.epochs: 2.0 -> 1.0"]),
        ("ppo", "sft.use=facebook/opt-125m", "sft.use=facebook/opt-350m", ["sft.use: facebook/opt-125m -> facebook/opt-350m"]),
        ("sft", "dataset.toy_rows=100", "dataset.toy_rows=200", ["dataset.toy_rows: 100 -> 200"]),
        ("sft", "dataset=hub dataset.path=a/b", "dataset=hub dataset.path=a/c", ["dataset.path: a/b -> a/c"]),
        ("sft", "model.actor.path=x/y", "", ["model.actor.path: x/y -> null"]),
    ],
)
def test_differences_are_told_by_keys_that_can_be_typed(stage, before, now, expected, tmp_path):
    """Not by the hashes of parents and files, which the facts hold."""
    assert told(tmp_path, before.split(), now.split(), stage) == expected


def test_what_lies_in_no_setting_is_told_too(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    words = ["dataset=jsonl", f"dataset.path={shlex.quote(str(rows))}"]
    old = planned(tmp_path, *words)
    told(tmp_path, words, words[:0])
    rows.write_text("[]")
    earlier = planned(tmp_path, *words).earlier
    assert earlier.folder == old.folder
    assert in_settings(configured("stage=sft", *words), "sft", earlier) == ["dataset.sources.0.content: the files have changed"]


def test_what_was_interrupted_before_its_first_step_is_left_with_a_word(tmp_path, capsys):
    interrupt(planned(tmp_path), at=0)
    refuse_changed_config(configured("stage=sft"), "sft", planned(tmp_path, "sft.lr=0.5").earlier)
    assert "sft starts over: " in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"name": "demo", "key": "x", "facts": []}'])
def test_facts_that_cannot_be_read_are_nobodys(text, tmp_path):
    interrupt(planned(tmp_path))
    (planned(tmp_path).folder / "facts.json").write_text(text)
    assert planned(tmp_path, "sft.lr=0.5").earlier is None


def test_of_two_data_sources_only_what_differs_is_shown(tmp_path):
    interrupt(planned(tmp_path, "dataset.toy_rows=100"))
    differ = planned(tmp_path, "dataset.toy_rows=200", "++dataset.sources.toy.weight=2").earlier.describe()
    assert [line.partition(":")[0] for line in differ] == ["dataset.sources.0.content", "dataset.sources.0.weight"]
    assert differ[0].endswith("-100 -> " + differ[0].rpartition(" ")[2]) and differ[0].endswith("-200")


def test_only_what_this_name_left_unfinished_at_last_is_asked_about(tmp_path):
    step = planned(tmp_path)
    interrupt(step)
    changed = ("sft.lr=0.5",)
    assert planned(tmp_path, *changed, "name=other").earlier is None
    assert planned(tmp_path, *changed, "resume=new").earlier is None
    with lock(tmp_path / "locks" / step.folder.name, "the step"):  # somebody is at it: not interrupted at all
        assert planned(tmp_path, *changed).earlier is None
    assert planned(tmp_path, *changed).earlier
    interrupt(planned(tmp_path, *changed))  # begun: from now on it has checkpoints of its own
    assert planned(tmp_path, *changed).earlier is None
    (step.folder / "DONE").touch()
    (planned(tmp_path, *changed).folder / "DONE").touch()
    assert planned(tmp_path, "sft.lr=0.7").earlier is None


def test_a_store_of_several_people(tmp_path, monkeypatch):
    """Who may write to it may take its locks; who may only read it sees what is held."""
    old, path = os.umask(0o002), tmp_path / "locks" / "x"
    try:
        with lock(path, "x"):
            assert path.stat().st_mode & 0o777 == 0o664
            monkeypatch.setattr("os.O_RDWR", None)
            assert is_held(path)
        assert not is_held(path)
    finally:
        os.umask(old)


def test_force_goes_on_from_there_and_says_so_in_the_key(tmp_path):
    old, changed = planned(tmp_path), ("sft.lr=0.5",)
    interrupt(old)
    forced = planned(tmp_path, *changed, "resume=force")
    clean = planned(tmp_path, *changed, "resume=new")
    assert len({forced.key, clean.key, old.key}) == 3
    assert forced.facts["goes_on_from"] == {"step": old.folder.name, "at": 12, "changed": [f"sft.lr: {configured().sft.lr} -> 0.5"]}
    assert (forced.state(), forced.resumes_at, clean.resumes_at) == ("resume 12", 12, None)
    forced.folder.mkdir()
    adopt(forced.folder, forced.key, forced.earlier)
    (checkpoint,) = complete(forced.folder)
    assert checkpoint.name == "step_12" and damage(checkpoint) is None
    assert read_manifest(checkpoint)["key"] == forced.key
    assert (forced.folder / "metrics.jsonl").read_text() == '{"step": 12}\n'
    # Interrupted again, the same command goes on in the same folder, though the clean configuration is still another step
    write_facts(forced.folder, "demo", forced.facts)
    again = planned(tmp_path, *changed, "resume=force")
    assert (again.folder, again.key, again.facts) == (forced.folder, forced.key, forced.facts)
    plain = planned(tmp_path, *changed)
    assert plain.earlier.folder == forced.folder
    with pytest.raises(UserError, match=r"had continued from another configuration. To resume it, add resume=force again"):
        refuse_changed_config(configured(*changed), "sft", plain.earlier)
    other = ("sft.lr=0.5", "sft.warmup=9")
    with pytest.raises(UserError) as refused:
        refuse_changed_config(configured(*other), "sft", planned(tmp_path, *other).earlier)
    assert "goes_on_from:" not in str(refused.value) and "sft.warmup" in str(refused.value)
    # And when it is done, the same command knows it, whatever this name has worked at since
    finish(forced)
    interrupt(planned(tmp_path, "sft.lr=0.7", "resume=new"))
    assert planned(tmp_path, *changed, "resume=force").folder == forced.folder
    (note,) = results_at_hand(configured(*changed), [planned(tmp_path, *changed)])
    assert (
        note.startswith("sft starts from the beginning, though") and forced.folder.name in note and note.endswith("resume=force for that")
    )
    assert not [*results_at_hand(configured(*changed, "resume=new"), [planned(tmp_path, *changed, "resume=new")])]


def test_force_says_so_where_nothing_was_interrupted(tmp_path):
    step = planned(tmp_path)
    interrupt(step)
    finish(step)
    longer = ("sft.epochs=9", "resume=force")
    (note,) = results_at_hand(configured("stage=sft", *longer), [planned(tmp_path, *longer)])
    assert note.startswith("resume=force continues what was interrupted, which no sft of name=demo is: it starts from the beginning")
    assert note.endswith("To train a finished model further: model.actor.path=...")


def test_an_unfinished_rollout_is_not_adopted(tmp_path, capsys):
    """It is of the old configuration: its divisor, its prompts, its reward model."""
    old = planned(tmp_path)
    interrupt(old)
    source = old.folder / "checkpoints" / "step_12"
    manifest = read_manifest(source)
    (source / SHARED).write_bytes(b"rollout")
    write_manifest(source, manifest | {"files": manifest["files"] | {SHARED: sealed(source / SHARED)}})
    source.rename(source.with_name("step_12_3"))
    forced = planned(tmp_path, "sft.lr=0.5", "resume=force")
    forced.folder.mkdir()
    adopt(forced.folder, forced.key, forced.earlier)
    (checkpoint,) = complete(forced.folder)
    # Under the name of whole iterations: step_12_1, which may follow, is newer
    assert checkpoint.name == "step_12" and damage(checkpoint) is None and not (checkpoint / SHARED).exists()
    assert "unfinished rollout of step_12_3" in capsys.readouterr().err


def test_the_scale_of_the_scores_cannot_be_forced(tmp_path):
    """It is measured once, when PPO begins, and the critic was trained on that scale."""

    def ppo(*overrides: str) -> Step:
        return plan(replace(configured("sft.use=facebook/opt-125m", "reward.use=x/rm", *overrides), store=str(tmp_path)))[-1]

    interrupt(ppo())
    assert ppo("ppo.normalize_scores=false").earlier and ppo("ppo.normalize_scores=false", "resume=new").earlier is None
    assert "goes_on_from" in ppo("ppo.kl_coef=0.2", "resume=force").facts
    for key, value in (("ppo.normalize_scores", "false"), ("ppo.calibration_prompts", "7")):
        with pytest.raises(UserError, match=rf"resume=force cannot continue from .* with {key}: .* -> {value}: .*resume=new"):
            ppo(f"{key}={value}", "resume=force")


@pytest.mark.parametrize(
    "words, why",
    [
        ("model.actor.lora.dim=4", "the weights that train"),
        ("model.actor.lora.targets=[fc1]", "the weights that train"),
        ("model.actor.shape.hidden_size=64", "the weights that train"),
        ("model.tokenizer_vocab=300", "the tokenizer"),
        ("dataset.toy_rows=300", "the tokenizer"),
    ],
)
def test_another_network_or_tokenizer_cannot_be_forced(words, why, tmp_path):
    interrupt(planned(tmp_path))
    step = planned(tmp_path, *words.split())
    with pytest.raises(UserError, match=rf"cannot be continued with the new ones: .*{why}.*resume=new") as refused:
        refuse_changed_config(configured(*words.split()), step.stage, step.earlier)
    assert "resume=force" not in str(refused.value)  # it is not offered where it would be refused
    with pytest.raises(UserError, match=rf"resume=force cannot continue from .*: .* -> .*: .*{why}.*resume=new"):
        planned(tmp_path, words, "resume=force")


GIVEN = "sft.use=facebook/opt-125m"
ADAPTERS = "model.actor.lora.dim=4"
OTHERS = {
    "reward model of PPO": (f"{GIVEN} reward.use=x/rm", "reward.use=x/other", "the scale of the scores"),
    "actor under PPO's adapters": (f"{GIVEN} reward.use=x/rm {ADAPTERS}", "sft.use=x/other", "adapters alone"),
    "actor under DPO's adapters": (f"stage=dpo {GIVEN} {ADAPTERS}", "sft.use=x/other", "adapters alone"),
    "base of SFT's adapters": (
        f"stage=sft model.actor.path=x/base {ADAPTERS}",
        "model.actor.path=x/other",
        "adapters alone",
    ),
    "base of a reward model's adapters": (
        "stage=reward model.reward.path=x/base model.reward.lora.dim=4",
        "model.reward.path=x/other",
        "adapters alone",
    ),
}


@pytest.mark.parametrize("before, change, why", OTHERS.values(), ids=OTHERS)
def test_another_model_cannot_be_forced_under_what_was_trained_on_the_old_one(before, change, why, tmp_path):
    def last(*overrides: str) -> Step:
        return plan(replace(configured(*overrides), store=str(tmp_path)))[-1]

    interrupt(last(*before.split()))
    now = [word for word in before.split() if word.partition("=")[0] != change.partition("=")[0]] + [change]
    assert last(*now).earlier
    with pytest.raises(UserError, match=rf"resume=force cannot continue from .*: .*{why}.*resume=new"):
        last(*now, "resume=force")


def test_another_actor_that_trains_in_full_can_be_forced(tmp_path):
    interrupt(plan(replace(configured("stage=dpo", GIVEN), store=str(tmp_path)))[-1])
    forced = plan(replace(configured("stage=dpo", "sft.use=x/other", "resume=force"), store=str(tmp_path)))[-1]
    assert "goes_on_from" in forced.facts


@pytest.mark.parametrize("stage", ["dpo", "ppo"])
@pytest.mark.parametrize("word", ["dataset.sft_only=[FILE]", "dataset.ppo_only=[FILE]", "model.tokenizer_vocab=300"])
def test_rows_of_another_stage_that_make_another_tokenizer_cannot_be_forced(stage, word, tmp_path):
    def last(*overrides: str) -> Step:
        return plan(replace(configured(f"stage={stage}", *overrides), store=str(tmp_path)))[-1]

    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    interrupt(last())
    with pytest.raises(UserError, match=r"resume=force cannot continue from .*: .*the tokenizer.*resume=new"):
        last(word.replace("FILE", str(rows)), "resume=force")


def test_rows_that_a_step_does_not_read_are_no_difference(tmp_path):
    def reward(*overrides: str) -> tuple[Config, Step]:
        cfg = configured("stage=reward", "model.reward.path=x/rm", *overrides)
        return cfg, plan(replace(cfg, store=str(tmp_path)))[-1]

    (tmp_path / "rows.jsonl").write_text("{}")
    more = f"dataset.ppo_only=[{tmp_path / 'rows.jsonl'}]"
    step = reward()[1]
    interrupt(step)
    (step.folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(reward()[0])))
    assert reward(more)[1].key == step.key
    cfg, changed = reward(more, "reward.lr=0.5")
    assert [line.partition(":")[0] for line in in_settings(cfg, "reward", changed.earlier)] == ["reward.lr"]


def test_other_data_can_be_forced_where_the_tokenizer_stays(tmp_path):
    def ppo(*overrides: str) -> Step:
        return plan(replace(configured("sft.use=facebook/opt-125m", "reward.use=x/rm", *overrides), store=str(tmp_path)))[-1]

    interrupt(ppo())
    assert "goes_on_from" in ppo("dataset.toy_rows=300", "resume=force").facts


def test_what_is_adopted_is_whole_and_comes_with_its_log(tmp_path, monkeypatch):
    old = planned(tmp_path)
    interrupt(old, at=10)
    interrupt(old, at=12)
    (old.folder / "checkpoints" / "step_12" / "actor.rank_0.safetensors").write_bytes(b"WEIGHTS")
    forced = planned(tmp_path, "sft.lr=0.5", "resume=force")
    forced.folder.mkdir()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("runner.durable.resume.write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        adopt(forced.folder, forced.key, forced.earlier)
    assert complete(forced.folder) == []  # so that the next launch adopts again
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError))  # a disk without links
    adopt(forced.folder, forced.key, forced.earlier)
    assert [p.name for p in complete(forced.folder)] == ["step_10"]
    assert (forced.folder / "metrics.jsonl").read_text() == '{"step": 12}\n'


def test_what_was_forced_shapes_its_children(tmp_path):
    interrupt(planned(tmp_path))
    store = f"store={shlex.quote(str(tmp_path))}"
    keys = {plan(configured(store, "sft.lr=0.5", f"resume={how}"))[-1].key for how in ("force", "new")}
    assert len(keys) == 2


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ({"a": 1}, {"a": 1}, {}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, {"a.c": (2, 3)}),
        ({"a": 1}, {"b": 1}, {"a": (1, None), "b": (None, 1)}),
        ({"a": {"b": 1}}, {"a": None}, {"a": ({"b": 1}, None)}),
        ({"a": [1, 2]}, {"a": [2, 1]}, {"a": ([1, 2], [2, 1])}),
    ],
)
def test_differences(old, new, expected):
    assert differences(old, new) == expected


TREES = st.recursive(st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=8)


@given(st.dictionaries(st.sampled_from("abc"), TREES), st.dictionaries(st.sampled_from("abc"), TREES))
def test_differences_are_empty_only_for_equals_and_turn_around(one, other):
    found = differences(one, other)
    assert bool(found) == (one != other)
    assert {k: (b, a) for k, (a, b) in differences(other, one).items()} == found


def finish(step: Step) -> None:
    """Leave a step as a run leaves it that came to its end."""
    (step.folder / "model").mkdir(parents=True)
    for name, content in {"model/config.json": "{}", "model/tokenizer.json": "{}", "result.json": '{"steps": 1}', "DONE": ""}.items():
        (step.folder / name).write_text(content)
    save_file({"x": np.zeros(3)}, step.folder / "model" / "model.safetensors")


@pytest.mark.parametrize(
    "file, content",
    [
        ("model/model.safetensors", None),
        ("model/model.safetensors", ""),
        ("model/config.json", None),
        ("model/tokenizer.json", None),
        ("model/tokenizer.json", '{"ver'),
        ("result.json", '{"ste'),
    ],
)
def test_a_finished_step_whose_files_are_gone_is_not_reused(tmp_path, file, content):
    step = planned(tmp_path)
    finish(step)
    assert planned(tmp_path).done
    if content is None:
        (step.folder / file).unlink()
    else:
        (step.folder / file).write_text(content)
    with pytest.raises(UserError, match=r"sft-\w+ says DONE, but .*[\w)]\. Delete the folder to train it again") as refused:
        planned(tmp_path)
    assert str(refused.value).count(step.folder.name) == 1


def test_parents_that_are_gone_are_not_trained_again_for_a_result_that_is_there(tmp_path):
    cfg = replace(configured(), store=str(tmp_path))
    sft, reward, ppo = plan(cfg)
    for step in (reward, ppo):
        finish(step)
    assert [(step.stage, step.state()) for step in plan(cfg)] == [("reward", "reused"), ("ppo", "reused")]
    (alone,) = plan(replace(configured("stage=sft"), store=str(tmp_path)))
    assert alone.folder == sft.folder and alone.state() == "run"
    (ppo.folder / "DONE").unlink()
    assert [step.state() for step in plan(cfg)] == ["run", "reused", "run"]
