"""Packing: the real tokens of all rows of a batch in one row, without padding.

Linear layers, norms and embeddings then see only the N real tokens of a (B, T) batch; runner/models/attention.py keeps the rows apart.
All of this is best done on the CPU, where micro batches are made: on the GPU, reading each count of tokens would wait for it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from runner.device import send


@dataclass(frozen=True)
class Layout:
    """The N real tokens of B rows, and where they are."""

    ids: Tensor  # (1, N), row after row
    positions: Tensor  # (1, N), counted from 0 in each row
    bounds: Tensor  # (B + 1,) int32: row b is bounds[b] up to bounds[b + 1]
    slots: Tensor  # (N,) in the flattened (B * longest) of rows padded on the right
    rows: int
    longest: int

    def to(self, device: torch.device) -> "Layout":
        tensors = (send(x, device) for x in (self.ids, self.positions, self.bounds, self.slots))
        return Layout(*tensors, self.rows, self.longest)

    def unpack(self, x: Tensor) -> Tensor:
        """(N, heads, D) -> (B, heads, longest, D), padded on the right with zeros."""
        if len(x) < self.rows * self.longest:
            x = x.new_zeros(self.rows * self.longest, *x.shape[1:]).index_copy(0, self.slots, x)
        return x.reshape(self.rows, self.longest, *x.shape[1:]).transpose(1, 2)

    def pack(self, x: Tensor) -> Tensor:
        """The inverse of `unpack`."""
        x = x.transpose(1, 2).flatten(0, 1)
        return x if len(x) == len(self.slots) else x.index_select(0, self.slots)


def lay_out(ids: Tensor, mask: Tensor) -> Layout:
    """Pack a batch. ids, mask (B, T), padded anywhere. On the CPU: on the GPU it would wait for it."""
    lengths, where = mask.sum(dim=1), real(mask)
    positions, longest = positions_from_mask(mask).flatten()[where], int(lengths.max())
    slots = where // mask.size(1) * longest + positions
    bounds = F.pad(lengths.cumsum(0), (1, 0)).int()
    return Layout(ids.flatten()[where].unsqueeze(0), positions.unsqueeze(0), bounds, slots, len(ids), longest)


def positions_from_mask(mask: Tensor) -> Tensor:
    """Position of each real token, counted from 0 at the first one. (B, T) -> (B, T)."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def real(mask: Tensor) -> Tensor:
    """The N real tokens as positions in the flattened mask. (B, T) -> (N,)."""
    return mask.flatten().nonzero().squeeze(1)


def among_real(mask: Tensor, index: Tensor) -> Tensor:
    """Positions of real tokens in the flattened (B * T) -> their positions among the N real tokens."""
    return (mask.flatten().cumsum(0) - 1)[index]


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """Inverse of packing for one value per real token: (N,) -> the shape of mask, 0 on padding."""
    return values.new_zeros(mask.numel()).scatter(0, send(real(mask), values.device), values).view(mask.shape)
