"""Training that goes on with other numbers of ranks and other ZeRO stages than it began with.

`python resize.py <folder>` walks through CHAINS: one group of ranks takes two optimizer steps and saves, the next restores and takes
two more. tests/test_checkpoint.py compares <folder>/<chain>.pt with four steps in one go. PPO does so too, with an odd number of
held-out prompts. Ranks are forked, as in update.py.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from workers.update import configuration, fork, inputs, weights

from runner import engine, ranks
from runner.batch_sizes import micro_positions
from runner.data import cache
from runner.data.batches import Batches, loss_weights, pick, sft_batch
from runner.deepspeed_config import engine_configs
from runner.durable.checkpoint import Checkpoints
from runner.losses import sft_loss
from runner.metrics import RunLog
from runner.models.ema import Ema
from runner.stages import ppo
from runner.stages.build import load_actor, tokenizer_for

# (ranks, ZeRO stage) of the first two steps, and of the last two
CHAINS = [((2, 1), (1, 1)), ((4, 2), (2, 2)), ((1, 2), (2, 2)), ((2, 3), (4, 3)), ((4, 3), (1, 0)), ((1, 0), (4, 1)), ((2, 3), (2, 3))]
STEPS = 2


def name(chain) -> str:
    return "-".join(f"{world}x{zero}" for world, zero in chain)


def train(folder: Path, work: Path, zero: int, begin: int, last: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Optimizer steps from the newest checkpoint, at `begin`, to `last`. Returns weights and their averages, on rank 0."""
    work.mkdir(exist_ok=True)
    cfg, step = configuration(ranks.world(), zero), inputs(folder, "sft", work)
    tokenizer, ds_config = tokenizer_for(cfg, cfg.model.actor, step.tokenizer), engine_configs(cfg, "sft")["actor"]
    actor = load_actor(cfg, step.base, tokenizer, ds_config, dropout=0.0, lora=None)
    trained = engine.trainable(actor, ds_config, lr=1.0, lora_lr=1.0, weight_decay=0.1, betas=(0.9, 0.95), eps=1.0)
    average = Ema(trained.module, 0.5)
    saver = Checkpoints(work, "key", cfg, {"actor": trained}, RunLog(cfg, "sft", work, {}, device), average)
    first, _, _ = saver.restore()
    assert first == begin, f"{work} begins at {first}"

    rows, _, _ = cache.load(Path(step.data))
    lengths, prompts = np.asarray(rows["length"]), np.asarray(rows["prompt_length"])
    batches = Batches(lengths, 8, micro_positions(cfg, "sft"), world=ranks.world(), rank=ranks.rank(), seed=1)
    trained.train()
    for s in range(first, last):
        here = batches.rows(s)
        total = float(loss_weights(lengths, prompts, 0.5)[here[here >= 0]].sum())
        micros = batches.micro_batches(s)
        for numbers in micros:
            batch = sft_batch(pick(rows, numbers), tokenizer.pad_token_id, 0.5)
            logprobs, _ = trained(batch["ids"], batch["mask"], batch["index"], batch["targets"])
            engine.backward(trained, sft_loss(logprobs, batch["weights"]), total, last=numbers is micros[-1])
        engine.step(trained)
        average.update()
    saver.save(f"step_{last}", last, {})
    saver.finish()
    found = weights(trained)
    with average.swapped_in():
        return found, weights(trained)


# (folder, ranks, half, iterations, ppo.eval_prompts): the first goes on with one rank more and other prompts to evaluate on
CALIBRATED = [("ppo", 1, 0, 1, 7), ("ppo", 2, 1, 2, 3), ("ppo_on_2", 2, 0, 1, 3)]


def iterate(folder: Path, work: Path, iterations: int, eval_prompts: int, device: torch.device) -> None:
    """PPO up to so many iterations, from the newest checkpoint. Five prompts are for calibration."""
    work.mkdir(exist_ok=True)
    cfg, prompts = configuration(ranks.world(), 0), {"eval_prompts": eval_prompts, "calibration_prompts": 5}
    small = {"rollout_batch": 8, "max_steps": iterations, "eval_every": 0, "ptx_coef": 0.0, "actor_lr": 1e-3, "critic_lr": 1e-3}
    cfg = replace(cfg, ppo=replace(cfg.ppo, **small, **prompts), checkpoint=replace(cfg.checkpoint, every=1))
    ppo.train(cfg, inputs(folder, "ppo", work), RunLog(cfg, "ppo", work, {}, device), device)


def segments(folder: Path, half: int):
    """The work of one rank in the first or second half of all chains that have as many ranks there."""

    def run(device: torch.device) -> None:
        for chain in CHAINS:
            world, zero = chain[half]
            if world == ranks.world():
                work = folder / name(chain)
                found = train(folder, work, zero, STEPS * half, STEPS * (half + 1), device)
                if half and ranks.rank() == 0:
                    torch.save(found, folder / f"{name(chain)}.pt")
        for work, world, when, *options in CALIBRATED:
            if (world, when) == (ranks.world(), half):
                iterate(folder, folder / work, *options, device)

    return run


if __name__ == "__main__":
    torch.set_num_threads(1)
    engine.skip_cpu_op_builds()
    folder = Path(sys.argv[1])
    configuration(1, 0)
    import torch._inductor.compile_fx  # DeepSpeed's ZeRO would, four seconds in each rank

    sys.exit(0 if all(fork(segments(folder, half), world) for half in (0, 1) for world in (1, 2, 4)) else 1)
