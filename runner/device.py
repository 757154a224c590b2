"""Copies between CPU and device that do not wait."""

from collections.abc import Callable

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device) -> Tensor:
    """A copy on the device without waiting: pinned memory is copied while kernels run."""
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=device.type == "cuda")


def fetch(tensor: Tensor) -> Callable[[], Tensor]:
    """A copy, on the CPU, of what a tensor holds at this point of the queue. Only a call of what this returns waits for it."""
    if not tensor.is_cuda:
        value = tensor.clone()
        return lambda: value
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> Tensor:
        done.synchronize()
        return copy

    return wait
