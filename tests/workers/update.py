"""Optimizer steps of every stage, for comparison: the same work on any number of ranks, under any ZeRO stage.

`python update.py <folder> <world> ...` runs groups of `world` ranks, one group after the other. tests/test_engine.py prepares the
folder and compares <folder>/<world>x<zero>.pt, what `updates` returns. Ranks are forked: they share the seconds that imports take.
"""

import json
import os
import socket
import sys
import traceback
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from safetensors.torch import load_file
from tiny import EOS, PAD, causal, classifier, configured, rows

from runner import engine, ranks
from runner.config.schema import SHARES, Config, Dpo, ZeroStages
from runner.metrics import RunLog
from runner.models.ema import Ema
from runner.models.saving import full_state_dict
from runner.rollout.collect import Models, RolloutSettings, collect, response_logprobs
from runner.rollout.record import Rollout
from runner.stages import dpo, ppo, ppo_update, reward, sft
from runner.stages.build import Inputs

# So large that AdamW's step is smooth in the gradient: with a small one, a gradient of rounding noise moves a weight as far as any other
EPS = "1.0"
ZERO_STAGES = (0, 2, 3)
LENGTHS = [9, 4, 17, 6, 12, 3, 8, 21, 5, 7, 10]
PROMPTS = rows([5, 2, 9, 6, 3, 7, 4, 8], seed=3)
RESPONSES = [1, 9, 3, 2, 6, 4, 8, 5]


def configuration(world: int, zero: int) -> Config:
    """Global batch 8, micro batch 2 of up to 27 tokens: on 1, 2 and 4 ranks up to 4, 2 and 1 micro batches are accumulated."""
    overrides = [f"hardware.micro_batch.{name}=2" for name in ("sft", "reward", "dpo", "ppo", "rollout", "score")]
    # Vectors stay whole under ZeRO-3, matrices are partitioned. Its buckets of 4 GB are never given back, and a process of many
    # engines could then no longer fork
    buckets = {"stage3_param_persistence_threshold": 64, "reduce_bucket_size": 100_000}
    overrides += [f"+hardware.deepspeed.zero_optimization.{key}={value}" for key, value in buckets.items()] + ["hardware.logits_chunk=8"]
    for stage, lr in (("sft", "lr"), ("reward", "lr"), ("ppo", "actor_lr")):
        overrides += [f"{stage}.eps={EPS}", f"{stage}.{lr}=1.0", f"{stage}.warmup=0", f"{stage}.lr_schedule=constant"]
    overrides += [f"{stage}.{limit}" for stage in ("sft", "reward") for limit in ("global_batch=8", "max_steps=2")]
    overrides += ["sft.dropout=0", "sft.prompt_loss=0.5", "sft.weight_decay=0.1"]
    overrides += ["ppo.critic_lr=2.0", "ppo.rollout_batch=16", "ppo.minibatches=2"]
    cfg = configured("model.max_prompt_tokens=17", "model.max_response_tokens=10", "wandb.mode=disabled", "ppo.ptx_coef=0.5", *overrides)
    frozen = 3 if zero == 3 else 0
    # stage=ppo has no such block. A beta at which the margins of these random texts neither vanish nor saturate
    shared = {f.name: getattr(cfg.reward, f.name) for f in fields(cfg.reward) if f.name in Dpo.__dataclass_fields__}
    cfg = replace(cfg, dpo=Dpo(**shared | {"beta": 0.1, "label_smoothing": 0.1}))
    return replace(cfg, hardware=replace(cfg.hardware, gpus=world, zero=ZeroStages(zero, zero, frozen, frozen)))


