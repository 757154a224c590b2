"""Supervised fine-tuning: the actor learns to answer as the demonstrations do. Loss on response tokens, EOS included."""

import math
from pathlib import Path

import numpy as np
import torch

from runner import engine, flops, ranks
from runner.config.schema import Config
from runner.data import cache
from runner.data.batches import EMPTY, loss_weights, pick, sft_batch, shard, subset
from runner.deepspeed_config import engine_configs
from runner.device import send
from runner.durable.checkpoint import Checkpoints
from runner.formatting import num
from runner.losses import sft_loss
from runner.metrics import RunLog
from runner.schedules import is_due, lr_share, warmup_steps
from runner.stages import invariants
from runner.stages.build import Inputs, batches_for, load_actor, tokenizer_for
from runner.stages.export import export
from runner.watch.finite import check_finite, numbered


def train(cfg: Config, inputs: Inputs, log: RunLog, device: torch.device) -> None:
    """Train the actor and export it to <step folder>/model."""
    sft, part = cfg.sft, cfg.model.actor

    # 1. Data
    tokenizer = tokenizer_for(cfg, part, inputs.tokenizer)
    rows, held, counts = cache.load(Path(inputs.data))
    lengths, prompts = np.asarray(rows["length"]), np.asarray(rows["prompt_length"])
    weights = loss_weights(lengths, prompts, sft.prompt_loss)
    predictions = loss_weights(lengths, prompts, float(sft.prompt_loss > 0))
    micro = cfg.hardware.micro_batch.sft

    # 2. The actor in its engine. The seed and the number of an optimizer step fix its rows
    ds_config = engine_configs(cfg, "sft")["actor"]
    checkpointing = cfg.hardware.gradient_checkpointing.actor
    wrapper = load_actor(cfg, inputs.base, tokenizer, ds_config, dropout=sft.dropout, lora=part.lora, checkpointing=checkpointing)
    options = {"weight_decay": sft.weight_decay, "betas": sft.betas, "eps": sft.eps}
    actor = engine.trainable(wrapper, ds_config, lr=sft.lr, lora_lr=sft.lora_lr, **options)
    batches = batches_for(cfg, "sft", lengths, wrapper.pads_nothing)
    total = batches.steps(sft.epochs, sft.max_steps)

    # 3. Resume from the newest checkpoint, if there is one
    sizes = flops.matrix_sizes(wrapper.hf)
    checkpoints = Checkpoints(inputs.folder, inputs.key, cfg, {"actor": actor}, log)
    first, state, _ = checkpoints.restore()
    log.begin(first, total)
    watch = invariants.WeightWatch(log, {"actor": actor}, {}, warmup_steps(sft.warmup, total) + 2)
    tokens_seen = state.get("num_tokens", 0)

    def evaluate(done: int) -> dict[str, float]:
        with log.phase("eval"):
            found = evaluate_loss(actor, held, sft.eval_examples, micro, tokenizer.pad_token_id, device)
        log.record(done, {f"eval/{k}": v for k, v in found.items()}, f"eval perplexity {num(found['perplexity'])}")
        return found

    before = state.get("before") or evaluate(0)

    # 4. One optimizer step per turn
    for s in range(first, total):
        engine.set_learning_rate(actor, lr_share(s, total, sft.lr_schedule, sft.warmup, sft.lr_end))
        here = batches.rows(s)
        here = here[here != EMPTY]
        weight = float(weights[here].sum())
        loss_sum = torch.zeros((), device=device)
        with log.phase("data"):
            micros = [sft_batch(pick(rows, n), tokenizer.pad_token_id, sft.prompt_loss) for n in batches.micro_batches(s)]
        with log.phase("train"):
            actor.train()
            for batch in micros:
                logprobs, _ = actor(batch["ids"], batch["mask"], batch["index"], batch["targets"])
                loss = sft_loss(logprobs, send(batch["weights"], device))
                engine.backward(actor, loss, weight, last=batch is micros[-1])
                loss_sum += loss.detach()
            norm = engine.step(actor)
        done, tokens = s + 1, int(lengths[here].sum())
        tokens_seen += tokens
        slots = float(sum(batch["ids"].numel() for batch in micros))
        sums = ranks.all_reduce_sum({"loss": loss_sum, "slots": slots}, device)
        loss = sums["loss"] / weight
        metrics = {
            "train/loss": loss,
            "lr": engine.learning_rate(actor),
            "grad_norm": norm,
            "num_tokens": tokens_seen,
            "epoch": done / batches.per_epoch,
            "perf/padding_fraction": 0.0 if wrapper.packed else 1 - tokens / sums["slots"],
        }
        check_finite(cfg, inputs.folder, inputs.stage, done, loss, norm, numbered(rows, here), tokenizer)
        log.log(done, metrics, f"loss {loss:.3f}", tokens, flops.training(sizes, lengths[here], float(predictions[here].sum())))
        watch(done)

        # 5. Evaluate if due; save if due, and stop if someone asked for it
        score = None
        if is_due(sft.eval_every, done, total):
            score = -evaluate(done)["loss"]
        checkpoints.after(done, total, {"before": before, "num_tokens": tokens_seen}, score)
    checkpoints.finish()

    # 6. Export, and the facts for the summary
    after = evaluate(total)
    with log.phase("export"):
        export(cfg, inputs.folder, wrapper, tokenizer, part.lora, best=lambda: checkpoints.load_best(-after["loss"]))
    facts = {f"{k}_before": v for k, v in before.items()} | {f"{k}_after": v for k, v in after.items()}
    log.result({"steps": total, "data": counts, "tokens": tokens_seen, **facts})


@torch.no_grad()
def evaluate_loss(actor, held, most: int, micro: int, pad: int, device: torch.device) -> dict[str, float]:
    """Loss per response token and perplexity on held-out dialogues. Collective."""
    actor.eval()
    chosen = held.select(subset(len(held), most))
    sums = {"loss": torch.zeros((), device=device), "tokens": torch.zeros((), device=device)}
    for numbers in shard(len(chosen), micro, ranks.world(), ranks.rank()):
        batch = sft_batch(pick(chosen, numbers), pad, prompt_loss=0.0)
        logprobs, _ = actor(batch["ids"], batch["mask"], batch["index"], batch["targets"])
        weights = send(batch["weights"], device)
        sums["loss"] += sft_loss(logprobs, weights)
        sums["tokens"] += weights.sum()
    found = ranks.all_reduce_sum(sums, device)
    loss = found["loss"] / found["tokens"]
    return {"loss": loss, "perplexity": math.exp(min(loss, 50))}
