"""How the learning rate moves over a stage (names are transformers', and mean the same curves), and how far the KL coefficient may."""

import math

# How far the controller of the KL coefficient goes at most, as a share of it, in ppo.kl_horizon responses (arXiv 1909.08593)
KL_STEP = 0.2

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")


def warmup_steps(warmup: float, total: int) -> int:
    """warmup: steps, or below 1 a share of total."""
    return round(warmup * total) if warmup < 1 else int(warmup)


def lr_share(step: int, total: int, schedule: str, warmup: float, end: float) -> float:
    """Learning rate of optimizer step `step` (counted from 0) out of `total`, as a share of its peak.

    warmup: steps, or below 1 a share of total. end: final share, for the schedules that fall.
    """
    warm = warmup_steps(warmup, total)
    if schedule != "constant" and step < warm:
        return (step + 1) / warm
    if schedule.startswith("constant"):
        return 1.0
    progress = min(max((step - warm) / max(1, total - warm), 0.0), 1.0)
    fallen = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return end + (1 - end) * fallen


def is_due(every: int, done: int, total: int) -> bool:
    """Whether to evaluate after `done` of `total` steps: each `every` of them (0: never), but not after the last, when all stages do."""
    return bool(every) and done % every == 0 and done < total
