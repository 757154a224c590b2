"""Seconds of a step: its work, at the shares of the data sheet's rates that this runner reached on an H200 (benchmarks/RESULTS.md).

Responses are as long as they may be. Evaluations, checkpoints, start-up and communication between GPUs are left out.
"""

import math

from runner import flops
from runner.batch_sizes import micro_positions, step_batch
from runner.config import Config, Lora
from runner.forecast.memory import itemsize, slots
from runner.forecast.network import Network, networks

# Shares of the data sheet's rates: matrix products of training and scoring, reading of decoding
MATMUL, BANDWIDTH = 0.45, 0.6
# Seconds that launches take where the GPU waits for them, per layer: of a decode step of ours and of transformers' generate, and of
# forward and backward of a micro batch
DECODE_LAUNCHES, GENERATE_LAUNCHES, TRAIN_LAUNCHES = 75e-6, 600e-6, 2.5e-3
# Seconds of an optimizer step on the host's CPU, per parameter, with the way there and back (OPT-6.7B on an H100's host)
CPU_STEP = 0.5e-9
# Share of a rollout that the trainer reads again (runner/rollout/collect.py)
PROBED = 1 / 8


def step_seconds(cfg: Config, stage: str, prompt: float, response: float) -> float | None:
    """Of one optimizer step, or of one iteration of PPO, for sequences of these mean lengths.

    None where nobody knows: without the card's rates (which are of half precision), or with weights that wait in CPU memory.
    """
    h, (actor, reward) = cfg.hardware, networks(cfg)
    if not h.tflops or h.precision == "fp32" or h.offload.params:
        return None
    rate = MATMUL * h.tflops * 1e12 * h.world_size

    def training(engine: str, rows: int) -> float:
        net, lora = (actor, cfg.model.actor.lora) if engine == "actor" else (reward, cfg.model.reward.lora)
        lengths, logits = [prompt + response] * rows, 0.0 if net.scalar else rows * response
        work = net.work(lora)
        again = flops.forward(work, lengths) if getattr(h.gradient_checkpointing, engine) else 0.0
        at_once = micro_positions(cfg, stage) * h.world_size * (2 if stage in ("reward", "dpo") else 1)
        micros = math.ceil(sum(lengths) / at_once)
        busy = (flops.training(work, lengths, logits) + again) / rate
        return max(busy, micros * net.layers * TRAIN_LAUNCHES) + _offloaded(cfg, net, lora)

    batch = step_batch(cfg, stage)
    if stage in ("sft", "reward"):
        return training("actor", batch) if stage == "sft" else training("critic", 2 * batch)
    if stage == "dpo":  # the reference reads the pairs too
        pairs, work = [prompt + response] * 2 * batch, actor.work(cfg.model.actor.lora)
        return training("actor", len(pairs)) + flops.forward(work, pairs, len(pairs) * response) / rate
    ppo, rows = cfg.ppo, cfg.ppo.rollout_batch
    update = ppo.ppo_epochs * ppo.minibatches * (training("actor", batch * (2 if ppo.ptx_coef else 1)) + training("critic", batch))
    whole, work = [prompt + response] * rows, actor.work(cfg.model.actor.lora)
    reading = (1 + PROBED) * flops.forward(work, whole, rows * response) + 2 * flops.forward(reward.work(cfg.model.reward.lora), whole)
    return update + reading / rate + _sampling(cfg, actor, prompt, response, rate)


def _offloaded(cfg: Config, net: Network, lora: Lora) -> float:
    return CPU_STEP * net.trained(lora) / cfg.hardware.world_size if cfg.hardware.offload.optimizer else 0.0


def _sampling(cfg: Config, actor: Network, prompt: float, response: float, rate: float) -> float:
    """Seconds of a rollout: prompts are read, then tokens follow one by one, in batches of as many responses as there are slots."""
    h, rows, at_once = cfg.hardware, cfg.ppo.rollout_batch, slots(cfg)
    work, steps = actor.work(cfg.model.actor.lora), response * math.ceil(rows / h.world_size / at_once)
    read = flops.decode_bytes(work, 1, at_once * (prompt + response / 2), itemsize(cfg))
    launches = GENERATE_LAUNCHES if cfg.rollout.engine == "hf" else DECODE_LAUNCHES
    step = max(launches * actor.layers, read / (BANDWIDTH * h.bandwidth_gb_s * 1e9) if h.bandwidth_gb_s else 0.0)
    return flops.forward(work, [prompt] * rows) / rate + steps * step
