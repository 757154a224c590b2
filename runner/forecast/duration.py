"""Seconds per step: arithmetic, at the shares of the data sheet's rates that this runner reached on an H200 (benchmarks/RESULTS.md), plus
communication between GPUs, as if it never overlapped with arithmetic.

Responses count at maximum length. Left out: evaluations, checkpoints, start-up, and what ZeRO-3 gathers of frozen models.
"""

import math

from runner import flops
from runner.batch_sizes import PROBE, micro_positions, step_batch
from runner.config.schema import Config
from runner.forecast.memory import itemsize, samples_whole, slots
from runner.forecast.sizes import trained

# Shares of the data sheet's rates: of arithmetic in training and scoring, of memory bandwidth in decoding
MATMUL, BANDWIDTH = 0.45, 0.6
# Share of the links between GPUs: an all-reduce of 1 GiB over four H100s reached 355 of 450 GB/s
LINKS = 0.75
# Seconds per layer when the GPU waits for kernel launches: a decode step of ours, one of transformers' generate, and forward plus
# backward of a micro batch
DECODE_LAUNCHES, GENERATE_LAUNCHES, TRAIN_LAUNCHES = 55e-6, 600e-6, 2.5e-3
# Seconds per parameter of an optimizer step on the CPU, transfers included (OPT-6.7B on an H100's host)
CPU_STEP = 0.5e-9


def why_no_time(cfg: Config) -> str | None:
    """Why the time cannot be estimated, and what to type; None if it can."""
    h = cfg.hardware
    if not h.tflops:
        return "hardware.tflops=0: type the card's rate"
    if h.precision == "fp32":
        return "hardware.precision=fp32: hardware.tflops is the rate of half precision"
    if h.offload.params:
        return "hardware.offload.params=true: how fast weights come out of CPU memory has not been measured"
    if h.world_size > 1 and not h.link_gb_s:
        return "hardware.link_gb_s=0: type the rate at which a GPU receives from the others"
    return None


def step_seconds(cfg: Config, stage: str, prompt: float, response: float) -> float | None:
    """Seconds of one optimizer step (PPO: iteration) for sequences of these mean lengths. None if unknown (`why_no_time`)."""
    if why_no_time(cfg):
        return None
    batch, length = step_batch(cfg, stage), prompt + response
    if stage == "sft":
        return _training(cfg, stage, "actor", batch, length, response)
    if stage == "reward":
        return _training(cfg, stage, "critic", 2 * batch, length, response)
    if stage == "dpo":  # the reference reads the pairs too
        (net, lora), pairs = trained(cfg, "actor"), [length] * 2 * batch
        read = flops.forward(net.matrix_sizes(lora), pairs, len(pairs) * response)
        return _training(cfg, stage, "actor", len(pairs), length, response) + read / _rate(cfg)
    ppo, actor_batch = cfg.ppo, batch * (2 if cfg.ppo.ptx_coef else 1)
    update = _training(cfg, stage, "actor", actor_batch, length, response) + _training(cfg, stage, "critic", batch, length, response)
    return _sampling(cfg, prompt, response) + _scoring(cfg, length, response) + ppo.ppo_epochs * ppo.minibatches * update


def _training(cfg: Config, stage: str, engine: str, rows: int, length: float, response: float) -> float:
    """An optimizer step of one model: arithmetic, or kernel launches if they take longer; an optimizer on the CPU; communication."""
    h, (net, lora) = cfg.hardware, trained(cfg, engine)
    sizes, lengths = net.matrix_sizes(lora), [length] * rows
    at_once = micro_positions(cfg, stage) * h.world_size * (2 if stage in ("reward", "dpo") else 1)
    micros = math.ceil(sum(lengths) / at_once)
    again = flops.forward(sizes, lengths) if getattr(h.gradient_checkpointing, engine) else 0.0
    busy = (flops.training(sizes, lengths, 0.0 if net.scalar else rows * response) + again) / _rate(cfg)
    on_the_cpu = CPU_STEP * net.trained(lora) / h.world_size if h.offload.optimizer else 0.0
    return max(busy, micros * net.layers * TRAIN_LAUNCHES) + on_the_cpu + _sending(cfg, _exchanged(cfg, engine, micros))


def _exchanged(cfg: Config, engine: str, micros: int) -> float:
    """Bytes that GPUs exchange in an optimizer step: gradients and updated weights. ZeRO-2 reduces gradients after each micro batch; ZeRO-3
    also gathers the weights, for forward, recomputation and backward."""
    net, lora = trained(cfg, engine)
    weights, gradients, stage = net.weights * itemsize(cfg), net.trained(lora) * itemsize(cfg), getattr(cfg.hardware.zero, engine)
    if stage == 3:
        return micros * (gradients + weights * (3 if getattr(cfg.hardware.gradient_checkpointing, engine) else 2))
    return gradients * (1 + (micros if stage == 2 else 1))


def _sampling(cfg: Config, prompt: float, response: float) -> float:
    """A rollout: prefill, then decoding token by token, in batches of `slots` responses.

    If ZeRO-3 cannot fit the whole weights on each GPU, generate samples, which gathers all of them for every token.
    """
    h, rows, at_once, whole = cfg.hardware, cfg.ppo.rollout_batch, slots(cfg), samples_whole(cfg)
    net, lora = trained(cfg, "actor")
    sizes, steps = net.matrix_sizes(lora), response * math.ceil(rows / h.world_size / at_once)
    read = flops.decode_bytes(sizes, 1, at_once * (prompt + response / 2), itemsize(cfg))
    launches = DECODE_LAUNCHES if whole and cfg.rollout.engine != "hf" else GENERATE_LAUNCHES
    step = max(launches * net.layers, read / (BANDWIDTH * h.bandwidth_gb_s * 1e9) if h.bandwidth_gb_s else 0.0)
    gathered = net.weights * itemsize(cfg) * (1 if whole else steps) if h.zero.actor == 3 else 0.0
    return flops.forward(sizes, [prompt] * rows) / _rate(cfg) + steps * step + _sending(cfg, gathered)


def _scoring(cfg: Config, length: float, response: float) -> float:
    """Scoring a rollout with reference, critic and reward model, and a share of it with the actor."""
    (actor, actor_lora), (reward, reward_lora), rows = trained(cfg, "actor"), trained(cfg, "critic"), cfg.ppo.rollout_batch
    lengths, probed = [length] * rows, 1 / PROBE if cfg.rollout.max_mismatch else 1
    reading = (1 + probed) * flops.forward(actor.matrix_sizes(actor_lora), lengths, rows * response)
    return (reading + 2 * flops.forward(reward.matrix_sizes(reward_lora), lengths)) / _rate(cfg)


def _rate(cfg: Config) -> float:
    """FLOP/s of all GPUs together."""
    return MATMUL * cfg.hardware.tflops * 1e12 * cfg.hardware.world_size


def _sending(cfg: Config, count: float) -> float:
    """Seconds until each GPU has `count` bytes of which every GPU holds an equal share."""
    world = cfg.hardware.world_size
    return count * (1 - 1 / world) / (LINKS * cfg.hardware.link_gb_s * 1e9) if world > 1 else 0.0
