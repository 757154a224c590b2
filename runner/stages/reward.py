"""Reward model: a score per dialogue, so that chosen responses beat rejected ones (Bradley-Terry on the last real token)."""

from pathlib import Path

import numpy as np
import torch

from runner import engine, flops, ranks
from runner.batch_sizes import micro_positions
from runner.config import Config
from runner.data import cache
from runner.data.batches import EMPTY, Batches, pair_batch, pick, send, shard, subset
from runner.durable.checkpoint import Checkpoints
from runner.losses import learning_rate, pairwise_loss, warmup_steps, wilson_interval
from runner.metrics import RunLog
from runner.models import save_adapter, save_model
from runner.plan import engine_configs
from runner.stages import invariants
from runner.stages.build import Inputs, load_reward, tokenizer_for
from runner.watch.finite import check_finite, numbered


def train(cfg: Config, step: Inputs, log: RunLog, device: torch.device) -> None:
    """Train the reward model and export it to <step folder>/model."""
    rm, part = cfg.reward, cfg.model.reward

    # 1. Data
    tokenizer = tokenizer_for(cfg, step.tokenizer, part.revision)
    rows, held, counts = cache.load(Path(step.data))
    lengths = np.asarray(rows["length"])
    micro = cfg.hardware.micro_batch.reward
    batches = Batches(lengths, rm.global_batch, micro_positions(cfg, "reward"), world=ranks.world(), rank=ranks.rank(), seed=cfg.seed)
    total = batches.steps(rm.epochs, rm.max_steps)

    # 2. The model in its engine
    ds_config = engine_configs(cfg, "reward")["reward"]
    checkpointing = cfg.hardware.gradient_checkpointing.critic
    wrapper = load_reward(
        cfg, step.base, tokenizer, ds_config, dropout=rm.dropout, lora=part.lora, fresh_head=True, checkpointing=checkpointing
    )
    options = {"weight_decay": rm.weight_decay, "betas": rm.betas, "eps": rm.eps}
    model = engine.trainable(wrapper, ds_config, lr=rm.lr, lora_lr=part.lora.lr, **options)

    # 3. Go on from the newest checkpoint, if there is one
    work = flops.count(wrapper.hf)
    checkpoints = Checkpoints(step.folder, step.key, cfg, {"reward": model}, log)
    first, _, _ = checkpoints.restore()
    log.begin(first, total)
    watch = invariants.watch_weights(log, {"reward": model}, {}, warmup_steps(rm.warmup, total) + 2)

    # 4. One optimizer step per turn
    for s in range(first, total):
        share = learning_rate(s, total, 1.0, rm.lr_schedule, rm.warmup, rm.lr_end)
        engine.set_learning_rate(model, share)
        here = batches.rows(s)
        pairs = int((here != EMPTY).sum())
        sums = {name: torch.zeros((), device=device) for name in ("loss", "correct", "chosen", "rejected")}
        with log.phase("data"):
            micros = [pair_batch(pick(rows, n), tokenizer.pad_token_id) for n in batches.micro_batches(s)]
            sums |= counted(micros, work)
        with log.phase("train"):
            model.train()
            for batch in micros:
                chosen, rejected = last_scores(model, batch)
                # A micro batch of empty slots still takes part in the collective backward
                real = send(batch["real"], device)
                loss = pairwise_loss(chosen[real], rejected[real], rm.center_coef) + 0.0 * chosen.sum()
                engine.backward(model, loss, pairs, last=batch is micros[-1])
                sums["loss"] += loss.detach()
                sums["correct"] += (chosen > rejected)[real].sum()
                sums["chosen"] += chosen[real].sum().detach()
                sums["rejected"] += rejected[real].sum().detach()
            norm = engine.step(model)
        done = s + 1
        whole = ranks.total(sums, device)
        mean = {name: value / pairs for name, value in whole.items()}
        metrics = {"train/loss": mean["loss"], "train/accuracy": mean["correct"], "train/margin": mean["chosen"] - mean["rejected"]}
        metrics |= {"reward/chosen_mean": mean["chosen"], "reward/rejected_mean": mean["rejected"], "lr": rm.lr * share, "grad_norm": norm}
        metrics["perf/padding_fraction"] = 0.0 if wrapper.packed else 1 - whole["tokens"] / whole["slots"]
        check_finite(cfg, step.folder, step.stage, done, mean["loss"], norm, numbered(rows, here), tokenizer)
        log.log(done, metrics, f"loss {mean['loss']:.3f}  accuracy {mean['correct']:.2f}", whole["tokens"], whole["work"])
        watch(done)

        # 5. Evaluate now and then; save, and leave if someone asked for it
        score = None
        if rm.eval_every and done % rm.eval_every == 0 and done < total:
            score = evaluation(model, held, rm.eval_examples, micro, tokenizer.pad_token_id, log, done)["accuracy"]
        checkpoints.after(done, total, {}, score)
    checkpoints.finish()

    # 6. Export, and the facts for the summary
    facts = evaluation(model, held, rm.eval_examples, micro, tokenizer.pad_token_id, log, total)
    with log.phase("export"):
        options = {"dtype": engine.DTYPES[cfg.hardware.precision], "max_new_tokens": cfg.model.max_response_tokens}
        save_model(wrapper, step.folder / "model", tokenizer, **options)
        if part.lora.dim:
            save_adapter(wrapper, step.folder / "adapter")
        if checkpoints.load_best(facts["accuracy"]):
            save_model(wrapper, step.folder / "model_best", tokenizer, **options)
    log.result({"steps": total, "data": counts, **facts})


