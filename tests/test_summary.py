"""The summary of a run and the table of a sweep, from step folders made by hand."""

import csv
import io
import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from runner.formatting import clock, duration, num, pct, spell
from runner.reporting.report import Section, markdown, print_sections, sparkline
from runner.reporting.results import read_curves
from runner.reporting.summary import lacking_for_ppo, show_summary, sign_test
from runner.reporting.sweep_table import SweepTable, show_sweep

OWNED = {"sft": 2500, "reward": 5000, "ppo": 5000}
COMMON = {"world_size": 1, "resumed_from": 0, "tokens": 120_000}
SFT = COMMON | {
    "stage": "sft",
    "seconds": 31.4,
    "steps": 120,
    "data": {
        "train": 1920,
        "eval": 96,
        "truncated": 14,
        "repeated": 1200,
        "dropped": {"empty_response": 2, "duplicate": 31},
        "owned": OWNED,
    },
    "phases": {"train": 22.0, "eval": 3.1, "load": 1.2},
    "loss_before": 6.24,
    "loss_after": 1.83,
    "perplexity_before": 512.86,
    "perplexity_after": 6.234,
}
REWARD = COMMON | {
    "stage": "reward",
    "seconds": 42.0,
    "steps": 200,
    "data": {"train": 3840, "eval": 612, "truncated": 0, "dropped": {}, "owned": OWNED},
    "phases": {"train": 35.0, "eval": 5.5},
    "accuracy": 0.712,
    "accuracy_low": 0.675,
    "accuracy_high": 0.747,
    "eval_pairs": 612,
    "longer_is_better": 0.551,
    "beats_longer": 220,
    "loses_to_longer": 121,
    "accuracy_by_source": {"toy": [0.712, 612]},
    "calibration": [{"confidence": 0.56, "accuracy": 0.55, "n": 300}, {"confidence": 0.88, "accuracy": 0.84, "n": 312}],
}
DPO = REWARD | {
    "stage": "dpo",
    "accuracy_before": 0.5,
    "eval_loss_before": 0.693,
    "eval_loss": 0.58,
    "chosen_logratio": -3.2,
    "rejected_logratio": -14.5,
    "chosen_tokens": 30.0,
}
PPO = COMMON | {
    "stage": "ppo",
    "seconds": 161.0,
    "steps": 60,
    "resumed_from": 40,
    "data": {"train": 3840, "eval": 64, "truncated": 3, "dropped": {"too_long": 5}, "owned": OWNED},
    "phases": {"rollout": 95.0, "train": 50.0, "eval": 12.0},
    "before": {"score": -0.04, "kl": 0.0, "length": 18.2, "truncated_rate": 0.031, "judge": 0.41},
    "after": {"score": 1.31, "kl": 3.27, "length": 21.9, "truncated_rate": 0.016, "judge": 0.83},
    "eval_prompts": 64,
    "samples": [
        {
            "prompt": f"Human: Name {n} animals that live in the sea, please. Assistant:",
            "sft": "A dog and a cat and a dog and a cat and a dog [bold]and[/x] so on until the end of the day.",
            "ppo": "A whale, a squid and a crab | all *three* live in the sea.\nI hope this helps!",
            "sft_score": -0.52,
            "ppo_score": 1.44,
            "sft_judge": 0.0,
            "ppo_judge": 1.0,
        }
        for n in (3, 4, 5)
    ],
}


@dataclass(frozen=True)
class Step:
    """The part of runner.plan.Step that the summary reads."""

    stage: str
    key: str
    folder: Path
    pinned: str | None = None
    parents: dict[str, str] = field(default_factory=dict)
    facts: dict = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return (self.folder / "DONE").exists()

    @property
    def model(self) -> str:
        return self.pinned or str(self.folder / "model")


def make_step(store: Path, stage: str, result: dict | None, rows: list[dict] | None = None, pinned: str | None = None) -> Step:
    folder = store / f"{stage}-0123456789"
    folder.mkdir(parents=True, exist_ok=True)
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    if rows:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Step(stage, "0123456789", folder, pinned)


def make_steps(store: Path) -> list[Step]:
    curve = [{"step": n, "objective/scores": n / 30, "objective/kl": n * n / 900, "train/loss": 6 - n / 20} for n in range(60)]
    steps = [make_step(store, "sft", SFT, curve), make_step(store, "reward", REWARD)]
    exports = {
        "actor": "/before/the/store/moved/ppo-0123456789/model",
        "critic": "/before/the/store/moved/ppo-0123456789/critic",
        "actor_ema": None,
        "adapter": None,
    }
    return [*steps, make_step(store, "ppo", PPO | {"exports": exports}, [*curve, {"step": 60, "val/ratio": 1.0}])]


def words(width: int = 80, encoding: str = "utf-8") -> tuple[Console, io.BytesIO]:
    raw = io.BytesIO()
    return Console(file=io.TextIOWrapper(raw, encoding=encoding, write_through=True), width=width), raw


def summary(steps, run_dir, reused=(), overrides=(), width: int = 80, name: str = "demo", **more) -> str:
    console, raw = words(width)
    show_summary(name, steps, set(reused), run_dir, overrides, took=245.0, console=console, **more)
    return raw.getvalue().decode()


def row(text: str, label: str, holds: str = "") -> str:
    """The one line that begins with the label, and holds the other word."""
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith(label) and holds in line]
    assert len(lines) == 1, f"{len(lines)} lines begin with {label!r}:\n{text}"
    return lines[0]


