"""Copies between CPU and device that do not wait."""

from collections.abc import Callable

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device) -> Tensor:
    """A copy on the device without waiting: pinned memory is copied while kernels run."""
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=device.type == "cuda")


def fetch(*tensors: Tensor) -> Callable[[], list[Tensor]]:
    """Copies, on the CPU, of what tensors hold at this point of the queue. Only a call of what this returns waits for them."""
    if not tensors[0].is_cuda:
        values = [x.clone() for x in tensors]
        return lambda: values
    copies = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) for x in tensors]
    done = torch.cuda.Event()
    done.record()

    def wait() -> list[Tensor]:
        done.synchronize()
        return copies

    return wait
