"""What every run says about its own speed: phases that sum to the step, utilisation of real tokens, peak memory, advice."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import configured
from workers import update

from runner import flops, metrics
from runner.config.schema import Lora
from runner.data.batches import EMPTY, Batches
from runner.errors import UserError
from runner.flops import MatrixSizes
from runner.metrics import RunLog
from runner.rollout.stats import Stats
from runner.schedules import lr_share
from runner.stages import dpo, ppo, reward, sft
from runner.stages.ppo_update import Mixture

TRAIN = {
    "sft": (sft.train, {"data", "train"}),
    "reward": (reward.train, {"data", "train"}),
    "dpo": (dpo.train, {"data", "reference", "train"}),
    "ppo": (ppo.train, {"rollout", "scoring", "update"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    made = tmp_path_factory.mktemp("efficiency")
    update.prepare(made, tokenizer)
    return made


def run(stage: str, folder: Path, work: Path, device: torch.device, lora: Lora | None = None) -> tuple[list[dict], dict]:
    """The rows of the steps of a short run, and its result."""
    cfg = update.configuration(1, 0)
    if lora:
        parts = {name: replace(getattr(cfg.model, name), lora=lora) for name in ("actor", "reward")}
        trained = {} if stage == "ppo" else {stage: replace(getattr(cfg, stage), lora_lr=1.5)}
        cfg = replace(cfg, model=replace(cfg.model, **parts), **trained)
    short = {"max_steps": 2, "rollout_batch": 8, "minibatches": 1, "ptx_coef": 0.0, "eps": 1e-5, "actor_lr": 1e-4, "eval_every": 0}
    cfg = replace(cfg, hardware=replace(cfg.hardware, tflops=0.1), ppo=replace(cfg.ppo, **short))
    TRAIN[stage][0](cfg, update.inputs(folder, stage, work), RunLog(cfg, stage, work, {}, device), device)
    rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "time/step" in row], json.loads((work / "result.json").read_text())


@pytest.mark.parametrize("stage", TRAIN)
def test_the_phases_of_every_stage_sum_to_the_step(stage, folder, alone, tmp_path):
    rows, result = run(stage, folder, tmp_path, alone)
    assert len(rows) == 2
    for row in rows:
        phases = {name.removeprefix("time/"): value for name, value in row.items() if name.startswith("time/") and name != "time/step"}
        assert TRAIN[stage][1] <= phases.keys() - {"other"}
        assert sum(phases.values()) == pytest.approx(row["time/step"], rel=1e-9)
        assert 0 <= phases["other"] < 0.5 * row["time/step"]
        assert 0 <= row["perf/padding_fraction"] < 1 and row["perf/mfu"] > 0
    assert result["phases"]["other"] == pytest.approx(sum(row["time/other"] for row in rows))


def test_the_utilisation_of_sft_counts_real_tokens_and_the_logits_that_are_made(folder, alone, tmp_path):
    """All 11 rows are 102 tokens long; with a loss on prompts, all but the first token of each are predicted."""
    rows, _ = run("sft", folder, tmp_path, alone)
    batches = Batches(update.LENGTHS, 8, 100, world=1, rank=0, seed=update.configuration(1, 0).seed)
    first, second = ([update.LENGTHS[n] for n in batches.rows(step) if n != EMPTY] for step in (0, 1))
    body, head, attention = 2 * (4 * 32 * 32 + 2 * 32 * 64), 32 * rows_of_the_table(folder), 2 * 32
    sizes = MatrixSizes(body, body, head, head, attention, 0)
    found = sorted(row["perf/mfu"] * row["time/step"] * 0.1e12 for row in rows)
    assert found == pytest.approx(sorted(flops.training(sizes, lengths, sum(lengths) - len(lengths)) for lengths in (first, second)))


def rows_of_the_table(folder: Path) -> int:
    """The vocabulary grows to the tokenizer's, in steps of 64."""
    size = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    tokens = len(size["model"]["vocab"]) + sum(token["content"] not in size["model"]["vocab"] for token in size["added_tokens"])
    return -(-tokens // 64) * 64 if tokens > 256 else 256


def test_the_flops_of_an_update_are_those_of_actor_critic_and_mixture():
    """The second iteration, of two passes with two minibatches. The text of each step is a row of 5 tokens, of which 4 are predicted."""
    sizes = {"actor": MatrixSizes(100, 100, 10, 10, 7, 0), "critic": MatrixSizes(50, 50, 0, 0, 3, 0)}
    rollout = SimpleNamespace(prompt_lengths=torch.tensor([2, 1]), lengths=torch.tensor([1, 3]))
    actor, critic = flops.training(sizes["actor"], [3, 4], 4), flops.training(sizes["critic"], [3, 4])
    settings = SimpleNamespace(ppo_epochs=2, minibatches=2, critic_warmup=1)
    given = {"sizes": sizes, "rollout": rollout, "i": 1}
    assert ppo.update_flops(settings, mixture=None, taken=range(4), **given) == 2 * (actor + critic)
    assert ppo.update_flops(settings, mixture=None, taken=range(1, 2), **given) == (actor + critic) / 2
    assert ppo.update_flops(settings, mixture=None, taken=range(4), **given | {"i": 0}) == 2 * critic
    mixture, asked = Mixture.__new__(Mixture), []
    mixture.lengths, mixture.weights = np.array([5, 7]), np.array([4.0, 6.0])
    mixture.batches = SimpleNamespace(rows=lambda number: asked.append(number) or np.array([0, -1]))
    texts = 3 * flops.training(sizes["actor"], [5], 4)
    assert ppo.update_flops(settings, mixture=mixture, taken=range(1, 4), **given) == 1.5 * (actor + critic) + texts
    assert asked == [5, 6, 7]


def test_decoding_is_reported_where_the_engine_counted_and_the_bandwidth_is_known():
    sizes = MatrixSizes(body=900, body_trained=0, head=100, head_trained=0, attention=0, cache=10)
    models = SimpleNamespace(actor=SimpleNamespace(module=torch.nn.Linear(1, 1)))
    stats = Stats(decode_seconds=2.0, steps=4, rows=8, cached=100)
    cfg = configured("hardware=h200", "model=opt1.3b")
    found = ppo.decoding(cfg, models, sizes, stats)
    assert found == {"rollout/decode_ms_per_token": 500.0, "perf/mbu": 4 * (4 * 1000 + 10 * 100) / 2.0 / 4.8e12}
    assert "perf/mbu" not in ppo.decoding(configured(), models, sizes, stats)
    assert ppo.decoding(cfg, models, sizes, Stats()) == {}


def test_the_advice_of_a_run_is_said_and_kept(alone, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics, "advise", lambda cfg, stage, rows, phases: f"{len(rows)} steps of {stage}, {sorted(phases)}")
    log = RunLog(configured("wandb.mode=disabled"), "sft", tmp_path, {}, alone)
    log.begin(0, 2)
    for step in (1, 2):
        with log.phase("train"):
            pass
        log.log(step, {"train/loss": 1.0})
    log.record(2, {"eval/loss": 1.0})
    log.result({})
    assert json.loads((tmp_path / "result.json").read_text())["advice"] == "2 steps of sft, ['other', 'start', 'train']"
    assert "[sft] advice: 2 steps of sft" in capsys.readouterr().out


def test_a_checkpoint_past_the_end_is_not_passed_off_as_a_shorter_run(alone, tmp_path):
    log = RunLog(configured("wandb.mode=disabled"), "sft", tmp_path, {}, alone)
    log.begin(3, 3)
    with pytest.raises(UserError, match=r"has taken 3 steps, this configuration asks for 2 in all: .* resume=new"):
        log.begin(3, 2)


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_the_rate_that_is_logged_is_the_adapters_where_they_train(stage, folder, alone, tmp_path):
    lora = Lora(dim=2, alpha=4, dropout=0.0, targets=[], train_rest=False)
    rows, _ = run(stage, folder, tmp_path, alone, lora)
    block = getattr(update.configuration(1, 0), stage)
    shares = [lr_share(s, 2, block.lr_schedule, block.warmup, block.lr_end) for s in range(2)]
    assert [row["lr"] for row in rows] == pytest.approx([1.5 * share for share in shares])
