"""The key of a step: everything that shapes its result is in it, and what is not in it is here, with the reason."""

from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass, replace
from pathlib import Path

import pytest
from tiny import configured

from runner.config.loading import _bare
from runner.config.schema import Config, Source
from runner.data.sources import data_key, sources_of
from runner.errors import UserError
from runner.plan import plan

ALL = {"sft", "reward", "dpo", "ppo"}

# The steps whose own facts a key belongs to; of a block and a key in it, the longer name counts
KEYED = {
    "seed": ALL,
    "model": ALL,
    "model.tokenizer_vocab": {"reward"},  # a pretrained actor brings its tokenizer along
    "model.actor": {"sft"},
    "model.actor.lora": {"sft", "dpo", "ppo"},
    "model.reward": {"reward"},
    "model.reward.lora": {"reward", "ppo"},
    "dataset": ALL,
    "dataset.sft_only": {"sft", "reward"},  # the reward model is random, and its tokenizer trained on the demonstrations
    "dataset.every_answer": {"sft", "reward"},  # likewise
    "dataset.ppo_only": {"sft", "reward", "ppo"},  # SFT must not see them
    "dataset.pretrain": {"ppo"},
    "rollout": {"ppo"},
    "sft": {"sft"},
    "reward": {"reward"},
    "dpo": {"dpo"},
    "ppo": {"ppo"},
}

# Keys that no step's key holds
UNKEYED = {
    "name": "a label",
    "stage": "says which steps there are",
    "store": "where they lie",
    "resume": "goes_on_from is in the key where a step did (tests/test_resume.py)",
    "time_limit": "when to stop; what was stopped goes on alike (tests/test_exact_resume.py)",
    "max_restarts": "how often to go on",
    "dry_run": "trains nothing",
    "debug": "how errors are shown",
    "invariants": "what is said of a broken run, or whether it ends",
    "hardware": "where and how fast: the global batch is split exactly (tests/test_engine.py), other digits are accepted. Precision: below",
    "checkpoint": "what is kept; model_best/ is beside the model, and no step starts from it",
    "wandb": "who is told",
    "model.name": "a label",
    "model.recipe": "read by interpolation: its values stand in the stage blocks",
    "model.trust_remote_code": "refuses a checkpoint or loads it; the weights are the same",
    "model.actor.shape": "pretrained: the checkpoint has its own, this one is for the forecast",
    "model.reward.revision": "random weights: nothing is read from there",
    "dataset.name": "a label",
    "dataset.path": "read by interpolation: it stands in the sources, and counts by its content",
    **{f"dataset.sources.mine.{key}": "refused of a local file (tests/test_data.py)" for key in ("split", "subset", "revision")},
    "dataset.sources.toy.fields": "refused of an adapter that knows the names (tests/test_cli.py)",
    "dataset.fields": "read by interpolation: they stand in the sources",
    **{f"{stage}.eval_every": "evaluations draw no random number of training, and change no weight" for stage in ALL},
    **{f"{stage}.eval_examples": "likewise" for stage in ("sft", "reward", "dpo")},
    "ppo.eval_prompts": "likewise: ppo.calibration_prompts are counted apart (tests/test_checkpoint.py)",
}

# Other values of keys whose kind alone does not tell one
OTHER = {
    "ppo.top_k": 5,  # 1 is refused
    "resume": "new",
    "invariants": "warn",
    "time_limit": "90",
    "use": "a/b",
    "lr_schedule": "linear",
    "betas": [0.5, 0.5],
    "kl_estimator": "k2",
    "label_smoothing": 0.1,
    "engine": "hf",
    "family": "bloom",
    "attention": "eager",
    "on_bad_row": "skip",
    "adapter": "hh_dialogue",
    "only": "sft",
    "fields": {"prompt": "x"},
    "targets": ["q_proj"],
    "dataset.sources.toy.fields": {},
    "model.reward.path": "a/b",
    "dataset.sources.mine.path": "a/b",
    "dataset.sources.mine.split": "train",
    "dataset.sources.mine.subset": None,
    "dataset.sources.mine.revision": None,
}


