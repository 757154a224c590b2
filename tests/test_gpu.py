"""The pipeline on one CUDA device: precisions, ZeRO stages, offload, adapters. Skipped where there is none.

Most of the time processes start: make test ARGS="tests/test_gpu.py -n 6 --dist load"
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_pipeline import assert_same_weights, metrics, step_folder

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ROOT = Path(__file__).parent.parent
# Generation token by token is most of the time: short answers, and evaluations at the start and at the end only
SHORT = ["experiment=debug", "hardware=h200", "model.max_response_tokens=24", "sft.eval_every=0", "reward.eval_every=0", "ppo.eval_every=0"]
SHORT += ["dataset.max_rows=1000", "wandb.mode=disabled", "name=gpu"]
VARIANTS = {
    "bf16": [],
    "bf16-zero3-offload": [
        "hardware.zero={actor: 3, critic: 3, ref: 3, reward: 3}",
        "hardware.offload={optimizer: true, params: true, ref: true, reward: true}",
    ],
    "fp16-zero2": ["hardware.precision=fp16", "hardware.zero.actor=2", "hardware.zero.critic=2"],
    "fp16-lora": ["hardware.precision=fp16", "model.actor.lora.dim=4", "model.reward.lora.dim=4"],
    "bf16-bloom-ptx-ema": [
        "model=tiny_bloom",
        "ppo.ptx_coef=1.0",
        "ppo.ema_decay=0.9",
        "hardware.gradient_checkpointing.critic=true",
        "ppo.stop=[e]",
    ],
}
ZERO = "hardware.zero={{actor: {0}, critic: {0}, ref: {1}, reward: {1}}}"
VARIANTS_OF_TWO = {
    "zero0": [ZERO.format(0, 0)],
    "zero2-llama": [ZERO.format(2, 0), "model=tiny_llama"],
    "zero3-neox-lora": [ZERO.format(3, 3), "model=tiny_neox", "model.actor.lora.dim=4", "model.reward.lora.dim=4"],
}
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.parametrize("words", [pytest.param(words, id=name) for name, words in VARIANTS.items()])
def test_all_stages_on_the_gpu(words, tmp_path):
    train_all(words, tmp_path)


def test_dpo_on_the_gpu(tmp_path):
    """bf16 under ZeRO-3 with an offloaded reference: the first margins are 0, and there are steps after it."""
    words = [word for word in SHORT if not word.startswith(("reward.", "ppo."))]
    words += ["stage=dpo", "dpo.eval_every=0", "hardware.zero={actor: 3, critic: 0, ref: 3, reward: 0}", "hardware.offload.ref=true"]
    command = [sys.executable, str(ROOT / "run.py"), *words, "checkpoint.every=0", f"store={tmp_path}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [row for row in metrics(next(tmp_path.glob("dpo-*"))) if "train/loss" in row]
    assert len(steps) == 2 and steps[0]["train/loss"] == pytest.approx(0.6931, abs=1e-2)
    assert all(row["grad_norm"] > 0 for row in steps)


@two_gpus
@pytest.mark.parametrize("words", [pytest.param(words, id=name) for name, words in VARIANTS_OF_TWO.items()])
def test_all_stages_on_two_gpus(words, tmp_path):
    train_all(["hardware.gpus=2", "hardware.micro_batch.ppo=8", *words], tmp_path)


def train_all(words: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "run.py"), *SHORT, "checkpoint.every=0", f"store={tmp_path}"]
    done = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = next(tmp_path.glob("ppo-*"))
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first = next(s for s in steps if "val/first_ratio_error" in s)
    assert first["val/first_ratio_error"] < 0.1
    assert all(s["grad_norm/critic"] > 0 for s in steps if "grad_norm/critic" in s)
    assert json.loads((folder / "result.json").read_text())["after"]["kl"] is not None


@two_gpus
@pytest.mark.parametrize(
    ("stage", "zero", "words"),
    [
        ("sft", 0, ["sft.dropout=0"]),
        ("reward", 2, ["reward.dropout=0"]),
        ("dpo", 2, ["sft.dropout=0", "sft.max_steps=2"]),
    ],
)
def test_two_gpus_take_the_steps_of_one(stage, zero, words, tmp_path):
    """In fp32: losses and gradient norms of every step, to rounding. (ZeRO-3 makes other random weights up.)"""
    curves = []
    for gpus, sharded in ((1, 0), (2, zero)):
        words_of_run = [w for w in SHORT if not w.startswith(("sft.", "reward.", "ppo.")) and w != "experiment=debug"]
        words_of_run += [f"stage={stage}", f"{stage}.max_steps=4", *words, f"store={tmp_path}/{gpus}"]
        words_of_run += ["hardware.precision=fp32", f"hardware.gpus={gpus}", ZERO.format(sharded, 0)]
        done = subprocess.run(
            [sys.executable, str(ROOT / "run.py"), *words_of_run], cwd=tmp_path, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stdout + done.stderr
        lines = metrics(step_folder(tmp_path / str(gpus), stage))
        curves.append([line[name] for line in lines for name in ("train/loss", "grad_norm", "eval/loss") if name in line])
    one, two = curves
    assert len(one) >= 8
    assert two == pytest.approx(one, rel=2e-3)


def test_an_overflow_of_one_engine_stops_both(tmp_path):
    """fp16 with infinite gradients in the critic alone: the actor's step is skipped too."""
    script = Path(__file__).parent / "workers" / "overflow.py"
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "both skipped" in done.stdout


# The stages of a run, its words, and what each stage exports
CHAINS = {
    "ppo": (
        ["sft.max_steps=20", "reward.max_steps=20", "ppo.max_steps=6", "ppo.ema_decay=0.9"],
        {"sft": ["model"], "reward": ["model"], "ppo": ["model", "critic", "model_ema"]},
    ),
    "dpo": (
        ["stage=dpo", "sft.max_steps=20", "dpo.max_steps=20", "dpo.eval_every=0"],
        {"sft": ["model"], "dpo": ["model"]},
    ),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_a_run_that_is_stopped_in_every_stage_is_the_same_bit_for_bit(chain, tmp_path):
    """With deterministic kernels: the same metrics and exports as of a run that nobody stopped."""
    special, exports = CHAINS[chain]
    words = [word for word in SHORT if word.split(".")[0] not in {"sft", "reward", "ppo"} - exports.keys()]
    words += [*special, "hardware.deterministic=true"]

    def start(store: Path) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), *words, f"store={store}", f"hydra.run.dir={store}/run"], cwd=tmp_path
        )

    straight, broken = tmp_path / "straight", tmp_path / "broken"
    undisturbed = start(straight)  # beside the other one: a process takes half a minute to start
    for stage in exports:
        with start(broken) as started:
            while started.poll() is None and not list(broken.glob(f"{stage}-*/checkpoints/step_*/manifest.json")):
                time.sleep(0.01)
            started.send_signal(signal.SIGTERM)
        assert started.returncode == 75
        assert not list(broken.glob(f"{stage}-*/DONE"))
    assert start(broken).wait(280) == 0
    assert undisturbed.wait(280) == 0
    for stage, parts in exports.items():
        one, other = step_folder(straight, stage), step_folder(broken, stage)
        assert metrics(one) == metrics(other)
        for part in parts:
            assert_same_weights(one / part, other / part)
