"""Log-probabilities of chosen tokens as Triton kernels: logits are read once, and once more for their gradient, and never copied.

In plain torch (losses.py) the same takes eight passes, half of them in fp32: at OPT-1.3B a fiftieth of an SFT step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tokens of the vocabulary that a program holds at one time
BLOCK = 2048


def chosen(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits (N, V), tokens (N,) -> log-probabilities, entropies and logsumexps (N,), fp32."""
    logprobs, entropies, normalisers = torch.empty(3, len(tokens), device=logits.device).unbind()
    _chosen[(len(tokens),)](logits, tokens, logprobs, entropies, normalisers, logits.size(1), BLOCK=BLOCK, num_warps=8)
    return logprobs, entropies, normalisers


def gradient(logits: Tensor, tokens: Tensor, normalisers: Tensor, of_logprobs: Tensor) -> Tensor:
    """The gradient of the logits from that of the log-probabilities (N,)."""
    out = torch.empty_like(logits)
    grid = len(tokens), triton.cdiv(logits.size(1), BLOCK)
    _gradient[grid](logits, tokens, normalisers, of_logprobs.contiguous(), out, logits.size(1), BLOCK=BLOCK, num_warps=4)
    return out


@triton.jit
def _chosen(logits, tokens, logprobs, entropies, normalisers, vocabulary, BLOCK: tl.constexpr):
    """Each lane keeps a softmax of its own, of every BLOCK-th token, until the end."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    # Finite, so that a lane without a token has weight 0 and not nan
    most = tl.full((BLOCK,), -1e30, tl.float32)
    weight = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocabulary
        x = tl.load(logits + column, mask=inside, other=0.0).to(tl.float32)
        higher = tl.where(inside, tl.maximum(most, x), most)
        fade, share = tl.exp(most - higher), tl.where(inside, tl.exp(x - higher), 0.0)
        weight = weight * fade + share
        moment = moment * fade + share * x
        most = higher
    top = tl.max(most, axis=0)
    scale = tl.exp(most - top)
    total = tl.sum(weight * scale, axis=0)
    normaliser = top + tl.log(total)
    token = tl.load(tokens + row)
    tl.store(logprobs + row, tl.load(logits + token).to(tl.float32) - normaliser)
    tl.store(entropies + row, normaliser - tl.sum(moment * scale, axis=0) / total)
    tl.store(normalisers + row, normaliser)


@triton.jit
def _gradient(logits, tokens, normalisers, of_logprobs, out, vocabulary, BLOCK: tl.constexpr):
    """gradient * (one at the token - softmax)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, place = column < vocabulary, row * vocabulary + column
    x = tl.load(logits + place, mask=inside, other=0.0).to(tl.float32)
    share = tl.exp(x - tl.load(normalisers + row))
    is_chosen = column == tl.load(tokens + row)
    slope = tl.load(of_logprobs + row) * (tl.where(is_chosen, 1.0, 0.0) - share)
    tl.store(out + place, slope.to(out.dtype.element_ty), mask=inside)
