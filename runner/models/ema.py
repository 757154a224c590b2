"""An exponential moving average of the trained weights, kept in fp32.

In bf16, with a decay of 0.992, updates are below half a unit in the last place: the average would never move.
Under ZeRO-3 each rank averages its own pieces.
"""

from contextlib import contextmanager

import torch
from torch import Tensor, nn

from runner.durable.shards import Shard, local_shard, republish


class Ema:
    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.names = [n for n, p in model.named_parameters() if p.requires_grad]
        self.live = [p for p in model.parameters() if p.requires_grad]
        self.restart()

    def restart(self) -> None:
        """Start from the current weights."""
        self.shadow = [self._local(p).float().clone() for p in self.live]

    @staticmethod
    def _local(parameter: nn.Parameter) -> Tensor:
        """What this rank holds of a parameter: all of it, or its ZeRO-3 piece."""
        return getattr(parameter, "ds_tensor", parameter).detach()

    @torch.no_grad()
    def update(self) -> None:
        for shadow, parameter in zip(self.shadow, self.live, strict=True):
            shadow.lerp_(self._local(parameter).float().to(shadow.device), 1 - self.decay)

    @contextmanager
    def swapped_in(self):
        """Inside this block the model has the averaged weights, for export; afterwards its own again, bit for bit."""
        own = [self._local(p).clone() for p in self.live]
        self._write(self.shadow)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.live, values, strict=True):
            self._local(parameter).copy_(value)
        republish(self.live)

    def shards(self) -> list[Shard]:
        """The averages as checkpoints keep them."""
        return [local_shard(*each) for each in zip(self.names, self.live, self.shadow, strict=True)]
