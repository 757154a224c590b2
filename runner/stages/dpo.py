"""DPO (arXiv 2305.18290): the SFT actor learns from pairs directly, without a reward model and without sampling.

The implicit reward of a response is beta * (log actor - log reference), summed over its tokens, EOS included; the reference is the frozen
SFT actor. Dropout is off in both, so that all margins start at 0.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runner import engine, flops, ranks
from runner.config.schema import Config
from runner.data import cache
from runner.data.batches import EMPTY, pick, preference_batch
from runner.deepspeed_config import engine_configs
from runner.device import send
from runner.durable.checkpoint import Checkpoints
from runner.losses import dpo_loss
from runner.metrics import RunLog
from runner.models.packing import spread
from runner.schedules import is_due, lr_share, warmup_steps
from runner.stages import invariants
from runner.stages.build import Inputs, batches_for, load_actor, load_reference, tokenizer_for
from runner.stages.export import export
from runner.stages.pairs import averages, counted, evaluate_pairs, tally
from runner.watch.finite import check_finite, numbered


def train(cfg: Config, inputs: Inputs, log: RunLog, device: torch.device) -> None:
    """Train the actor on the reward model's pairs and export it to <step folder>/model."""
    dpo, part = cfg.dpo, cfg.model.actor

    # 1. Data
    tokenizer = tokenizer_for(cfg, part, inputs.tokenizer)
    rows, held, counts = cache.load(Path(inputs.data))
    lengths, micro = np.asarray(rows["length"]), cfg.hardware.micro_batch.dpo

    # 2. The actor in its engine, and its reference
    configs = engine_configs(cfg, "dpo")
    args = {"dropout": 0.0, "lora": replace(part.lora, dropout=0.0), "checkpointing": cfg.hardware.gradient_checkpointing.actor}
    wrapper = load_actor(cfg, inputs.parents["sft"], tokenizer, configs["actor"], **args)
    options = {"weight_decay": dpo.weight_decay, "betas": dpo.betas, "eps": dpo.eps}
    actor = engine.trainable(wrapper, configs["actor"], lr=dpo.lr, lora_lr=dpo.lora_lr, **options)
    ref = load_reference(cfg, inputs.parents["sft"], tokenizer, configs.get("ref", {}), device)
    sizes = flops.matrix_sizes(wrapper.hf)
    ref_sizes = flops.matrix_sizes(ref.hf) if ref else replace(sizes, body=sizes.body - sizes.body_trained)  # without its adapters
    batches = batches_for(cfg, "dpo", lengths, wrapper.pads_nothing)
    total = batches.steps(dpo.epochs, dpo.max_steps)

    # 3. Resume from the newest checkpoint, if there is one
    checkpoints = Checkpoints(inputs.folder, inputs.key, cfg, {"actor": actor}, log)
    first, state, _ = checkpoints.restore()
    log.begin(first, total)
    watch = invariants.WeightWatch(log, {"actor": actor}, {"ref": ref} if ref else {}, warmup_steps(dpo.warmup, total) + 2)

    def score_batch(pairs: list[dict | None]) -> tuple[Tensor, Tensor]:
        batch = preference_batch(pairs, tokenizer.pad_token_id)
        return implicit_rewards(actor, batch, reference_logprobs(actor, ref, batch), dpo.beta)

    evaluate = partial(evaluate_pairs, actor, score_batch, held, dpo.eval_examples, micro, log)
    before = state.get("before") or evaluate(0)

    # 4. One optimizer step per turn
    for s in range(first, total):
        engine.set_learning_rate(actor, lr_share(s, total, dpo.lr_schedule, dpo.warmup, dpo.lr_end))
        here = batches.rows(s)
        pairs = int((here != EMPTY).sum())
        with log.phase("data"):
            micros = [preference_batch(pick(rows, n), tokenizer.pad_token_id) for n in batches.micro_batches(s)]
            sums = counted(micros, wrapper.packed, sizes, ref_sizes) | {"margin_error": 0.0}
        with log.phase("reference"):
            actor.eval()
            known = [reference_logprobs(actor, ref, batch) for batch in micros]
        with log.phase("train"):
            actor.train()
            for batch, ref_logprobs in zip(micros, known, strict=True):
                chosen, rejected = implicit_rewards(actor, batch, ref_logprobs, dpo.beta)
                # A micro batch of empty slots still takes part in the collective backward
                real = send(batch["pair_rows"], device)
                loss = dpo_loss(chosen[real], rejected[real], dpo.label_smoothing)
                engine.backward(actor, loss, pairs, last=batch is micros[-1])
                tally(sums, loss, chosen[real], rejected[real])
                sums["margin_error"] += (chosen.detach().abs() + rejected.detach().abs()).sum() / dpo.beta
            norm = engine.step(actor)
        done = s + 1
        whole = ranks.all_reduce_sum(sums, device)
        if s == 0:
            findings = {"first_margin": invariants.first_margin(whole["margin_error"] / whole["logits"], cfg.hardware.precision)}
            invariants.check(log, "step 1", findings)
        metrics = averages(whole, pairs) | {"lr": engine.learning_rate(actor), "grad_norm": norm}
        check_finite(cfg, inputs.folder, inputs.stage, done, metrics["train/loss"], norm, numbered(rows, here), tokenizer)
        headline = f"loss {metrics['train/loss']:.3f}  accuracy {metrics['train/accuracy']:.2f}  margin {metrics['train/margin']:.2f}"
        log.log(done, metrics, headline, whole["tokens"], whole["flops"])
        watch(done)

        # 5. Evaluate if due; save if due, and stop if someone asked for it
        score = None
        if is_due(dpo.eval_every, done, total):
            score = evaluate(done)["accuracy"]
        checkpoints.after(done, total, {"before": before}, score)
    checkpoints.finish()

    # 6. Export, and the facts for the summary
    facts = evaluate(total)
    with log.phase("export"):
        export(cfg, inputs.folder, wrapper, tokenizer, part.lora, best=lambda: checkpoints.load_best(facts["accuracy"]))
    facts |= {f"{name}_before": before[name] for name in ("accuracy", "eval_loss")}
    facts |= {f"{name}_logratio": facts[f"{name}_mean"] / dpo.beta for name in ("chosen", "rejected")}
    log.result({"steps": total, "data": counts, **facts})


def response_logprobs(actor, batch: dict[str, Tensor]) -> Tensor:
    """Log-probability of every response, EOS included: the chosen, then the rejected. (2B,), 0 for empty slots."""
    logprobs, _ = actor(batch["ids"], batch["mask"], batch["index"], batch["targets"])
    return spread(logprobs, batch["target_mask"]).sum(dim=1)


@torch.no_grad()
def reference_logprobs(actor, ref, batch: dict[str, Tensor]) -> Tensor:
    """`response_logprobs` of the reference."""
    model, context = engine.reference(actor, ref)
    with context:
        return response_logprobs(model, batch)


def implicit_rewards(actor, batch: dict[str, Tensor], ref_logprobs: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta * (log actor - log reference) of the responses: chosen (B,), rejected (B,)."""
    return (beta * (response_logprobs(actor, batch) - ref_logprobs)).chunk(2)