def counted(micros: list[dict], work: flops.Work) -> dict[str, float]:
    """Real tokens of this rank's micro batches, the slots that hold them, and the FLOPs of training on them."""
    lengths = [batch["mask"].sum(dim=1).view(2, -1)[:, batch["real"]].flatten() for batch in micros]
    slots = sum(batch["ids"].numel() for batch in micros)
    return {"tokens": float(sum(n.sum() for n in lengths)), "slots": slots, "work": sum(flops.training(work, n) for n in lengths)}


def last_scores(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the last real tokens of a pair batch: chosen (B,), rejected (B,)."""
    values = model(batch["ids"], batch["mask"])
    last = batch["mask"].sum(dim=1, keepdim=True) - 1
    return values.gather(1, send(last, values.device)).squeeze(1).chunk(2)


def evaluation(model, held, most: int, micro: int, pad: int, log: RunLog, done: int) -> dict:
    """Accuracy with its interval, loss, calibration and the length baseline on held-out pairs; recorded and returned. Collective."""
    with log.phase("eval"):
        scored = score_pairs(model, held, most, micro, pad)
    facts = pair_statistics(scored)
    metrics = {"eval/accuracy": facts["accuracy"], "eval/loss": facts["eval_loss"]}
    metrics |= {f"eval/accuracy/{name}": accuracy for name, (accuracy, _) in facts["accuracy_by_source"].items()}
    low, high = facts["accuracy_low"], facts["accuracy_high"]
    log.record(done, metrics, f"eval accuracy {facts['accuracy']:.3f} ({low:.3f} to {high:.3f}) on {facts['eval_pairs']} pairs")
    log.histogram(done, "eval/scores", [s for pair in scored for s in pair[:2]])
    return facts


@torch.no_grad()
def score_pairs(model, held, most: int, micro: int, pad: int) -> list[tuple[float, float, int, int, str]]:
    """(chosen score, rejected score, chosen length, rejected length, source) of held-out pairs, on every rank. Collective."""
    model.eval()
    picked, scored = held.select(subset(len(held), most)), []
    for numbers in shard(len(picked), micro, ranks.world(), ranks.rank()):
        rows = pick(picked, numbers)
        scored.append((rows, *last_scores(model, pair_batch(rows, pad))))
    # Only now is the GPU waited for
    mine = [
        (good, bad, len(row["chosen_ids"]), len(row["rejected_ids"]), row["source"])
        for rows, chosen, rejected in scored
        for row, good, bad in zip(rows, chosen.tolist(), rejected.tolist(), strict=True)
        if row is not None
    ]
    return [pair for part in ranks.every(mine) for pair in part]


def pair_statistics(scored: list[tuple[float, float, int, int, str]]) -> dict:
    """What the scores of held-out pairs say; see `score_pairs` for the fields."""
    good, bad = np.array([p[0] for p in scored]), np.array([p[1] for p in scored])
    wins = (good > bad) + 0.5 * (good == bad)
    longer = np.array([(p[2] > p[3]) + 0.5 * (p[2] == p[3]) for p in scored])
    sources = np.array([p[4] for p in scored])
    low, high = wilson_interval(wins.sum(), len(wins))
    return {
        "accuracy": float(wins.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "eval_pairs": len(wins),
        "eval_loss": float(np.logaddexp(0, bad - good).mean()),
        "longer_is_better": float(longer.mean()),
        "accuracy_by_source": {str(s): [float(wins[sources == s].mean()), int((sources == s).sum())] for s in np.unique(sources)},
        "calibration": calibration(good - bad),
    }


def calibration(margins: np.ndarray, bins: int = 5) -> list[dict]:
    """How often the model is right against how sure it is: confidence is sigmoid(|margin|), in equal bins of 0.5 to 1."""
    confidence, right = 1 / (1 + np.exp(-np.abs(margins))), margins > 0
    bin_of = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    return [
        {"confidence": float(confidence[bin_of == b].mean()), "accuracy": float(right[bin_of == b].mean()), "n": int((bin_of == b).sum())}
        for b in range(bins)
        if (bin_of == b).any()
    ]