def test_tells_what_was_trained_and_how_well(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = summary(make_steps(Path("runs/store")), Path("runs/demo/1"), reused={"sft"})
    assert row(text, "sft  ", "e").split() == ["sft", "reused", "-", "120", "1,920", "96", "14", "33"]
    assert row(text, "ppo  ", "trained").split()[1] == "trained"
    assert "demo: trained in 3 min 23 s" in text  # reward and ppo: the reused sft cost nothing
    assert "This command took 4 min 05 s, including data preparation and start-up." in text  # ppo's time is that of earlier commands too
    assert "sft dropped: 2 empty response, 31 duplicate" in text
    assert "sft trains on 1,200 exact copies of other rows" in text
    assert row(text, "ppo  ", "rollout").endswith("59 %  1 min 35 s") and row(text, "train", "31 %").endswith("31 %  50 s")
    assert row(text, "start", "2 %").endswith("2 %  4.0 s")  # 161 s less the three phases
    assert "ppo was resumed from its checkpoint at step 40" in text
    assert row(text, "perplexity").split()[1:4] == ["512.9", "6.23", "-506.6"]
    assert row(text, "reward model", "%").endswith("71.2 %  67.5 % to 74.7 %")
    assert row(text, "longer is better (baseline)").endswith("55.1 %")
    assert "It beats choosing the longer answer." in text
    assert row(text, "score").split()[1:4] == ["-0.04", "1.31", "+1.35"]
    assert row(text, "truncated").split()[1:5] == ["3.1", "%", "1.6", "%"]
    assert row(text, "judge").split()[1:4] == ["0.41", "0.83", "+0.42"]
    assert "▁" in row(text, "KL to SFT") and row(text, "KL to SFT").endswith("█")
    assert text.count("SFT: score -0.52, judge 0.00") == text.count("PPO: score 1.44, judge 1.00") == 3
    assert row(text, "ppo critic").endswith(" runs/store/ppo-0123456789/critic")
    assert row(text, "talk to it").endswith("python -m runner.chat runs/store/ppo-0123456789/model")
    # From here run.py is elsewhere
    assert row(text, "change something").endswith(f"python {Path(__file__).parents[1]}/run.py -m ppo.kl_coef=0.02,0.05,0.1")
    assert "wandb sync" not in text


def test_the_time_outside_the_stages_is_said(tmp_path):
    steps = [make_step(tmp_path / "s", "sft", SFT), make_step(tmp_path / "s", "reward", REWARD)]
    said = "This command took 4 min 05 s, {} of it outside the stages"
    assert said.format("2 min 52 s") in summary(steps, tmp_path / "run")  # 245 s less 31.4 and 42
    assert said.format("3 min 34 s") in summary(steps, tmp_path / "again", reused={"reward"})


def test_fits_80_columns_without_a_terminal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = summary(make_steps(Path("runs/store")), Path("runs/demo/1"))
    # A command to type is as long as the path of the clone makes it
    assert max(len(line) for line in text.splitlines() if "run.py" not in line) <= 80
    assert "\x1b" not in text and not set(text) & set("│┃━─┏└")
    assert "SFT: score -0.52, judge 0.00           PPO: score 1.44" in text  # side by side
    assert not any(line.endswith(" ") for line in text.splitlines())


def test_narrow_terminal_keeps_every_number_whole(tmp_path):
    text = summary(make_steps(tmp_path / "s"), tmp_path / "run", width=64)
    assert "1,920" in row(text, "sft ", "31 s  ") and "67.5 %" in text and "+1.35" in row(text, "score")


def test_paths_and_commands_are_never_wrapped(tmp_path):
    steps = make_steps(tmp_path / ("long" * 30))
    text = summary(steps, tmp_path / "run")
    assert f"python -m runner.chat {steps[2].model}" in text


def test_text_of_a_model_is_not_markup(tmp_path):
    samples = [PPO["samples"][0] | {"sft": "[bold]loud[/x] :smile: [link=x]", "ppo": "\x1b[31mred\x07 <b>|`*\ud800"}]
    steps = [make_step(tmp_path / "s", "ppo", PPO | {"samples": samples})]
    text = summary(steps, tmp_path / "run[/b]", name="de[bold]mo")
    assert "[bold]loud[/x] :smile:" in text and "de[bold]mo" in text and "run[/b]" in text
    assert "\x1b" not in text and "\x07" not in text
    written = (tmp_path / "run[/b]" / "summary.md").read_text()
    assert r"\[bold\]loud\[/x\] :smile:" in written and r"\<b>\|\`\*" in written


def test_long_samples_are_clipped_in_the_terminal_only(tmp_path):
    samples = [PPO["samples"][0] | {"prompt": "early " * 400 + "the question?"}]
    text = summary([make_step(tmp_path / "s", "ppo", PPO | {"samples": samples})], tmp_path / "run")
    assert "characters ...]" in text and "the question?" in text and text.count("early") < 200
    assert (tmp_path / "run/summary.md").read_text().count("early") == 400


def test_a_sample_says_how_many_turns_went_before_its_prompt(tmp_path):
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes?"}]
    for earlier, said in ((turns, "(after 2 earlier turns)"), (turns[:1], "(after 1 earlier turn)"), ([], "Prompt: Human:")):
        samples = [PPO["samples"][0] | {"earlier": json.dumps(earlier)}]
        assert said in summary([make_step(tmp_path / "s", "ppo", PPO | {"samples": samples})], tmp_path / "run")


def test_a_console_without_unicode_gets_ascii(tmp_path):
    console, raw = words(encoding="ascii")
    show_summary("démo", make_steps(tmp_path / "s"), set(), tmp_path / "run", took=1.0, console=console)
    assert b"d?mo" in raw.getvalue() and b"_" in raw.getvalue()


def test_writes_markdown_and_flat_facts(tmp_path):
    summary(make_steps(tmp_path / "s"), tmp_path / "run", reused={"sft"}, overrides=["ppo.kl_coef=0.1", "name=x"])
    written = (tmp_path / "run/summary.md").read_text()
    assert written.startswith("# demo: trained in 3 min 23 s\n")
    assert "| KL to SFT | 0.00 | 3.27 | +3.27 |" in written and "| :---: |" not in written
    assert "A whale, a squid and a crab \\| all \\*three\\* live in the sea.<br>I hope this helps!" in written
    assert "- talk to it: `python -m runner.chat " in written
    facts = json.loads((tmp_path / "run/summary.json").read_text())
    assert facts["overrides"] == ["ppo.kl_coef=0.1", "name=x"] and facts["seconds"] == 203
    assert facts["ppo/after/score"] == 1.31 and facts["reward/accuracy_low"] == 0.675 and facts["sft/state"] == "reused"
    assert not any(isinstance(value, dict) for value in facts.values())


def test_dpo_says_how_well_it_orders_pairs_and_how_far_it_went(tmp_path):
    steps = [make_step(tmp_path / "s", "sft", SFT), make_step(tmp_path / "s", "dpo", DPO)]
    text = summary(steps, tmp_path / "run", overrides=["stage=dpo"])
    assert "DPO on 612 held-out pairs" in text and row(text, "implicit reward").endswith("71.2 %  67.5 % to 74.7 %")
    assert "The log-probability of a chosen answer moved by -3.20 nats, that of a rejected one by -14.5." in " ".join(text.split())
    assert "become unlikely" not in text and "Calibration" not in text  # the scale of its rewards is dpo.beta's
    assert row(text, "talk to it").endswith(f"runner.chat {steps[1].model}")
    assert row(text, "change something").endswith("python run.py -m stage=dpo dpo.beta=0.03,0.1,0.3")
    assert "train the rest" not in text  # it is no step on the way to PPO
    facts = json.loads((tmp_path / "run/summary.json").read_text())
    assert facts["dpo/accuracy"] == 0.712 and facts["dpo/eval_loss_before"] == 0.693
    lost = [make_step(tmp_path / "t", "dpo", DPO | {"chosen_logratio": -64.0})]
    assert "Chosen answers have become unlikely too" in summary(lost, tmp_path / "again")


@pytest.mark.parametrize(("stage", "epochs"), [("sft", "1,2,4"), ("reward", "1,2")])
def test_one_stage_alone(tmp_path, stage, epochs):
    steps = [make_step(tmp_path / "s", stage, {"sft": SFT, "reward": REWARD}[stage])]
    text = summary(steps, tmp_path / "run", overrides=[f"stage={stage}", "model=opt1.3b"])
    assert "held-out prompts" not in text
    assert ("runner.chat" in text) == (stage == "sft")
    assert row(text, "change something").endswith(f"python run.py -m stage={stage} model=opt1.3b {stage}.epochs={epochs}")
    assert row(text, "train the rest").endswith("python run.py model=opt1.3b stage=ppo")
    capped = summary(steps, tmp_path / "run", overrides=[f"stage={stage}", f"{stage}.max_steps=30"])  # more epochs would change nothing
    assert row(capped, "change something").endswith(f"python run.py -m stage={stage} {stage}.max_steps=30,60")


def test_no_sweep_is_offered_over_a_stage_that_was_given(tmp_path):
    steps = [make_step(tmp_path / "s", "sft", SFT), make_step(tmp_path / "s", "ppo", None, pinned="runs/other/ppo/model")]
    text = summary(steps, tmp_path / "run", overrides=["ppo.use=runs/other/ppo/model"])
    assert "change something" not in text and row(text, "talk to it").endswith("runs/other/ppo/model")


@pytest.mark.parametrize(("owned", "offered"), [({"sft": 300}, False), ({"sft": 60, "reward": 120, "ppo": 120}, True)])
def test_the_rest_is_offered_where_the_data_can_feed_it(tmp_path, owned, offered):
    steps = [make_step(tmp_path / "s", "sft", SFT | {"data": SFT["data"] | {"owned": owned}})]
    assert ("train the rest" in summary(steps, tmp_path / "run", overrides=["stage=sft"])) == offered


def test_next_command_repeats_the_overrides(tmp_path):
    text = summary(make_steps(tmp_path / "s"), tmp_path / "run", overrides=["ppo.kl_coef=0.3", "dataset.path=my file.jsonl"])
    assert row(text, "change something").endswith("python run.py -m 'dataset.path=my file.jsonl' ppo.kl_coef=0.02,0.05,0.1")


def test_next_commands_find_the_presets_and_can_be_typed_after_a_forced_run(tmp_path):
    forced = ["stage=sft", "resume=force", "model=mine"]
    text = summary([make_step(tmp_path / "s", "sft", SFT)], tmp_path / "run", overrides=forced, flags=["--config-dir=my conf"])
    assert row(text, "change something").endswith("run.py '--config-dir=my conf' -m stage=sft model=mine sft.epochs=1,2,4")
    # Without it the forced step would not be found
    assert row(text, "train the rest").endswith("run.py '--config-dir=my conf' resume=force model=mine stage=ppo")


def test_next_commands_of_a_job_of_a_sweep_over_stages_can_be_typed(tmp_path):
    job = ["stage=sft", "++reward.lr=1e-4", "++sft.lr=1e-3", "++dataset.sources.toy.weight=2"]
    text = summary([make_step(tmp_path / "s", "sft", SFT)], tmp_path / "run", overrides=job)
    assert row(text, "change something").endswith("run.py -m stage=sft sft.lr=1e-3 dataset.sources.toy.weight=2 sft.epochs=1,2,4")
    assert row(text, "train the rest").endswith("run.py reward.lr=1e-4 sft.lr=1e-3 dataset.sources.toy.weight=2 stage=ppo")


def test_what_ppo_lacks_is_said_where_one_model_is_random_and_the_other_is_not(tmp_path):
    def lacking(actor: bool, reward: bool) -> str | None:
        return lacking_for_ppo(SimpleNamespace(actor=SimpleNamespace(random=actor), reward=SimpleNamespace(random=reward)))

    assert lacking(True, True) is lacking(False, False) is None
    assert lacking(True, False) == "model.actor.path"
    key = lacking(False, True)
    text = summary([make_step(tmp_path / "s", "sft", SFT)], tmp_path / "run", overrides=["stage=sft"], lacking=key)
    assert "stage=ppo, also type model.reward.path=...: reward model and actor must have the same tokenizer" in " ".join(text.split())
    assert "train the rest " not in text.replace("To train the rest, ", "")


def test_pinned_and_missing_facts(tmp_path):
    pinned = make_step(tmp_path / "s", "sft", SFT, pinned="facebook/opt-125m")  # what lies in the folder is not this model's
    bare = make_step(tmp_path / "s", "reward", None)
    unjudged = [facts | {"judge": None} for facts in (PPO["before"], PPO["after"] | {"score": float("nan")})]
    samples = [PPO["samples"][0] | {"sft_judge": None, "ppo_judge": None}]
    ppo = make_step(tmp_path / "s", "ppo", PPO | {"before": unjudged[0], "after": unjudged[1], "samples": samples})
    text = summary([pinned, bare, ppo], tmp_path / "run")
    assert row(text, "sft  ", "e").split() == ["sft", "given", "-", "-", "-", "-", "-", "-"]
    assert "perplexity" not in text and "facebook/opt-125m" in row(text, "sft given ", "opt")
    assert row(text, "reward  ").split()[1:] == ["missing", *"------"]
    assert row(text, "score").split() == ["score", "-0.04", "nan", "+nan"]
    assert "judge" not in text and "Calibration" not in text


def test_the_advice_of_a_stage_is_passed_on(tmp_path):
    text = summary([make_step(tmp_path, "reward", REWARD | {"advice": "sleep less"})], tmp_path / "run")
    assert "reward could be faster: sleep less" in text


@pytest.mark.parametrize(("stage", "facts"), [("sft", SFT), ("reward", REWARD), ("dpo", DPO)])
def test_adapters_and_the_best_model_are_listed_where_they_exist(tmp_path, stage, facts):
    step = make_step(tmp_path, stage, facts)
    assert f"{stage} adapter" not in summary([step], tmp_path / "run")
    for part in ("adapter", "model_best"):
        (step.folder / part).mkdir()
    text = summary([step], tmp_path / "run")
    assert row(text, f"{stage} model  ", "/model").endswith(f"{stage}-0123456789/model")
    assert row(text, f"{stage} adapter").endswith(f"{stage}-0123456789/adapter")
    assert row(text, f"{stage} model best").endswith(f"{stage}-0123456789/model_best")


def test_a_step_without_result_is_missing(tmp_path):
    assert "missing" in row(summary([make_step(tmp_path, "sft", None)], tmp_path / "run"), "sft  ")


def test_wandb_is_offered_where_an_offline_run_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = make_steps(Path("store"))
    (steps[2].folder / "wandb/offline-run-20250101").mkdir(parents=True)
    text = summary(steps, Path("run"))
    assert row(text, "ppo to W&B").endswith("wandb sync store/ppo-0123456789/wandb/offline-run-*")
    assert "sft to W&B" not in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"reward": {"loses_to_longer": 200}}, "cannot be told from"),
        ({"reward": {"loses_to_longer": 320}}, "teaches length"),
        ({"ppo": {"after": PPO["after"] | {"judge": 0.2}}}, "exploits the reward model"),
        ({"ppo": {"after": PPO["after"] | {"length": 60.0}}}, "much longer"),
        ({"ppo": {"after": PPO["after"] | {"score": -1.0}}}, "The score fell"),
    ],
)
def test_remarks_on_suspicious_numbers(tmp_path, change, says):
    (stage, facts), base = next(iter(change.items())), {"reward": REWARD, "ppo": PPO}
    assert says not in summary([make_step(tmp_path, stage, base[stage])], tmp_path / "run")
    assert says in " ".join(summary([make_step(tmp_path, stage, base[stage] | facts)], tmp_path / "run").split())


