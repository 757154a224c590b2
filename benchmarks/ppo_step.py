"""One PPO iteration of OPT-1.3B with OPT-350M reward model and critic, phase by phase, against its floor and against HF generate.

    python benchmarks/ppo_step.py --out rows.jsonl        # 16 to 1,024 prompts x (256 + 256), fixed and varied lengths
    python benchmarks/ppo_step.py --tiny                  # seconds on a CPU
    python benchmarks/ppo_step.py --model opt13b model.actor.lora.dim=64 hardware.gradient_checkpointing.actor=true

Random weights, EOS disabled, one optimizer step of actor and critic. 1,024 prompts go through 64 slots, refilled as rows end. Varied:
each response is cut at a length drawn from 16 to 256, mean 100. The floor is the least time for the same tokens on this card, from its
copy and matmul rates as measured in this run: weights and cache read once per decode step, and every forward and backward at the
matmul rate.
"""

from functools import partial

import numpy as np
import torch
from common import NEVER, Clock, Tokenizer, configure, emit, free, inputs, options, peak_gb, rates, start, tokens

from runner import flops
from runner.config.schema import Config
from runner.engine import DTYPES
from runner.rollout import graph
from runner.rollout.collect import Models, RolloutSettings, sample, score
from runner.rollout.families import network_of
from runner.rollout.record import CPU, Rollout
from runner.rollout.sampling import uniforms
from runner.rollout.stats import Stats
from runner.stages import ppo
from runner.stages.ppo_update import Progress, update

SHORTEST, MEAN = 16, 100  # of the varied responses, at most 256


def main() -> None:
    args = options(
        __doc__,
        lambda p: p.add_argument("--rounds", type=int, default=2, help="measured after one to warm up"),
        lambda p: p.add_argument("--model", help="another preset of conf/model: one row, of 64 prompts"),
    )
    sizes, length = (((4, 4), (6, 4)), 12) if args.tiny else (((64, 64), (16, 16), (128, 128), (256, 256), (1024, 64)), 256)
    print(f"copy {rates()['copy'] / 1e12:.3g} TB/s, matmul {rates()['matmul'] / 1e12:.4g} TFLOP/s, measured", flush=True)
    for size, slots in sizes[:1] if args.model else sizes:
        measure(size, slots, length, "graph", args)
    if not args.model:
        measure(*sizes[0], length, "hf", args)


def measure(size: int, slots: int, length: int, engine: str, args) -> None:
    """The rows of one batch size: fixed lengths, then varied ones, which HF generate gains nothing from."""
    micro, most = next(n for n in (32, 16, 2) if size % n == 0), length
    words = [f"model.max_prompt_tokens={length}", f"model.max_response_tokens={length}", f"ppo.rollout_batch={size}", "ppo.minibatches=1"]
    words += [f"hardware.micro_batch.{name}={n}" for name, n in (("ppo", micro), ("rollout", slots), ("score", min(size, 64)))]
    cfg = configure(args.tiny, *words, f"rollout.engine={engine}", *args.words, model=args.model)
    device = start()
    with inputs(cfg, device) as step:
        models = ppo.build(cfg, step, Tokenizer(), device)
    settings = RolloutSettings(Tokenizer.pad_token_id, NEVER, most, slots, min(size, 64), device, engine, cfg.rollout.max_mismatch)
    sizes = {name: flops.matrix_sizes(getattr(m, "module", m).hf) for name, m in vars(models).items() if m is not None}
    prompts = tokens([length] * size, 0, cfg.model.actor.shape["vocab_size"])
    for kind, limits in (("fixed", [most] * size), ("varied", varied(size, most))):
        if kind == "varied" and (engine == "hf" or args.model):
            continue
        row = {"benchmark": "ppo_step", "model": cfg.model.name, "prompts": size, "slots": slots}
        row |= {"tokens": f"{length}+{most}", "lengths": kind, "engine": engine}
        clock, stats = Clock(), Stats()
        for number in range(args.rounds + 1):
            clock.rounds.append({})
            rollout, stats = iterate(cfg, models, settings, prompts, limits, number, clock)
        emit(row | figures(clock, stats, rollout, sizes, cfg), args.out)
    del models, rollout
    free()


