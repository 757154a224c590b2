"""Pairs of a chosen and a rejected response: what reward model and DPO count, log and evaluate in the same way."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from runner import flops, ranks
from runner.data.batches import pick, shard, subset
from runner.metrics import RunLog

# Rows of pairs, None for empty slots -> scores of the chosen (B,) and of the rejected (B,)
Score = Callable[[list[dict | None]], tuple[Tensor, Tensor]]


# --- an optimizer step ------------------------------------------------------------------------------------------------


def counted(micros: list[dict], packed: bool, sizes: flops.MatrixSizes, reference: flops.MatrixSizes | None = None) -> dict[str, float]:
    """Sums over this rank's micro batches: real tokens, tokens whose logits are made, positions computed, and the FLOPs of training.

    packed: no padding is computed. reference: the work of a frozen model that reads the batch too, if there is one.
    """
    lengths = torch.cat([batch["mask"].sum(dim=1).view(2, -1)[:, batch["pair_rows"]].flatten() for batch in micros])
    logits = float(sum(len(batch.get("targets", ())) for batch in micros))
    spent = flops.training(sizes, lengths, logits) + (flops.forward(reference, lengths, logits) if reference else 0.0)
    tokens = float(lengths.sum())
    slots = tokens if packed else float(sum(batch["ids"].numel() for batch in micros))
    return {"tokens": tokens, "logits": logits, "slots": slots, "flops": spent}


def tally(sums: dict[str, Tensor], loss: Tensor, chosen: Tensor, rejected: Tensor) -> None:
    """Add the loss and the scores of a micro batch's pairs (N,) to the sums of the optimizer step."""
    wins = torch.heaviside(chosen - rejected, chosen.new_tensor(0.5))  # a tie is half a win
    found = {"loss": loss, "correct": wins.sum(), "chosen": chosen.sum(), "rejected": rejected.sum()}
    for name, value in found.items():
        sums[name] = sums.get(name, 0.0) + value.detach()


def averages(sums: dict[str, float], pairs: int) -> dict[str, float]:
    """Metrics of an optimizer step, from the sums over its pairs."""
    mean = {name: sums[name] / pairs for name in ("loss", "correct", "chosen", "rejected")}
    metrics = {"train/loss": mean["loss"], "train/accuracy": mean["correct"], "train/margin": mean["chosen"] - mean["rejected"]}
    metrics |= {"reward/chosen_mean": mean["chosen"], "reward/rejected_mean": mean["rejected"]}
    return metrics | {"perf/padding_fraction": 1 - sums["tokens"] / sums["slots"]}


# --- held-out pairs ---------------------------------------------------------------------------------------------------


def evaluate_pairs(model, score: Score, held, most: int, micro: int, log: RunLog, done: int) -> dict:
    """Accuracy with its interval, loss, calibration and the length baseline on held-out pairs; logged and returned. Collective."""
    with log.phase("eval"):
        model.eval()
        scored = score_pairs(score, held, most, micro)
    facts = pair_statistics(scored)
    metrics = {"eval/accuracy": facts["accuracy"], "eval/loss": facts["eval_loss"]}
    metrics |= {f"eval/accuracy/{name}": accuracy for name, (accuracy, _) in facts["accuracy_by_source"].items()}
    low, high = facts["accuracy_low"], facts["accuracy_high"]
    log.record(done, metrics, f"eval accuracy {facts['accuracy']:.3f} ({low:.3f} to {high:.3f}) on {facts['eval_pairs']} pairs")
    log.histogram(done, "eval/scores", [s for pair in scored for s in pair[:2]])
    return facts


@torch.no_grad()
def score_pairs(score: Score, held, most: int, micro: int) -> list[tuple[float, float, int, int, str]]:
    """(chosen score, rejected score, tokens of the chosen, of the rejected, source) of held-out pairs, on every rank. Collective."""
    picked, scored = held.select(subset(len(held), most)), []
    for numbers in shard(len(picked), micro, ranks.world(), ranks.rank()):
        rows = pick(picked, numbers)
        scored.append((rows, *score(rows)))
    # Only tolist() waits for the GPU
    mine = [
        (good, bad, *(len(row[name]) - row["prompt_length"] for name in ("chosen_ids", "rejected_ids")), row["source"])
        for rows, chosen, rejected in scored
        for row, good, bad in zip(rows, chosen.tolist(), rejected.tolist(), strict=True)
        if row is not None
    ]
    return [pair for part in ranks.all_gather(mine) for pair in part]


def pair_statistics(scored: list[tuple[float, float, int, int, str]]) -> dict:
    """Statistics of held-out pairs; see `score_pairs` for the fields."""
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
        "chosen_mean": float(good.mean()),
        "rejected_mean": float(bad.mean()),
        "chosen_tokens": float(np.mean([p[2] for p in scored])),
        "longer_is_better": float(longer.mean()),
        # Pairs of which one of the two knows more than the other: what the summary's sign test needs
        "beats_longer": int((wins > longer).sum()),
        "loses_to_longer": int((wins < longer).sum()),
        "accuracy_by_source": {str(s): [float(wins[sources == s].mean()), int((sources == s).sum())] for s in np.unique(sources)},
        "calibration": calibration(good - bad),
    }


def wilson_interval(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927): stays inside [0, 1] for small n."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, z * z
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)  # rounding aside they are inside


def calibration(margins: np.ndarray, bins: int = 5) -> list[dict]:
    """How often the model is right, by how sure it is: confidence is sigmoid(|margin|), in equal bins from 0.5 to 1."""
    # A tie is half right, as in the accuracy
    confidence, right = 1 / (1 + np.exp(-np.abs(margins))), (margins > 0) + 0.5 * (margins == 0)
    bin_of = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    return [
        {"confidence": float(confidence[bin_of == b].mean()), "accuracy": float(right[bin_of == b].mean()), "n": int((bin_of == b).sum())}
        for b in range(bins)
        if (bin_of == b).any()
    ]
