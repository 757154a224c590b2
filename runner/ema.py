"""An exponential moving average of the trained weights, kept in fp32.

In bf16 a decay of 0.992 moves a weight by less than half a unit in its last place: the average would stay where it began.
Under ZeRO-3 each rank averages its own pieces.
"""

from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.live = [p for p in model.parameters() if p.requires_grad]
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
        """Inside this block the model has the averaged weights, for export; afterwards its own, bit for bit."""
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
        # ZeRO-3 keeps small parameters whole on every rank, and would go on reading those copies
        whole = [p for p in self.live if getattr(p, "ds_persist", False)]
        if whole:
            whole[0].partition(whole)
            whole[0].all_gather(whole)

    def state(self) -> dict[str, Tensor]:
        return {str(i): s for i, s in enumerate(self.shadow)}

    def load(self, state: dict[str, Tensor]) -> None:
        for i, shadow in enumerate(self.shadow):
            shadow.copy_(state[str(i)])
