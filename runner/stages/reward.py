"""Reward model: one score per dialogue, higher for chosen than for rejected responses (Bradley-Terry on the last real token)."""

from functools import partial
from pathlib import Path

import numpy as np
import torch

from runner import engine, flops, ranks
from runner.config.schema import Config
from runner.data import cache
from runner.data.batches import EMPTY, pair_batch, pick
from runner.deepspeed_config import engine_configs
from runner.device import send
from runner.durable.checkpoint import Checkpoints
from runner.losses import pairwise_loss
from runner.metrics import RunLog
from runner.schedules import is_due, lr_share, warmup_steps
from runner.stages import invariants
from runner.stages.build import Inputs, batches_for, load_reward, tokenizer_for
from runner.stages.export import export
from runner.stages.pairs import averages, counted, evaluate_pairs, tally
from runner.watch.finite import check_finite, numbered


def train(cfg: Config, inputs: Inputs, log: RunLog, device: torch.device) -> None:
    """Train the reward model and export it to <step folder>/model."""
    rm, part = cfg.reward, cfg.model.reward

    # 1. Data
    tokenizer = tokenizer_for(cfg, part, inputs.tokenizer)
    rows, held, counts = cache.load(Path(inputs.data))
    lengths = np.asarray(rows["length"])
    micro = cfg.hardware.micro_batch.reward

    # 2. The model in its engine
    ds_config = engine_configs(cfg, "reward")["reward"]
    checkpointing = cfg.hardware.gradient_checkpointing.critic
    wrapper = load_reward(
        cfg, inputs.base, tokenizer, ds_config, dropout=rm.dropout, lora=part.lora, fresh_head=True, checkpointing=checkpointing
    )
    options = {"weight_decay": rm.weight_decay, "betas": rm.betas, "eps": rm.eps}
    model = engine.trainable(wrapper, ds_config, lr=rm.lr, lora_lr=rm.lora_lr, **options)
    batches = batches_for(cfg, "reward", lengths, wrapper.pads_nothing)
    total = batches.steps(rm.epochs, rm.max_steps)

    # 3. Resume from the newest checkpoint, if there is one
    sizes = flops.matrix_sizes(wrapper.hf)
    checkpoints = Checkpoints(inputs.folder, inputs.key, cfg, {"reward": model}, log)
    first, _, _ = checkpoints.restore()
    log.begin(first, total)
    watch = invariants.WeightWatch(log, {"reward": model}, {}, warmup_steps(rm.warmup, total) + 2)

    def score_batch(pairs: list[dict | None]) -> tuple[torch.Tensor, torch.Tensor]:
        return last_scores(model, pair_batch(pairs, tokenizer.pad_token_id))

    evaluate = partial(evaluate_pairs, model, score_batch, held, rm.eval_examples, micro, log)

    # 4. One optimizer step per turn
    for s in range(first, total):
        engine.set_learning_rate(model, lr_share(s, total, rm.lr_schedule, rm.warmup, rm.lr_end))
        here = batches.rows(s)
        pairs = int((here != EMPTY).sum())
        with log.phase("data"):
            micros = [pair_batch(pick(rows, n), tokenizer.pad_token_id) for n in batches.micro_batches(s)]
            sums = counted(micros, wrapper.packed, sizes)
        with log.phase("train"):
            model.train()
            for batch in micros:
                chosen, rejected = last_scores(model, batch)
                real = send(batch["pair_rows"], device)
                loss = pairwise_loss(chosen[real], rejected[real], rm.center_coef)
                engine.backward(model, loss, pairs, last=batch is micros[-1])
                tally(sums, loss, chosen[real], rejected[real])
            norm = engine.step(model)
        done = s + 1
        whole = ranks.all_reduce_sum(sums, device)
        metrics = averages(whole, pairs) | {"lr": engine.learning_rate(model), "grad_norm": norm}
        check_finite(cfg, inputs.folder, inputs.stage, done, metrics["train/loss"], norm, numbered(rows, here), tokenizer)
        headline = f"loss {metrics['train/loss']:.3f}  accuracy {metrics['train/accuracy']:.2f}"
        log.log(done, metrics, headline, whole["tokens"], whole["flops"])
        watch(done)

        # 5. Evaluate if due; save if due, and stop if someone asked for it
        score = None
        if is_due(rm.eval_every, done, total):
            score = evaluate(done)["accuracy"]
        checkpoints.after(done, total, {}, score)
    checkpoints.finish()

    # 6. Export, and the facts for the summary
    facts = evaluate(total)
    with log.phase("export"):
        export(cfg, inputs.folder, wrapper, tokenizer, part.lora, best=lambda: checkpoints.load_best(facts["accuracy"]))
    log.result({"steps": total, "data": counts, **facts})


def last_scores(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the last real tokens of a pair batch: chosen (B,), rejected (B,)."""
    values = model(batch["ids"], batch["mask"])
    last = batch["mask"].sum(dim=1, keepdim=True) - 1
    return values.gather(1, send(last, values.device)).squeeze(1).chunk(2)
