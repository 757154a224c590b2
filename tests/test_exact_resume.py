"""Every stage, stopped again and again and begun anew each time, gives what one go gives: all metrics, all weights, bit for bit.

The stages run in this process. They ask `stop.asked` after every optimizer step, between the micro batches of a
rollout, and between the minibatches of an update: PPO's unfinished rollouts and updates are among what must survive.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from workers import update

from runner.config.schema import Config, Lora
from runner.metrics import CLOCK, RunLog
from runner.rollout import collect
from runner.stages import dpo, ppo, reward, sft
from runner.watch import stop

TRAIN = {"sft": sft.train, "reward": reward.train, "dpo": dpo.train, "ppo": ppo.train}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    """Models, demonstrations, pairs and prompts; some held out."""
    made = tmp_path_factory.mktemp("exact")
    update.prepare(made, tokenizer)
    return made


def configuration(zero: int, adapters: bool) -> Config:
    """Everything that has a state: dropout, averaged weights, the text mixture, the KL controller, evaluations, the best checkpoint."""
    cfg = update.configuration(1, zero)
    lora = Lora(dim=2, alpha=4, dropout=0.1, targets=[], train_rest=False)
    model = replace(cfg.model, actor=replace(cfg.model.actor, lora=lora)) if adapters else cfg.model
    small = {"rollout_batch": 8, "minibatches": 2, "ppo_epochs": 2, "max_steps": 3, "eval_prompts": 4, "eval_every": 2}
    ppo_block = replace(
        cfg.ppo,
        **small,
        eps=1e-5,
        actor_lr=1e-3,
        critic_lr=1e-3,
        actor_lora_lr=1e-2,
        kl_target=0.1,
        kl_horizon=20,
        ema_decay=0.9,
        ptx_coef=0.5,
    )
    return replace(
        cfg,
        model=model,
        hardware=replace(cfg.hardware, micro_batch=replace(cfg.hardware.micro_batch, rollout=1)),
        sft=replace(cfg.sft, max_steps=4, epochs=9, dropout=0.1, eval_every=2, eps=1e-8, lr=1e-3, lora_lr=1e-2),
        reward=replace(cfg.reward, max_steps=4, epochs=9, dropout=0.1, eval_every=2, eps=1e-8, lr=1e-3, lora_lr=1e-2),
        dpo=replace(cfg.dpo, max_steps=4, epochs=9, eval_every=2, eps=1e-8, lr=1e-3, lora_lr=1e-2),
        ppo=replace(ppo_block, early_stop_kl=None),
        checkpoint=replace(cfg.checkpoint, every=0, keep_best=1, background=True),
    )


def run(cfg: Config, stage: str, folder: Path, work: Path, device: torch.device) -> None:
    work.mkdir(exist_ok=True)
    torch.manual_seed(cfg.seed)
    TRAIN[stage](cfg, update.inputs(folder, stage, work), RunLog(cfg, stage, work, {}, device), device)


def metrics(work: Path) -> list[dict]:
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(CLOCK)} for line in lines]


# The last number: the call at which every attempt is stopped. PPO asks twice in a rollout: at the first two it would go on for ever
KINDS = [
    ("sft", 0, False, 1),
    ("sft", 2, True, 2),
    ("reward", 3, False, 1),
    ("dpo", 0, True, 1),
    ("dpo", 3, False, 1),
    ("ppo", 0, False, 3),
    ("ppo", 0, False, 4),
    ("ppo", 3, True, 4),
]


class Stopper:
    """Stands in for stop.asked: says yes at its `patience`-th call."""

    def __init__(self, patience: int):
        self.left = patience

    def __call__(self) -> str | None:
        self.left -= 1
        return "SIGTERM" if self.left <= 0 else None


@pytest.mark.slow
@pytest.mark.parametrize("stage, zero, adapters, patience", KINDS)
def test_stopping_again_and_again_changes_nothing(stage, zero, adapters, patience, folder, alone, tmp_path, monkeypatch):
    cfg = configuration(zero, adapters)
    monkeypatch.setattr(collect, "WAVE", 4)  # two waves of four batches of one
    monkeypatch.setattr(stop, "asked", lambda: None)
    run(cfg, stage, folder, tmp_path / "straight", alone)

    stops, shapes = 0, set()
    while True:
        monkeypatch.setattr(stop, "asked", Stopper(patience))
        try:
            run(cfg, stage, folder, tmp_path / "broken", alone)
            break
        except stop.Stopped:
            stops += 1
            shapes |= {len(p.name.split("_")) for p in (tmp_path / "broken" / "checkpoints").iterdir()}
        assert stops < 20
    assert stops >= (3 if stage == "ppo" else 2) or patience == 2
    assert stage != "ppo" or shapes == {2, 3}  # step_1 and step_1_2: between iterations, and in the middle of updates

    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert metrics(broken) == metrics(straight)
    if stage == "sft":  # that of the adapters, where they alone train
        assert max(row.get("lr", 0.0) for row in metrics(straight)) == pytest.approx(1e-2 if adapters else 1e-3)
    if stage == "ppo":
        assert_rates_are_of_whole_iterations(broken)
    exports = sorted(p.relative_to(straight) for p in straight.glob("*/*.safetensors"))
    assert exports == sorted(p.relative_to(broken) for p in broken.glob("*/*.safetensors"))
    for path in exports:
        one, other = load_file(straight / path), load_file(broken / path)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), path
    results = [json.loads((work / "result.json").read_text()) for work in (straight, broken)]
    for found in results:
        for name in ("seconds", "phases", "resumed_from", "exports"):
            found.pop(name, None)
    assert results[0] == results[1]
    for work in (straight, broken):
        shutil.rmtree(work)


def assert_rates_are_of_whole_iterations(work: Path) -> None:
    """Where an earlier run has sampled the rollout, this one's time says nothing of its tokens."""
    rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "time/step" in row]
    assert any("time/rollout" not in row for row in rows)
    assert all(("perf/tokens_per_sec" in row) == ("time/rollout" in row) for row in rows)
