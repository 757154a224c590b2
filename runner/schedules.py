"""How the learning rate moves over a stage. Names are transformers' and DeepSpeed-Chat's, and mean the same curves."""

import math


def warmup_steps(warmup: float, total: int) -> int:
    """warmup: steps, or below 1 a share of total."""
    return round(warmup * total) if warmup < 1 else int(warmup)


def learning_rate(step: int, total: int, peak: float, schedule: str, warmup: float, end: float) -> float:
    """Learning rate of optimizer step `step` (counted from 0) out of `total`.

    warmup: steps, or below 1 a share of total. end: final rate as a share of the peak, for the falling schedules.
    """
    warm = warmup_steps(warmup, total)
    if schedule != "constant" and step < warm:
        return peak * (step + 1) / warm
    if schedule.startswith("constant"):
        return peak
    progress = min(max((step - warm) / max(1, total - warm), 0.0), 1.0)
    # polynomial of power 1 and cosine_with_restarts of one cycle, which is what the field runs under these names
    share = 1 - progress if schedule in ("linear", "polynomial") else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (end + (1 - end) * share)