def told(tmp_path, **facts) -> str:
    """The summary of a PPO step with these facts, on one line."""
    return " ".join(summary([make_step(tmp_path, "ppo", PPO | facts)], tmp_path / "run").split())


def evaluated(score: float, se: float | None = None) -> dict:
    return PPO["after"] | {"score": score} | ({} if se is None else {"score_se": se})


def test_the_score_has_its_standard_error(tmp_path):
    told_of = told(tmp_path, before=evaluated(0.0, 0.3), after=evaluated(1.25, 0.4))
    assert "score 0.00 1.25 +1.25 ± 0.50" in told_of and "± is one standard error" in told_of
    assert "The score fell by 2.00 ± 0.50" in told(tmp_path, before=evaluated(2.0, 0.3), after=evaluated(0.0, 0.4))
    assert "±" not in told(tmp_path, before=evaluated(0.0), after=evaluated(1.0))  # an older result
    assert "±" not in told(tmp_path, before=evaluated(0.0, 0.0), after=evaluated(1.0, 0.0), eval_prompts=1)
    step = make_step(tmp_path, "ppo", PPO | {"before": evaluated(0.0, 0.3), "after": evaluated(1.25, 0.4)})
    console, raw = words(encoding="ascii")
    show_summary("demo", [step], set(), tmp_path / "run", took=1.0, console=console)
    assert b"+1.25 +- 0.50" in raw.getvalue()
    assert "| ---: | ---: | ---: |" in (tmp_path / "run/summary.md").read_text().partition("PPO on")[2]


