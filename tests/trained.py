"""Engines that have taken a few steps: what tests of the engines and of the checkpoints share."""

import random
from dataclasses import replace

import numpy as np
import torch
from tiny import PAD, predictions
from workers import update

from runner import engine
from runner.data.batches import pad
from runner.losses import sft_loss
from runner.models import full_state_dict
from runner.plan import engine_configs


def trainable(model, zero: int = 0, precision: str = "fp32", **changes):
    """An engine with micro batch 2 and 4 accumulation steps."""
    options = {"lr": 0.1, "lora_lr": 0.3, "weight_decay": 0.01, "betas": (0.9, 0.95), "eps": 1e-8} | changes
    cfg = update.configuration(1, zero)
    cfg = replace(cfg, hardware=replace(cfg.hardware, precision=precision))
    return engine.trainable(model, engine_configs(cfg, "sft")["actor"], **options)


def bits(trained) -> dict[str, torch.Tensor]:
    return full_state_dict(trained.module, torch.float32)


def train(trained, steps: int) -> float:
    """Optimizer steps on random rows, drawn from all three generators. Returns the last gradient norm."""
    trained.train()
    for _ in range(4 * steps):
        lengths = [random.randint(4, 9), *np.random.randint(4, 9, 1)]
        made = [torch.randint(3, 96, (n,)).tolist() for n in lengths]
        ids, mask = pad(made, PAD)
        logprobs, _ = trained(ids, mask, *predictions(made, ids.size(1), False))
        engine.backward(trained, sft_loss(logprobs, torch.ones_like(logprobs)), 50.0)
        norm = engine.step(trained)
    return norm
