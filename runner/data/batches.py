"""Which rows an optimizer step sees, and how they become tensors.

The rows of step s on rank r are a function of (seed, s, r): the step number is the loader's whole position, so a resumed run
continues exactly where it stopped. The rows of a global batch do not depend on the number of ranks.
"""

import math
from bisect import bisect_left

import numpy as np
import torch
from torch import Tensor

from runner.batch_sizes import batches_per_epoch, steps_of

EMPTY = -1


class Batches:
    """Shuffled global batches of row numbers, dealt to ranks and micro batches, neighbours in length together.

    Only the rows of one batch are sorted. Batches of one length each would need even less padding, but a step takes the mean over its
    tokens, and those of short rows would count several times as much: SFT ended with a higher held-out loss (benchmarks/NOTES.md).

    Args:
        lengths: tokens of each row.
        positions, packed: the most that a micro batch may have (see micro_sizes).
        drop_last: leave out the last rows of an epoch, which do not fill a batch; otherwise its last batch has empty slots (-1).
    """

    def __init__(
        self,
        lengths,
        global_batch: int,
        positions: int,
        *,
        world: int,
        rank: int,
        seed: int,
        packed: bool = False,
        drop_last: bool = False,
    ):
        self.lengths, self.seed, self.packed = np.asarray(lengths), seed, packed
        self.global_batch, self.positions, self.world, self.rank = global_batch, positions, world, rank
        self.per_epoch = batches_per_epoch(len(self.lengths), global_batch, drop_last)
        self._epoch, self._order = -1, np.empty(0)

    def steps(self, epochs: float, max_steps: int | None) -> int:
        return steps_of(self.per_epoch, epochs, max_steps)

    def rows(self, step: int) -> np.ndarray:
        """Row numbers of a global batch, the longest first, -1 in empty slots. (global_batch,)"""
        epoch, batch = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffle(epoch)
        return self._order[batch]

    def micro_batches(self, step: int) -> list[np.ndarray]:
        """Row numbers of this rank's micro batches."""
        rows = self.rows(step)
        lengths = np.where(rows == EMPTY, 0, self.lengths[rows])
        return deal(rows, lengths, self.positions, self.packed, world=self.world, rank=self.rank)

    def _shuffle(self, epoch: int) -> np.ndarray:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))[: self.per_epoch * self.global_batch]
        full = np.full(self.per_epoch * self.global_batch, EMPTY)
        full[: len(order)] = order
        batches = full.reshape(self.per_epoch, self.global_batch)
        lengths = np.where(batches == EMPTY, -1, self.lengths[batches])
        return np.take_along_axis(batches, np.argsort(-lengths, axis=1, kind="stable"), axis=1)


def deal(rows: np.ndarray, lengths: np.ndarray, positions: int, packed: bool, *, world: int, rank: int) -> list[np.ndarray]:
    """The rows of one rank out of a global batch, in its micro batches. Neighbours in length share one.

    Args: rows: the longest first; lengths: theirs. Ranks get the same number of rows and micro batches, of nearly the same lengths.
    """
    sizes = micro_sizes(lengths[::world], positions, packed)
    return np.split(rows[rank::world], np.cumsum(sizes)[:-1])


def micro_sizes(lengths: np.ndarray, positions: int, packed: bool) -> list[int]:
    """How many rows each micro batch takes: as few micro batches as possible, as even as possible.

    Args: lengths: of the rows, descending; positions: how many a micro batch may have, counted as tokens if it is packed, otherwise as
        rows times the longest.
    """
    ends = np.cumsum(lengths)

    def fill(most: int) -> list[int]:
        sizes, row = [], 0
        while row < len(lengths):
            if packed:
                fit = int(np.searchsorted(ends, ends[row] - lengths[row] + most, side="right")) - row
            else:
                fit = most // max(int(lengths[row]), 1)
            sizes.append(min(max(fit, 1), len(lengths) - row))
            row += sizes[-1]
        return sizes

    few = len(fill(positions))
    # The smallest size that does not need more of them
    return fill(bisect_left(range(positions), True, key=lambda most: len(fill(most)) <= few))


