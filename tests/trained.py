"""Engines that have taken a few steps: what tests of the engines and of the checkpoints share."""

import os
import random
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tiny import PAD, predictions
from workers import update

from runner import engine
from runner.config.schema import Offload
from runner.data.batches import pad
from runner.deepspeed_config import engine_configs
from runner.losses import sft_loss
from runner.models.saving import full_state_dict


def trainable(model, zero: int = 0, precision: str = "fp32", offload: bool = False, **changes):
    """An engine with micro batch 2 and 4 accumulation steps. offload: of optimizer states and, under ZeRO-3, parameters."""
    options = {"lr": 0.1, "lora_lr": 0.3, "weight_decay": 0.01, "betas": (0.9, 0.95), "eps": 1e-8} | changes
    cfg = update.configuration(1, zero)
    moved = Offload(optimizer=offload, params=offload and zero == 3, ref=False, reward=False)
    cfg = replace(cfg, hardware=replace(cfg.hardware, precision=precision, offload=moved))
    return engine.trainable(model, engine_configs(cfg, "sft")["actor"], **options)


def bits(trained) -> dict[str, torch.Tensor]:
    return full_state_dict(trained.module, torch.float32)


def train(trained, steps: int) -> float:
    """Optimizer steps on random rows, drawn from all three generators. Returns the last gradient norm."""
    trained.train()
    for n in range(4 * steps):
        lengths = [random.randint(4, 9), *np.random.randint(4, 9, 1)]
        made = [torch.randint(3, 96, (n,)).tolist() for n in lengths]
        ids, mask = pad(made, PAD)
        logprobs, _ = trained(ids, mask, *predictions(made, ids.size(1), False))
        engine.backward(trained, sft_loss(logprobs, torch.ones_like(logprobs)), 50.0, last=n % 4 == 3)
        if n % 4 == 3:
            norm = engine.step(trained)
    return norm


def run_worker(script: str, folder: Path, *words: str) -> None:
    """Run one of tests/workers/, which start ranks of their own, with its output in <folder>/ranks.log."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, script, str(folder), *words]
    with (folder / "ranks.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(timeout=280)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the ranks too, if they hang
    assert code == 0, (folder / "ranks.log").read_text()[-5000:]