def varied(size: int, most: int) -> list[int]:
    """Lengths from 16 to `most` with a mean of 100: an exponential, cut."""
    least = min(SHORTEST, most // 4)
    drawn = np.random.default_rng(0).exponential(MEAN - least, size) + least
    return np.clip(drawn, least, most).astype(int).tolist()


def iterate(cfg: Config, models: Models, settings: RolloutSettings, prompts, limits, number: int, clock: Clock) -> tuple[Rollout, Stats]:
    """One iteration as runner/stages/ppo.py does it."""
    with clock.phase("rollout"), torch.no_grad():
        rollout, stats = respond(models, settings, prompts, limits, number)
    with clock.phase("scoring"), torch.no_grad():
        score(models, settings, rollout, with_values=True)
    with clock.phase("other"):
        ppo.fill_rewards(cfg, rollout, ppo.State(kl_coef=cfg.ppo.kl_coef))
    with clock.phase("update"):
        update(cfg, models, rollout, None, number, Progress(), guard=lambda **facts: None)
    return rollout, stats


def respond(models: Models, settings: RolloutSettings, prompts, limits: list[int], number: int) -> tuple[Rollout, Stats]:
    """`sample`, with a length for each response."""
    episodes = [number * len(prompts) + n for n in range(len(prompts))]
    if settings.engine == "hf" or min(limits) == settings.max_response:
        return sample(models, settings, prompts, 0, episodes).to(CPU), settings.stats
    models.actor.eval()
    actor, uniform = models.actor.module, uniforms(0, episodes, settings.max_response)
    make = partial(graph.Decoder, graph.folded(network_of(actor.hf)), actor.sampling, prompts, uniform)
    decoder = make(slots=settings.rollout_micro, pad=settings.pad, eos=settings.eos, limits=limits, vocabulary=actor.vocabulary)
    return decoder.run().to(CPU), decoder.stats


def figures(clock: Clock, stats: Stats, rollout: Rollout, sizes: dict, cfg: Config) -> dict[str, float]:
    """Phases and utilisation of the median round, beside the floor."""
    phases = clock.median()
    seconds, least = sum(phases.values()), floor(rollout, sizes, DTYPES[cfg.hardware.precision].itemsize, cfg.hardware.micro_batch.rollout)
    steps, count = stats.steps or int(rollout.lengths.max()), len(rollout)
    decode = stats.decode_seconds if stats.steps else phases["rollout"]
    found = {"seconds": seconds, "seq_per_s": count / seconds, **phases, "decode_ms_per_token": 1e3 * decode / steps}
    found |= {"floor": sum(least.values()), "times_floor": seconds / sum(least.values()), **{f"floor_{k}": v for k, v in least.items()}}
    found["mfu_update"] = flops.mfu(ppo.pass_flops(sizes, rollout, True), phases["update"], cfg.hardware.tflops)
    if cfg.hardware.bandwidth_gb_s and stats.steps:
        read = flops.decode_bytes(sizes["actor"], stats.steps, stats.cached, DTYPES[cfg.hardware.precision].itemsize)
        found["mbu"] = flops.mbu(read, stats.decode_seconds, cfg.hardware.bandwidth_gb_s)
    return found | {"peak_gb": peak_gb(), "copy_tb_s": rates()["copy"] / 1e12, "matmul_tflops": rates()["matmul"] / 1e12}


def floor(rollout: Rollout, sizes: dict[str, flops.MatrixSizes], itemsize: int, slots: int) -> dict[str, float]:
    """The least seconds of each phase for the tokens of this rollout."""
    prompts, responses = rollout.prompt_lengths.numpy(), rollout.lengths.numpy()
    whole, rate = prompts + responses, rates()
    steps = max(float(responses.max()), responses.sum() / slots)
    cached = float((responses * prompts + responses * (responses - 1) / 2).sum())
    ref = sizes.get("ref", sizes["actor"])  # under adapters the actor without them
    reading = flops.forward(ref, whole, float(responses.sum())) + sum(flops.forward(sizes[n], whole) for n in ("critic", "reward"))
    return {
        "decode": flops.decode_bytes(sizes["actor"], steps, cached, itemsize) / rate["copy"],
        "prefill": flops.forward(sizes["actor"], prompts) / rate["matmul"],
        "scoring": reading / rate["matmul"],
        "update": ppo.pass_flops(sizes, rollout, True) / rate["matmul"],
    }


if __name__ == "__main__":
    main()