def test_a_training_that_diverged_says_so_in_numbers_that_can_be_read(tmp_path):
    diverged = SFT | {"loss_after": 60.0, "perplexity_after": 5184705528587072045056.0}
    text = summary([make_step(tmp_path, "sft", diverged)], tmp_path / "run")
    assert row(text, "perplexity").split()[1:4] == ["512.9", "5.2e21", "+5.2e21"] and "Training made it worse" in text
    assert "Training made it worse" not in summary([make_step(tmp_path, "sft", SFT)], tmp_path / "run")


def test_noise_carries_no_verdict(tmp_path):
    assert "The score fell" not in told(tmp_path, before=evaluated(0, 0.1), after=evaluated(-0.28, 0.1))
    assert "The score fell" in told(tmp_path, before=evaluated(0, 0.1), after=evaluated(-0.29, 0.1), eval_prompts=6)
    assert "The score fell" not in told(tmp_path, before=evaluated(0), after=evaluated(-0.5), eval_prompts=31)
    assert "The score fell" in told(tmp_path, before=evaluated(0), after=evaluated(-0.5), eval_prompts=32)
    fallen = {"before": evaluated(0, 0.1) | {"judge": 0.5}, "after": evaluated(1, 0.1) | {"judge": 0.4}}
    assert "exploits" not in told(tmp_path, **fallen, eval_prompts=31) and "exploits" in told(tmp_path, **fallen, eval_prompts=32)