@pytest.fixture(scope="module")
def cfg(tmp_path_factory) -> Config:
    """Everything that a key could matter to: a pretrained model and a random one, data of each kind, the mixture of text."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("mine", "more", "text"):
        (folder / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n')
    made = configured("model.actor.path=facebook/opt-125m", "ppo.ptx_coef=0.5")
    sources = dict(made.dataset.sources) | {"mine": Source(str(folder / "mine.jsonl"))}
    texts = {"sft_only": [str(folder / "more.jsonl")], "pretrain": [str(folder / "text.jsonl")]}
    return replace(
        made, store=str(folder / "store"), dpo=configured("stage=dpo").dpo, dataset=replace(made.dataset, sources=sources, **texts)
    )


def leaves(block, prefix: str = "") -> Iterator[tuple[str, object, Field]]:
    """(dotted key, value, field) of every key of a block. Blocks that are excused as a whole are one key."""
    for f in fields(block):
        key, value = prefix + f.name, getattr(block, f.name)
        if key not in UNKEYED and is_dataclass(value):
            yield from leaves(value, f"{key}.")
        elif key == "dataset.sources":
            for name, source in value.items():
                yield from leaves(source, f"{key}.{name}.")
        else:
            yield key, value, f


def another(key: str, value: object, f: Field) -> object:
    """Another valid value."""
    for name in (key, f.name):
        if name in OTHER:
            return OTHER[name]
    if value is None:
        value = {int: 3, float: 0.5, str: ""}[_bare(f.type)]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 or 1 if isinstance(value, int) else value / 2 or 0.5
    return {str: lambda: value + "x", list: lambda: [*value, "x"], dict: lambda: value | {"x": 1}}[type(value)]()


def put(block, key: str, value: object):
    """A copy of the block with another value, which its checks see."""
    head, _, rest = key.partition(".")
    inner = block[head] if isinstance(block, dict) else getattr(block, head)
    inner = put(inner, rest, value) if rest else value
    return block | {head: inner} if isinstance(block, dict) else replace(block, **{head: inner})


def own_facts(cfg: Config) -> dict[str, dict]:
    steps = [step for stage in ("dpo", "ppo") for step in plan(replace(cfg, stage=stage))]
    return {step.stage: {k: v for k, v in step.facts.items() if k != "parents"} for step in steps}


def longest(key: str, table: dict):
    parts = key.split(".")
    return next((table[name] for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in table), None)


def test_every_key_of_the_configuration_is_in_a_steps_key_or_excused(cfg):
    before, wrong = own_facts(cfg), {}
    for key, value, f in leaves(cfg):
        if is_dataclass(value) or key == "stage":  # a whole block that is excused; and who asks for other steps gets others
            continue
        if key == "dataset.fields":  # alone it is refused: no source would take it
            continue
        after = own_facts(put(cfg, key, another(key, value, f)))
        found = {stage for stage in after if before[stage] != after[stage]}  # a stage that is given needs no parents
        expected = set() if key in UNKEYED else longest(key, KEYED)
        if found != expected:
            wrong[key] = f"is in the keys of {sorted(found)}, and not of {sorted(expected)}"
    assert not wrong


def test_another_precision_is_another_result(cfg):
    """bf16 keeps 8 bits: no rounding to overlook, and a sweep over precisions must not repeat the first."""
    before, after = own_facts(cfg), own_facts(put(cfg, "hardware.precision", "bf16"))
    assert cfg.hardware.precision == "fp32" and all(before[stage] != after[stage] for stage in ALL)


def test_the_list_of_excuses_names_keys_that_there_are(cfg):
    assert UNKEYED.keys() <= {key for key, _, _ in leaves(cfg)}


@pytest.mark.parametrize("stage, rate", [("sft", "sft.lr"), ("dpo", "dpo.lr"), ("ppo", "ppo.actor_lr")])
def test_a_rate_at_which_nothing_trains_is_in_no_key(stage, rate):
    """Or a sweep over it would train the same adapters again and again."""

    def key(*overrides: str) -> str:
        return plan(configured(f"stage={stage}", *overrides))[-1].key

    adapters = "model.actor.lora.dim=4"
    assert key(adapters) == key(adapters, f"{rate}=0.5")
    assert key() != key(f"{rate}=0.5")
    assert key(adapters, "model.actor.lora.train_rest=true") != key(adapters, "model.actor.lora.train_rest=true", f"{rate}=0.5")


def test_the_same_key_means_the_same_rows_in_the_same_order(cfg):
    dataset = cfg.dataset
    turned = replace(dataset, sources=dict(reversed(dataset.sources.items())))
    assert list(turned.sources) != list(dataset.sources)
    assert data_key(turned, "sft") == data_key(dataset, "sft")
    assert list(sources_of(turned).items()) == list(sources_of(dataset).items())


def test_more_rows_for_one_stage_leave_a_pretrained_reward_model_as_it_is(cfg):
    cfg = replace(cfg, model=replace(cfg.model, reward=cfg.model.actor))
    before, more = own_facts(cfg), list(cfg.dataset.pretrain)
    for key, changed in (("ppo_only", {"sft", "ppo"}), ("sft_only", {"sft"}), ("eval_only", ALL)):
        after = own_facts(put(cfg, f"dataset.{key}", more))
        assert {stage for stage in after if before[stage] != after[stage]} == set(changed)


def test_demonstrations_that_are_mixed_into_ppo_are_in_its_key(cfg):
    cfg = replace(cfg, dataset=replace(cfg.dataset, pretrain=[]))
    assert cfg.ppo.ptx_coef and own_facts(cfg)["ppo"] != own_facts(put(cfg, "dataset.sft_only", []))["ppo"]


def test_text_that_is_not_mixed_in_does_not_count(cfg):
    off = put(cfg, "ppo.ptx_coef", 0.0)
    assert own_facts(put(off, "dataset.pretrain", ["a/b"])) == own_facts(off)


def test_a_local_base_model_counts_by_its_files_and_not_by_where_it_lies(cfg, tmp_path):
    def facts(folder: Path) -> dict[str, dict]:
        return own_facts(put(cfg, "model.actor.path", str(folder)))

    first = tmp_path / "first"
    first.mkdir()
    (first / "config.json").write_text('{"model_type": "opt"}')
    (first / "tokenizer.json").write_text("{}")
    (first / "model.bin").write_text("weights")
    before = facts(first)
    moved = first.rename(tmp_path / "moved")
    assert facts(moved) == before
    (moved / "model.bin").write_text("other weights")
    assert {stage for stage in ALL if facts(moved)[stage] != before[stage]} == {"sft"}
    with pytest.raises(UserError, match=r"model.actor.path=.*/first: this folder does not exist .* Type model.actor.path=FOLDER"):
        facts(first)
    (moved / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"model.actor.path=.*/moved is not a Hugging Face checkpoint: it has no config.json"):
        facts(moved)


def test_a_given_result_needs_no_parents():
    """They would be trained, and read by nothing."""
    assert [step.stage for step in plan(configured("ppo.use=x/mine"))] == ["ppo"]
    assert [step.stage for step in plan(configured("stage=dpo", "dpo.use=x/mine"))] == ["dpo"]
    assert [step.stage for step in plan(configured("sft.use=x/mine"))] == ["sft", "reward", "ppo"]
