"""Attention without padding on one CUDA device, in bf16, against padded rows and fp32. In one process, in seconds."""

import pytest
import torch
from tiny import NAMES, PAD, causal, classifier, family, predictions, rows
from torch.nn.attention import SDPBackend, sdpa_kernel

from runner.data.batches import pad
from runner.models import attention
from runner.models.packing import lay_out
from runner.models.wrappers import Actor, Scalar

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = "cuda"
ROWS = rows([70, 33, 101, 5])
EVEN = rows([128, 128, 128])
every_family = pytest.mark.parametrize("name", NAMES)


def results(name: str, implementation: str, dtype: torch.dtype, rows=ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of all next tokens, and the gradient of their weighted sum, in one vector."""
    model = Actor(causal(name, scale=0.05, attention=implementation), family(name), 64).to(DEVICE, dtype)
    ids, mask = pad(rows, PAD, left=True)
    logprobs, _ = model(ids, mask, *predictions(rows, ids.size(1), left=True))
    weights = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(1))
    (logprobs * weights.to(DEVICE)).sum().backward()
    return logprobs.detach(), torch.cat([p.grad.float().flatten() for p in model.parameters()])


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("kernel, rows", [("_flash", ROWS), ("_cudnn", EVEN)], ids=["flash", "cudnn"])
@every_family
def test_packed_rows_in_bf16_are_as_near_to_fp32_as_padded_ones(name, kernel, rows, monkeypatch):
    """Forward and backward, through flash attention, or cuDNN's where it is faster; BLOOM through the kernel that takes a bias and keeps no
    matrix of scores."""
    if kernel == "_cudnn" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("cuDNN is used on Hopper alone")
    calls, real = [], getattr(attention, kernel)
    monkeypatch.setattr(attention, kernel, lambda *a: calls.append(1) or real(*a))
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        packed = results(name, "packed", torch.bfloat16, rows)
    assert len(calls) == (0 if name == "bloom" else 2)
    exact, padded = results(name, "eager", torch.float32, rows), results(name, "eager", torch.bfloat16, rows)
    for found, other, reference in zip(packed, padded, exact, strict=True):
        assert distance(found, reference) < max(2 * distance(other, reference), 1e-3)
        assert distance(found, reference) < 0.1


@pytest.mark.parametrize("heads, width", [((4, 4), 64), ((4, 1), 64), ((5, 5), 80), ((8, 2), 128)], ids=str)
def test_rows_of_one_length_get_the_same_attention_from_cudnn(heads, width):
    """As from flash attention, gradients too, also where heads share keys, and where the three are parts of one product."""
    at = lay_out(torch.zeros(3, 256, dtype=torch.long), torch.ones(3, 256, dtype=torch.long)).to(torch.device(DEVICE))
    joint = torch.randn(3 * 256, heads[0] + 2 * heads[1], width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.randn(3 * 256, heads[0], width, device=DEVICE, dtype=torch.bfloat16)
    found = []
    for kernel in (attention._flash, attention._cudnn):
        out = kernel(*joint.split([heads[0], heads[1], heads[1]], dim=1), at, width**-0.5)
        found.append((out, *torch.autograd.grad(out, joint, weights)))
    for flash, cudnn in zip(*found, strict=True):
        assert cudnn.shape == flash.shape and distance(cudnn.float(), flash.float()) < 0.01


@every_family
def test_packed_rows_in_fp32_equal_padded_ones(name):
    for found, expected in zip(results(name, "packed", torch.float32), results(name, "eager", torch.float32), strict=True):
        assert distance(found, expected) < 1e-3


@every_family
def test_nothing_waits_for_the_gpu(name):
    """Batches are laid out on the CPU: not one length is read back, forward or backward."""
    actor = Actor(causal(name), family(name), 64).to(DEVICE, torch.bfloat16)
    critic = Scalar(classifier(name), family(name)).to(DEVICE, torch.bfloat16)
    ids, mask = pad(ROWS, PAD, left=True)
    where = predictions(ROWS, ids.size(1), left=True)

    def step() -> None:
        logprobs, entropies = actor(ids, mask, *where, with_entropy=True)
        (logprobs.sum() + critic(ids, mask).float().sum() + entropies.sum()).backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