@pytest.mark.parametrize(("pairs", "said"), [(99, False), (100, True)])
def test_calibration_needs_pairs(tmp_path, pairs, said):
    few = REWARD | {"calibration": [{"confidence": 0.96, "accuracy": 0.0, "n": pairs}]}
    assert ("when it is 96 % sure" in summary([make_step(tmp_path, "reward", few)], tmp_path / "run")) == said


@pytest.mark.parametrize(("won", "verdict"), [(5, "cannot be told from"), (6, "It beats choosing the longer answer")])
def test_few_pairs_carry_no_verdict(tmp_path, won, verdict):
    """An exact test: 5 to 0 are as one-sided in 1 of 16 tosses of a coin, 6 to 0 in 1 of 32."""
    facts = REWARD | {"accuracy": 0.875, "longer_is_better": 0.375, "eval_pairs": 8, "beats_longer": won, "loses_to_longer": 0}
    assert verdict in summary([make_step(tmp_path, "reward", facts)], tmp_path / "run")


def test_the_sign_test_is_that_of_a_coin():
    assert [sign_test(*n) for n in ((0, 0), (3, 3), (5, 1), (1, 5), (6, 0))] == [1.0, 1.0, 14 / 64, 14 / 64, 2 / 64]
    assert sign_test(2600, 2400) == pytest.approx(0.0049, abs=2e-4)  # as many as no float counts


def test_a_result_without_the_counts_of_its_pairs_has_no_verdict(tmp_path):
    older = {key: value for key, value in REWARD.items() if key not in ("beats_longer", "loses_to_longer")}
    assert "choosing the longer" not in summary([make_step(tmp_path, "reward", older)], tmp_path / "run")


@pytest.mark.parametrize(
    ("steps", "rate", "says"),
    [
        (20, 0.3, "Many answers never end: raise"),
        (2, 0.3, ""),
        (2, 0.9, "Many answers never end, after only 2 SFT steps: raise"),
        (1, 1.0, "Many answers never end, after only 1 SFT step: raise"),
    ],
)
def test_some_endless_answers_are_no_news_after_a_few_steps_of_sft(tmp_path, steps, rate, says):
    both = [make_step(tmp_path, "sft", SFT | {"steps": steps})]
    both.append(make_step(tmp_path, "ppo", PPO | {"after": PPO["after"] | {"truncated_rate": rate}}))
    text = " ".join(summary(both, tmp_path / "run").split())
    assert says in text and ("never end" in text) == bool(says)
    # SFT's folder was deleted: of its steps nothing is known
    assert ("Many answers never end: raise" in summary(both[1:], tmp_path / "again")) == (rate > 0.5)


def test_score_and_its_curve_are_of_the_same_kind(tmp_path):
    """Training scores are clipped and have the penalty for missing EOS; those of the evaluations have not."""
    rows = [{"step": n, "objective/scores": -n, "eval/score": n} for n in range(4)]
    text = summary([make_step(tmp_path, "ppo", PPO, rows)], tmp_path / "run")
    assert row(text, "score").endswith("▁▃▆█")
    assert "without ppo.score_clip and ppo.missing_eos_penalty" in " ".join(text.split())