def shard(n: int, micro_batch: int, world: int, rank: int) -> list[np.ndarray]:
    """Row numbers 0..n-1 in micro batches for one rank; every rank gets the same number, with empty slots (-1) at the end."""
    slots = math.ceil(n / (micro_batch * world)) * micro_batch * world
    padded = np.concatenate([np.arange(n), np.full(slots - n, EMPTY)])
    return list(padded[rank::world].reshape(-1, micro_batch))


def subset(n: int, most: int) -> np.ndarray:
    """At most `most` row numbers out of n, always the same ones."""
    return np.sort(np.random.default_rng(0).permutation(n)[:most])


# --- from rows to tensors ---------------------------------------------------------------------------------------------


def pad(rows: list[list[int]], fill: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token lists -> ids and attention mask (B, T). An empty list becomes one masked-in PAD: attention needs a token."""
    width = max(1, max(map(len, rows)))
    # NumPy reads lists seven times as fast as torch, and most of a batch's milliseconds are spent here
    ids = np.full((len(rows), width), fill, dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        real = row or [fill]
        span = slice(width - len(real), width) if left else slice(0, len(real))
        ids[i, span] = real
        mask[i, span] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def sft_batch(rows: list[dict | None], fill: int, prompt_loss: float) -> dict[str, Tensor]:
    """SFT rows (None: empty slot) -> ids, mask (B, T); index, targets, weights (N,): the next-token predictions that count."""
    ids, mask = pad([row["input_ids"] if row else [] for row in rows], fill)
    starts = [(1 if prompt_loss else max(1, row["prompt_length"])) if row else 0 for row in rows]
    prompts, ends = ([row[name] if row else 0 for row in rows] for name in ("prompt_length", "length"))
    found = next_tokens(ids, starts, ends)
    weights = torch.where(torch.arange(ids.size(1)) < torch.tensor(prompts).unsqueeze(1), prompt_loss, 1.0)
    return {"ids": ids, "mask": mask, **found, "weights": weights.float()[found["target_mask"]]}


def next_tokens(ids: Tensor, starts: list[int], ends: list[int]) -> dict[str, Tensor]:
    """Predictions of the tokens of each row of ids (B, T) from its start up to its end: target_mask (B, T) bool, where those tokens are;
    targets (N,), the tokens, row after row; index (N,), the positions before them in the flattened (B * T)."""
    columns = torch.arange(ids.size(1))
    target_mask = (columns >= torch.tensor(starts).unsqueeze(1)) & (columns < torch.tensor(ends).unsqueeze(1))
    where = target_mask.flatten().nonzero().squeeze(1)
    return {"target_mask": target_mask, "targets": ids.flatten()[where], "index": where - 1}


def loss_weights(lengths: np.ndarray, prompts: np.ndarray, prompt_loss: float) -> np.ndarray:
    """Sum of the loss weights of each row. The very first token is never predicted."""
    responses = lengths - np.maximum(prompts, 1)
    return responses + prompt_loss * np.maximum(prompts - 1, 0)


def pair_batch(rows: list[dict | None], fill: int) -> dict[str, Tensor]:
    """Reward rows -> ids, mask (2B, T), the chosen first, then the rejected; real: numbers of the pairs that are not empty slots."""
    ids, mask = pad(_both(rows), fill)
    return {"ids": ids, "mask": mask, "pair_rows": torch.tensor([i for i, row in enumerate(rows) if row], dtype=torch.long)}


def preference_batch(rows: list[dict | None], fill: int) -> dict[str, Tensor]:
    """As `pair_batch`, with the predictions of all response tokens; see `next_tokens`."""
    batch = pair_batch(rows, fill)
    starts = 2 * [max(1, row["prompt_length"]) if row else 0 for row in rows]
    return batch | next_tokens(batch["ids"], starts, list(map(len, _both(rows))))


def _both(rows: list[dict | None]) -> list[list[int]]:
    """The token lists of pairs, empty ones for empty slots: first all chosen, then all rejected."""
    return [row[name] if row else [] for name in ("chosen_ids", "rejected_ids") for row in rows]


def pick(dataset, numbers: np.ndarray) -> list[dict | None]:
    """Rows of a memory-mapped data set; None for an empty slot."""
    return [dataset[int(n)] if n != EMPTY else None for n in numbers]
