"""How many sequences an optimizer step takes, how they divide over ranks and micro batches, and what sampling reads at a time. No torch."""

import math

from runner.config.schema import Config
from runner.errors import UserError

# Prompt tokens per prefill
PREFILL_TOKENS = 16384
# The trainer rereads every PROBE-th row of a rollout, to check that it agrees with the sampler
PROBE = 8


def batches_per_epoch(rows: int, batch: int, drop_last: bool) -> int:
    """drop_last: leave out the last rows, which do not fill a batch."""
    return rows // batch if drop_last else math.ceil(rows / batch)


def steps_of(per_epoch: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps (PPO: iterations) of a whole stage."""
    steps = max(1, math.ceil(round(epochs * per_epoch, 6))) if per_epoch else 0  # 0.55 * 100 is a little more than 55
    return steps if max_steps is None else min(steps, max_steps)


def step_batch(cfg: Config, stage: str) -> int:
    """Sequences (reward, dpo: pairs) per optimizer step over all ranks."""
    return cfg.ppo.rollout_batch // cfg.ppo.minibatches if stage == "ppo" else getattr(cfg, stage).global_batch


def micro_batch(cfg: Config, stage: str) -> int:
    """Sequences (pairs) of maximum length in a micro batch: what the machine can take, or a rank's whole share of an optimizer step."""
    return min(getattr(cfg.hardware.micro_batch, stage), max(step_batch(cfg, stage) // cfg.hardware.world_size, 1))


def accumulation(cfg: Config, stage: str) -> int:
    """Micro batches per optimizer step and rank, at most: global batch = micro batch x ranks x accumulation, exactly.

    Shorter rows are packed into fewer of them (`micro_positions`).

    Raises UserError, with what to type, when it does not divide.
    """
    micro, world, batch = micro_batch(cfg, stage), cfg.hardware.world_size, step_batch(cfg, stage)
    if batch % (micro * world) == 0:
        return batch // (micro * world)
    name = "ppo.rollout_batch / ppo.minibatches" if stage == "ppo" else f"{stage}.global_batch"
    key, factor = ("ppo.rollout_batch", cfg.ppo.minibatches) if stage == "ppo" else (name, 1)
    if micro < getattr(cfg.hardware.micro_batch, stage):
        up = -(-batch // world) * world * factor
        raise UserError(f"{name} = {batch} does not divide over {world} ranks. Type {key}={up}")
    up = -(-batch // (micro * world)) * micro * world * factor
    fits = [m for m in range(min(micro, batch), 0, -1) if batch % (m * world) == 0]
    other = f", or hardware.micro_batch.{stage}={fits[0]}" if fits else ""
    raise UserError(
        f"{name} = {batch} does not divide into micro batches: hardware.micro_batch.{stage} = {micro} on {world} "
        f"rank{'s' * (world > 1)} makes {micro * world} per accumulation step. Type {key}={up}{other}"
    )


def micro_positions(cfg: Config, stage: str) -> int:
    """Tokens of a micro batch, at most: `micro_batch` rows of maximum length, or more rows that are shorter."""
    return micro_batch(cfg, stage) * (cfg.model.max_prompt_tokens + cfg.model.max_response_tokens)


def fits_whole(weights: float, free: float) -> bool:
    """Whether sampling under ZeRO-3 gathers all weights once: only if that leaves half of the GPU's free memory for the cache. In bytes."""
    return 2 * weights < free