def test_curves_of_a_resumed_run(tmp_path):
    lines = ['{"step": 1, "a": 1}', '{"step": 2, "a": 9}', '{"step": 2, "a": 2, "b": NaN}', '{"step": 3, "a": 3}', '{"step": 4, "a']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_curves(tmp_path)["a"] == [1, 2, 3] and "b" not in read_curves(tmp_path)


def test_sparkline_and_numbers():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert len(sparkline(list(range(1000)))) == 20 and sparkline([2.0, 2.0]) == "▄▄" and sparkline([1.0]) == ""
    assert [num(x) for x in (None, 12, 1234567, 0.0031, -0.0, 12.345, 1234.5)] == ["-", "12", "1,234,567", "0.003", "0.00", "12.3", "1,234"]
    assert [num(x) for x in (999_999.6, 1e6, -1.26e12)] == ["1,000,000", "1.0e6", "-1.3e12"]
    assert pct(0.5) == "50.0 %" and pct(None) == "-"


def test_times_are_said_as_measured_as_foreseen_or_as_left():
    said = {None: ("-", "-"), 1e-5: ("0.0 s", "0 s"), 0.014: ("0.0 s", "0.014 s"), 59.4: ("59 s", "59 s"), 59.7: ("60 s", "1.0 min")}
    said |= {90: ("1 min 30 s", "1.5 min"), 3597: ("59 min 57 s", "1 h 0 min"), 7182: ("1 h 59 min", "2 h 0 min")}
    assert {seconds: (duration(seconds), spell(seconds)) for seconds in said} == said
    assert [clock(s) for s in (4.6, 65, 3599.4, 3600, 3725, 36000)] == ["0:05", "1:05", "59:59", "1:00:00", "1:02:05", "10:00:00"]


def test_lines_do_not_part_a_number_from_its_unit():
    for width in range(40, 64):
        console, raw = words(width=width)
        print_sections([Section("t", notes=["sft time: train 38 s, eval 2.5 s, checkpoint 0.2 s, export 1 min 03 s, 95 % of it"])], console)
        lines = raw.getvalue().decode().splitlines()
        assert len(lines) > 2 and not any(line.split()[0] in ("s", "s,", "min", "%") for line in lines if line)


def test_markdown_escapes_only_what_markdown_reads():
    written = markdown([Section("kl_coef -> 0.2", notes=["> quoted", "_slanted_ __fat__ snake_case"])])
    assert written == "# kl_coef -> 0.2\n\n- \\> quoted\n- \\_slanted\\_ \\_\\_fat\\_\\_ snake_case\n"


def test_right_aligned_numbers():
    part = Section("t", header=("a", "b", "c"), rows=[["x", "1 %", "y"], ["x", "-", "2"]])
    assert "| --- | ---: | --- |" in markdown([part])
    console, raw = words()
    print_sections([part], console)
    assert "  x    -  2" in raw.getvalue().decode()


# --- sweeps -----------------------------------------------------------------------------------------------------------


def make_sweep(folder: Path) -> Path:
    """Three jobs, of which the second failed; a fourth folder that is no job."""
    for number, (coef, score) in enumerate([(0.02, 1.9), (0.05, None), (0.1, 0.8)]):
        overrides = ["model=tiny", f"ppo.kl_coef={coef}"]
        (folder / f"{number}/.hydra").mkdir(parents=True)
        OmegaConf.save(OmegaConf.create(overrides), folder / f"{number}/.hydra/overrides.yaml")
        facts = {"overrides": overrides, "seconds": 75.0, "reward/accuracy": 0.712, "sft/perplexity_after": 6.2, "ppo/before/score": -0.04}
        facts |= {"ppo/after/score": score, "ppo/after/kl": 3.25, "ppo/after/length": 21.9, "ppo/after/judge": None}
        if score is not None:
            (folder / f"{number}/summary.json").write_text(json.dumps(facts))
    (folder / "wandb").mkdir()
    return folder


