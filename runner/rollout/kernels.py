"""The operations of a decode step, in plain torch; on CUDA their Triton versions take over.

product: a matrix product, whose last sum may be left to add_norm. add_norm: residual sum and norm. attend: one new token per sequence
against its cache. silu_product: the gate of LLaMA's MLP. sample: one token per row of logits. advance: update the lanes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from runner.losses import token_logprobs
from runner.rollout.lanes import Lanes, Responses
from runner.rollout.sampling import invert
from runner.rollout.stops import Stops


@dataclass
class Norm:
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    rms: bool = False


@dataclass
class Shares:
    """A product without its last sum, which is over the first dimension of `sums` (S, N, H), fp32, plus the bias (H,)."""

    sums: Tensor
    bias: Tensor | None

    def summed(self) -> Tensor:
        return self.sums.sum(0) if self.bias is None else self.sums.sum(0) + self.bias


def on_triton(x: Tensor) -> bool:
    return x.is_cuda


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | Shares:
    """x W^T + b, for add_norm. x (N, K), weight (H, K)."""
    if on_triton(x):
        from runner.rollout import triton_kernels

        if (sums := triton_kernels.product_shares(x, weight)) is not None:
            return Shares(sums, bias)
    return F.linear(x, weight, bias)


def add_norm(x: Tensor, deltas: tuple[Tensor | Shares, ...], norms: tuple[Norm, ...]) -> tuple[Tensor, ...]:
    """Add the outputs of layers to the residual stream. Returns the sum, and the sum under each norm. All (N, H)."""
    if on_triton(x) and norms:
        from runner.rollout import triton_kernels

        return triton_kernels.add_norm(x, deltas, norms)
    for delta in deltas:
        x = (x + (delta.summed() if isinstance(delta, Shares) else delta)).to(x.dtype)
    return x, *(apply_norm(x, norm) for norm in norms)


def apply_norm(x: Tensor, norm: Norm) -> Tensor:
    if norm.rms:
        wide = x.float()
        return norm.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)).to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864) on the first dims of each head; the rest stays. x (N, heads, D); cos, sin (N, dims)."""
    dims = cos.size(-1)
    part, cos, sin = x[..., :dims], cos.unsqueeze(1), sin.unsqueeze(1)
    turned = torch.cat([-part[..., dims // 2 :], part[..., : dims // 2]], dim=-1)
    return torch.cat([part * cos + turned * sin, x[..., dims:]], dim=-1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    alibi: Tensor | None,
) -> Tensor:
    """Attention of one new token per row over its own past. Also writes the token's key and value into the cache.

    Args:
        q (B, heads, D); k, v (B, kv_heads, D); all before rotation.
        keys, values (slots, kv_heads, T, D): the cache of this layer.
        slots (B,): the place of each row in the cache; positions (B,): of the new token, -1 on a resting row.
        rotary: cos, sin (T, dims), a row per position; alibi (heads,) slopes.
    Returns: (B, heads * D); noise on resting rows.
    """
    if on_triton(q):
        from runner.rollout import triton_attention

        return triton_attention.attend(q, k, v, keys, values, slots, positions, rotary, alibi)
    awake = positions >= 0
    places = positions.clamp(min=0)
    if rotary is not None:
        cos, sin = rotary[0][places], rotary[1][places]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    keys[slots[awake], :, places[awake]] = k[awake]
    values[slots[awake], :, places[awake]] = v[awake]
    width = int(places.max()) + 1
    steps = torch.arange(width, device=q.device)
    distance = (steps - places.unsqueeze(1)).float()[:, None, None, :]
    bias = torch.where(distance <= 0, 0.0 if alibi is None else alibi.view(-1, 1, 1) * distance, -torch.inf).to(q.dtype)
    past = keys[slots, :, :width], values[slots, :, :width]
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q.unsqueeze(2), *past, attn_mask=bias, enable_gqa=grouped).flatten(1)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. (N, I) each, with any distance between rows."""
    if on_triton(gate):
        from runner.rollout import triton_kernels

        return triton_kernels.silu_product(gate, up)
    return F.silu(gate) * up


def sample(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row from softmax(logits), by its uniform number. (B, V), (B,) -> token ids (B,), log-probabilities (B,) fp32."""
    if on_triton(logits):
        from runner.rollout import triton_kernels

        return triton_kernels.sample(logits, uniform)
    token = invert(logits, uniform)
    return token, token_logprobs(logits, token)


def advance(lanes: Lanes, into: Responses, token: Tensor, logprob: Tensor, eos: int, stops: Stops | None) -> None:
    """Record a step's tokens (B,) and log-probabilities (B,), and let each lane continue or rest. In place."""
    if on_triton(token):
        from runner.rollout import triton_kernels

        return triton_kernels.advance(lanes, into, token, logprob, eos, stops)
    is_eos, steps = token == eos, lanes.steps + 1
    into.tokens[lanes.rows, lanes.steps] = token
    into.logprobs[lanes.rows, lanes.steps] = logprob
    into.lengths[lanes.rows], into.ended[lanes.rows] = steps, is_eos
    goes_on = (lanes.positions >= 0) & ~is_eos & (steps < into.limits[lanes.rows])
    if stops:
        states = stops.next(lanes.states, token)
        into.stopped[lanes.rows] = stops.reached(states)
        goes_on &= ~stops.reached(states)
        lanes.states.copy_(torch.where(goes_on, states, 0))
    lanes.tokens.copy_(token)
    lanes.steps.copy_(torch.where(goes_on, steps, 0))
    lanes.positions.copy_(torch.where(goes_on, lanes.positions + 1, -1))
    lanes.rows.masked_fill_(~goes_on, into.nobody)