def prepare(folder: Path, tokenizer) -> None:
    """Checkpoints with a smaller vocabulary than the tokenizer's, and tokenised data of uneven lengths."""
    causal("opt", vocab=256, scale=0.1).save_pretrained(folder / "actor")
    classifier("opt", vocab=256, scale=0.1).save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "tokenizer")
    texts, others = rows(LENGTHS), rows(LENGTHS[::-1], seed=1)
    demonstrations = [{"input_ids": ids, "prompt_length": n // 3, "length": n} for ids, n in zip(texts, LENGTHS, strict=True)]
    pairs = [
        {"chosen_ids": a, "rejected_ids": b, "prompt_length": 1, "length": max(len(a), len(b)), "source": "toy"}
        for a, b in zip(texts, others, strict=True)
    ]
    turns = json.dumps([{"role": "user", "content": "?"}])
    prompts = [{"input_ids": ids, "length": len(ids), "turns": turns} for ids in rows(list(range(3, 19)))]
    for stage, made, held in (("sft", demonstrations, 3), ("reward", pairs, 3), ("ppo", prompts, 8)):
        store(folder / "data" / stage, made, made[:held])


def store(folder: Path, train: list[dict], held: list[dict]) -> None:
    """A cache folder as runner/data/cache.py writes it."""
    from datasets.arrow_writer import ArrowWriter

    folder.mkdir(parents=True)
    for name, part in (("train", train), ("eval", held)):
        with ArrowWriter(path=str(folder / f"{name}.arrow")) as writer:
            for row in part:
                writer.write(row)
            writer.finalize()
    (folder / "counts.json").write_text("{}")


def inputs(folder: Path, stage: str, work: Path) -> Inputs:
    actor, critic = str(folder / "actor"), str(folder / "reward")
    return Inputs(
        folder=work,
        stage=stage,
        key="",
        parents={"sft": actor, "reward": critic},
        tokenizer=str(folder / "tokenizer"),
        base=critic if stage == "reward" else actor,
        data=str(folder / "data" / SHARES[stage]),
        ptx=str(folder / "data" / "sft"),
    )


def fixed_rollout() -> Rollout:
    """Eight responses of 1 to 9 tokens. Old log-probabilities near the actor's, so that some ratios are clipped and some are not."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.full((8, 9), PAD)
    for i, row in enumerate(PROMPTS):
        prompts[i, 9 - len(row) :] = torch.tensor(row)
    lengths = torch.tensor(RESPONSES)
    mask = torch.arange(9) < lengths.unsqueeze(1)
    responses = torch.randint(3, 96, (8, 9), generator=generator) * mask
    rollout = Rollout(prompts, torch.tensor([len(p) for p in PROMPTS]), responses, lengths, torch.ones(8, dtype=torch.bool))
    rollout.logprobs = (-5.8 + 0.3 * torch.randn(8, 9, generator=generator)) * mask
    for name in ("values", "advantages", "returns"):
        setattr(rollout, name, torch.randn(8, 9, generator=generator) * mask)
    return rollout


def flat(state: dict[str, Tensor]) -> Tensor:
    """All weights in one vector. The output matrix is the embedding again."""
    names = [name for name in sorted(state) if name != "lm_head.weight"]
    return torch.cat([state[name].double().flatten() for name in names]) if names else torch.empty(0)


def weights(trained) -> Tensor:
    """The engine's weights, on rank 0."""
    return flat(full_state_dict(trained.module, torch.float32))


def updates(folder: Path, zero: int, device: torch.device) -> dict:
    """What each stage makes of the same weights and data: vectors of weights, and numbers that were logged."""
    cfg, found = configuration(ranks.world(), zero), {}
    for stage, train in (("sft", sft.train), ("reward", reward.train), ("dpo", dpo.train)):
        work = folder / f"{stage}-{ranks.world()}x{zero}"
        work.mkdir(exist_ok=True)
        step = inputs(folder, stage, work)
        train(cfg, step, RunLog(cfg, stage, work, {}, device), device)
        if ranks.rank() == 0:
            lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
            names = ("train/loss", "grad_norm", "eval/loss", "train/accuracy", "reward/chosen_mean")
            found[f"{stage}/metrics"] = torch.tensor([line[name] for line in lines for name in names if name in line])
            found[stage] = flat(load_file(work / "model" / "model.safetensors"))
    return found | ppo_results(cfg, folder, device)


def ppo_results(cfg: Config, folder: Path, device: torch.device) -> dict:
    """A rollout, one minibatch with ptx text on a fixed rollout, and the average of the weights before and after it."""
    step = inputs(folder, "ppo", folder)
    tokenizer = ppo.tokenizer_for(cfg, cfg.model.actor, step.tokenizer)
    models: Models = ppo.build(cfg, step, tokenizer, device)
    found = {"actor/before": weights(models.actor), "critic/before": weights(models.critic)}
    settings = RolloutSettings(PAD, EOS, 10, 2, 2, device)
    for name, value in vars(collect(models, settings, PROMPTS, seed=5, episodes=list(range(8)))).items():
        if value is not None:
            found[f"rollout/{name}"] = value

    ema = Ema(models.actor.module, decay=0.75)
    models.actor.train(), models.critic.train()
    for one in (models.actor, models.critic):
        engine.set_learning_rate(one, 1.0)
    text = ppo_update.Mixture(cfg, step.ptx, PAD, packed=False).at(0)
    sums, norms = ppo_update.minibatch(cfg, models, fixed_rollout(), np.array([3, 1, 7, 0, 2, 6, 4, 5]), text, train_actor=True)
    found["ppo/sums"] = torch.tensor(list(ranks.all_reduce_sum(sums, device).values()))
    found["ppo/norms"] = torch.tensor([norms[n] for n in sorted(norms)])
    found |= {"actor": weights(models.actor), "critic": weights(models.critic)}
    ema.update()
    found["logprobs/own"] = own_logprobs(models)
    with ema.swapped_in():
        found["ema"] = weights(models.actor)
    found["logprobs/again"] = own_logprobs(models)
    return found


@torch.no_grad()
def own_logprobs(models: Models) -> Tensor:
    return response_logprobs(models.actor, fixed_rollout())[0]


def all_updates(folder: Path):
    """The work of one rank: every ZeRO stage in turn."""

    def run(device: torch.device) -> None:
        for zero in ZERO_STAGES:
            found = updates(folder, zero, device)
            if ranks.rank() == 0:
                torch.save(found, folder / f"{ranks.world()}x{zero}.pt")

    return run


def rank(work, world: int, number: int, port: int) -> None:
    """The whole life of one rank."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    work(ranks.start("cpu"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def fork(work, world: int) -> bool:
    """Start `world` ranks that have all imports behind them already, let each do work(device), and wait. Returns whether all went well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for number in range(world):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            rank(work, world, number, port)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    return all([os.waitpid(child, 0)[1] == 0 for child in children])


if __name__ == "__main__":
    torch.set_num_threads(1)
    engine.skip_cpu_op_builds()
    folder = Path(sys.argv[1])
    configuration(1, 0)
    import torch._inductor.compile_fx  # DeepSpeed's ZeRO would, four seconds in each rank

    sys.exit(0 if all(fork(all_updates(folder), int(world)) for world in sys.argv[2:]) else 1)