def test_rounding_errors_are_no_numbers_in_the_table_of_a_sweep(tmp_path):
    path = make_sweep(tmp_path) / "0" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ppo/after/kl": 3.725e-09, "ppo/after/length": 12.25}))
    show_sweep(tmp_path, words()[0])
    first = next(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert first["ppo/after/kl"] == "0.0" and first["ppo/after/length"] == "12.25"


def test_sweep_table(tmp_path):
    console, raw = words()
    show_sweep(make_sweep(tmp_path), console)
    text = raw.getvalue().decode()
    assert "Sweep of 3 jobs, 1 stopped" in text
    assert row(text, "job  ").split() == ["job", "kl_coef", "RM", "acc", "score", "KL", "length", "time"]  # model and SFT are all the same
    assert row(text, "0 ").split() == [*["0", "0.02", "71.2", "%", "-0.04", "->", "1.90", "3.25", "21.9", "1", "min", "15", "s"]]
    assert row(text, "1 ").split()[:2] == ["1", "0.05"] and row(text, "1 ").endswith("stopped")
    assert row(text, "2 ").split()[1] == "0.1"
    assert row(text, "job 1 stopped").endswith(str(tmp_path / "1"))
    assert "| 0 | 0.02 | 71.2 % | -0.04 -> 1.90 |" in (tmp_path / "sweep.md").read_text()
    table = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [line["ppo.kl_coef"] for line in table] == ["0.02", "0.05", "0.1"]
    assert [line["state"] for line in table] == ["done", "stopped", "done"]
    assert table[2]["ppo/after/score"] == "0.8" and table[1]["ppo/after/score"] == ""


def test_a_sweep_says_how_much_was_held_out_and_tells_close_rows_apart(tmp_path):
    make_sweep(tmp_path)
    for number, change in ((0, {"ppo/after/kl": 3.2512}), (2, {"ppo/after/kl": 3.2538, "ppo/eval_prompts": 32})):
        path = tmp_path / str(number) / "summary.json"
        facts = json.loads(path.read_text()) | {"reward/eval_pairs": 1258, "ppo/eval_prompts": 256}
        path.write_text(json.dumps(facts | change))
    console, raw = words()
    show_sweep(tmp_path, console)
    text = raw.getvalue().decode()
    assert "Held out: RM on 1,258 pairs, PPO on 32 to 256 prompts." in text
    assert "3.251    21.9" in row(text, "0 ") and "3.254    21.9" in row(text, "2 ")  # lengths are the same, and are not told apart


def test_a_sweep_over_other_sft_models_says_that_scores_do_not_compare(tmp_path):
    make_sweep(tmp_path)
    for other, said in ((2.0, False), (3.0, True)):
        for number, std in ((0, 2.0), (2, other)):
            path = tmp_path / str(number) / "summary.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"ppo/score_mean": 0.5, "ppo/score_std": std}))
        console, raw = words()
        show_sweep(tmp_path, console)
        assert ("relative to each job's own SFT" in " ".join(raw.getvalue().decode().split())) == said


def test_errors_stand_under_the_table_of_a_sweep(tmp_path):
    make_sweep(tmp_path)
    (tmp_path / "0" / "error.txt").write_text("of an earlier command\n")
    (tmp_path / "1" / "error.txt").write_text("sft: out of memory. " + "Try this. " * 100 + "\nIts last lines:\n  boom\n")
    console, raw = words()
    show_sweep(tmp_path, console)
    text = raw.getvalue().decode()
    assert "Sweep of 3 jobs, 1 failed" in text and row(text, "job 1 failed").endswith(str(tmp_path / "1"))
    assert "job 1: sft: out of memory. Try this." in text and "characters ...]" in text
    assert "Its last lines" not in text and "earlier" not in text
    assert row(text, "1 ").endswith("failed") and max(len(line) for line in text.splitlines() if str(tmp_path) not in line) <= 80
    assert "- job 1: sft: out of memory. Try this." in (tmp_path / "sweep.md").read_text()
    errors = [line["error"] for line in csv.DictReader((tmp_path / "sweep.csv").open())]
    assert errors[0] == errors[2] == "" and errors[1] == ("sft: out of memory. " + "Try this. " * 100)


def test_a_sweep_of_dpo_says_how_far_the_chosen_answers_moved(tmp_path):
    path = make_sweep(tmp_path) / "0" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dpo/accuracy": 0.969, "dpo/chosen_logratio": 3.21}))
    console, raw = words(width=120)
    show_sweep(tmp_path, console)
    text = raw.getvalue().decode()
    assert "DPO acc  chosen logp" in text and "96.9 %        +3.21" in row(text, "0 ")
    assert "dpo/accuracy,dpo/chosen_logratio" in (tmp_path / "sweep.csv").read_text()


def test_a_sweep_over_stages_shows_what_each_has(tmp_path):
    trained = {"sft": {"sft/perplexity_after": 6.2}, "dpo": {"sft/perplexity_after": 6.2, "dpo/accuracy": 0.97}}
    trained["ppo"] = {"sft/perplexity_after": 6.2, "ppo/before/score": 0.0, "ppo/after/score": 1.5}
    for number, (stage, facts) in enumerate(trained.items()):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "summary.json").write_text(json.dumps(facts | {"overrides": [f"stage={stage}"], "seconds": 9.0}))
    console, raw = words()
    show_sweep(tmp_path, console)
    text = raw.getvalue().decode()
    assert row(text, "job  ").split() == ["job", "stage", "SFT", "ppl", "DPO", "acc", "score", "time"]
    assert row(text, "0 ").split() == ["0", "sft", "6.20", "-", "-", "9.0", "s"]
    assert row(text, "1 ").split() == ["1", "dpo", "6.20", "97.0", "%", "-", "9.0", "s"]
    assert row(text, "2 ").split() == ["2", "ppo", "6.20", "-", "0.00", "->", "1.50", "9.0", "s"]


def test_a_job_that_trained_nothing_took_no_time_in_a_sweep(tmp_path):
    path = make_sweep(tmp_path) / "0" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 0}))
    console, raw = words()
    show_sweep(tmp_path, console)
    assert row(raw.getvalue().decode(), "0 ").split()[-2:] == ["21.9", "-"]


def test_sweep_jobs_stand_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 9, 2):
        (tmp_path / str(number)).mkdir()
    console, raw = words()
    show_sweep(tmp_path, console)
    assert [line.split()[0] for line in raw.getvalue().decode().splitlines() if line.startswith("  ") and line.endswith("stopped")] == [
        "2",
        "9",
        "10",
    ]


def test_a_sweep_over_much_fits_80_columns(tmp_path):
    for number, path in enumerate(["data/first.jsonl", "data/second/with/a/long/name/of/a/file.jsonl"]):
        overrides = [
            f"dataset.path={path}",
            f"ppo.actor_lr={number}e-6",
            f"ppo.critic_lr={number}e-5",
            f"reward.lr={number}e-5",
            f"sft.lr={number}",
        ]
        facts = {"overrides": overrides, "seconds": 75.0, "reward/accuracy": 0.7, "ppo/before/score": 0.0, "ppo/after/score": 1.5}
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "summary.json").write_text(json.dumps(facts))
    console, raw = words()
    show_sweep(tmp_path, console)
    text = raw.getvalue().decode()
    assert "job 0, path data/first.jsonl, actor_lr 0e-6, critic_lr 0e-5, reward.lr 0e-5" in " ".join(text.split())
    assert text.count("score 0.00 -> 1.50") == 2 and max(len(line) for line in text.splitlines() if "/sweep" not in line) <= 80


