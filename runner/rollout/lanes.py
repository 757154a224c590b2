"""The state of a batch that is being decoded, on the device: where each lane is, and what has been sampled."""

from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from runner.device import send


@dataclass
class Lanes:
    """The rows of a batch. A resting lane has position -1, writes to a row that is thrown away, and keeps its slot."""

    tokens: Tensor  # (B,) newest token, not in the cache yet
    positions: Tensor  # (B,) its position
    steps: Tensor  # (B,) response tokens so far
    rows: Tensor  # (B,) number of the response
    states: Tensor  # (B,) how much of a stop string its newest tokens are (stops.py)
    slots: Tensor  # (B,) its place in the cache

    @staticmethod
    def resting(size: int, nobody: int, device: torch.device) -> "Lanes":
        """nobody: the row that is thrown away."""
        zeros, slots = (make(size, device=device) for make in (partial(torch.zeros, dtype=torch.long), torch.arange))
        return Lanes(zeros, zeros - 1, zeros.clone(), zeros + nobody, zeros.clone(), slots)

    def first(self, size: int) -> "Lanes":
        return Lanes(*(getattr(self, f.name)[:size] for f in fields(self)))

    def put(self, lanes: list[int], **values: list[int]) -> None:
        """Set fields of some lanes, without waiting for the GPU."""
        where, *columns = send(torch.tensor([lanes, *values.values()]), self.tokens.device)
        for name, column in zip(values, columns, strict=True):
            getattr(self, name)[where] = column

    def awake_first(self) -> None:
        """Move resting lanes to the end. In place: graphs hold these addresses."""
        order = (self.positions < 0).int().argsort(stable=True)
        for f in fields(self):
            getattr(self, f.name).copy_(getattr(self, f.name)[order])


@dataclass
class Responses:
    """What has been sampled. One row more than there are prompts, for resting lanes to write to."""

    tokens: Tensor  # (N + 1, R)
    logprobs: Tensor  # (N + 1, R)
    lengths: Tensor  # (N + 1,)
    ended: Tensor  # (N + 1,) bool
    stopped: Tensor  # (N + 1,) bool: at a stop string
    limits: Tensor  # (N + 1,) tokens at most
    nobody: int  # N

    @staticmethod
    def empty(count: int, most: int, limits: list[int] | None, device: torch.device) -> "Responses":
        new = partial(torch.zeros, device=device)
        tokens, lengths = (new(shape, dtype=torch.long) for shape in ((count + 1, most), (count + 1,)))
        limits = torch.tensor([*(limits or [most] * count), most], device=device)
        ended, stopped = (new(count + 1, dtype=torch.bool) for _ in range(2))
        return Responses(tokens, new(count + 1, most), lengths, ended, stopped, limits, count)