def test_callback_reads_the_sweep_folder(tmp_path, capsys):
    config = OmegaConf.create({"dry_run": False, "hydra": {"sweep": {"dir": str(make_sweep(tmp_path))}}})
    SweepTable().on_multirun_end(config, config_name="config")
    assert "Sweep of 3 jobs" in capsys.readouterr().out
    config.dry_run = True
    SweepTable().on_multirun_end(config)
    assert capsys.readouterr().out == ""


APP = """
import json, os, pathlib, sys

import hydra
from hydra.core.hydra_config import HydraConfig

@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    if cfg.x == 2:
        raise ValueError("torch was imported" if "torch" in sys.modules else "boom " + os.environ["MY_TOKEN"])
    facts = {"overrides": list(HydraConfig.get().overrides.task), "seconds": 1.0}
    pathlib.Path(HydraConfig.get().runtime.output_dir, "summary.json").write_text(json.dumps(facts))

main()
"""


def test_hydra_shows_the_table_even_when_a_job_failed(tmp_path):
    (tmp_path / "app.py").write_text(APP)
    sweep = ["+hydra.callbacks.t._target_=runner.reporting.sweep_table.SweepTable", "hydra.sweep.dir=out/${now:%H-%M-%S-%f}"]
    command = [sys.executable, "app.py", "-m", "+x=1,2", *sweep]
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "MY_TOKEN": "not-for-files"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 1 and "boom" in run.stderr
    assert run.stdout.count("Sweep of 2 jobs, 1 failed") == 1
    assert row(run.stdout, "1  ").split() == ["1", "2", "failed"]
    assert len(list(tmp_path.glob("out/*/sweep.csv"))) == 1
    assert [path.read_text() for path in tmp_path.glob("out/*/*/error.txt")] == ["ValueError: boom ***\n"]
    assert "job 1: ValueError: boom ***" in run.stdout


def test_a_sweep_that_was_stopped_says_how_many_jobs_it_did_not_start(tmp_path):
    (tmp_path / "app.py").write_text(APP.replace("    facts =", "    if cfg.x == 4:\n        sys.exit(75)\n    facts ="))
    sweep = ["+hydra.callbacks.t._target_=runner.reporting.sweep_table.SweepTable", "hydra.sweep.dir=out"]
    command = [sys.executable, "app.py", "-m", "+x=4,1,3", *sweep]
    run = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(Path(__file__).parents[1])}, capture_output=True, text=True)
    assert run.returncode == 75 and "Sweep of 3 jobs, 2 not started, 1 stopped" in run.stdout, run.stderr


def test_jobs_of_a_named_sweep_are_counted_and_those_of_another_sweeper_are_not(tmp_path):
    make_sweep(tmp_path)
    params = {"++ppo.kl_coef": "0.02,0.05,0.1,${seed}", "dataset": "toy"}
    for sweeper, title in (("Basic", "Sweep of 8 jobs, 5 not started, 1 stopped"), ("Optuna", "Sweep of 3 jobs, 1 stopped")):
        facts = {"sweeper": {"_target_": f"hydra.{sweeper}Sweeper", "params": params}, "overrides": {"task": ["seed=1,2", "model=tiny"]}}
        OmegaConf.save(OmegaConf.create({"hydra": facts}), tmp_path / "multirun.yaml")
        console, raw = words()
        show_sweep(tmp_path, console)
        assert title in raw.getvalue().decode()


def test_a_sweep_over_what_names_its_folder_has_one_table(tmp_path):
    (tmp_path / "app.py").write_text(APP)
    sweep = ["+hydra.callbacks.t._target_=runner.reporting.sweep_table.SweepTable", "hydra.sweep.dir='it\\'s ${oc.select:x,any}'"]
    command = [sys.executable, "app.py", "-m", "+x=1,3", *sweep]
    run = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(Path(__file__).parents[1])}, capture_output=True, text=True)
    assert run.stdout.count("Sweep of 2 jobs") == 1, run.stderr
    assert len(list(tmp_path.glob("it's any/[01]/summary.json"))) == 2


def test_the_table_is_shown_once(tmp_path, monkeypatch, capsys):
    pending = []
    monkeypatch.setattr("atexit.register", lambda function, **kwargs: pending.append(function))
    monkeypatch.setattr("atexit.unregister", pending.remove)
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(make_sweep(tmp_path))}, "overrides": {"hydra": []}}})
    callback = SweepTable()
    callback.on_multirun_start(config, config_name="config")
    callback.on_multirun_end(config, config_name="config")
    assert pending == [] and capsys.readouterr().out.count("Sweep of") == 1


@pytest.mark.parametrize("dim", [0, 8])
def test_advice_on_the_learning_rate_names_the_one_that_trains(dim, tmp_path):
    sft = SFT | {"loss_after": SFT["loss_before"] + 1}
    step = replace(make_step(tmp_path, "sft", sft), facts={"model": {"actor": {"lora": {"dim": dim}}}})
    said = summary([step], tmp_path)
    assert f"Try a smaller {'sft.lora_lr' if dim else 'sft.lr'}" in " ".join(said.split())
