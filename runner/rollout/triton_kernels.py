"""The operations of kernels.py as Triton kernels: a decode step is bound by memory and by launches, so each of them is one pass.

Sums, softmax and norms are in fp32, whatever is stored.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from runner.rollout.triton_attention import parts_of

# Tokens of the vocabulary in one program of the sampler
VOCABULARY_BLOCK = 4096
# Up to so many rows, a product with a narrow matrix is cut along its sums, so that the whole GPU reads weights and not a quarter of it: as
# many tiles of weights as an H200 has multiprocessors (at 64 rows of OPT-1.3B 11.0 us in place of 15.1 and 4.9 in place of 6.5)
FEW_ROWS, BUSY_TILES, WEIGHT_TILE, DEPTH_TILE = 128, 128, 64, 128


# --- matrix products --------------------------------------------------------------------------------------------------


def product_shares(x: Tensor, weight: Tensor) -> Tensor | None:
    """Shares of the sums of x W^T, in fp32: (S, N, H). None where one product of the library is as quick."""
    (rows, depth), width = x.shape, len(weight)
    shares = parts_of(max(1, width // WEIGHT_TILE), BUSY_TILES)
    if rows > FEW_ROWS or shares < 2 or width % WEIGHT_TILE or depth % (DEPTH_TILE * shares) or x.element_size() != 2:
        return None
    wide = max(16, triton.next_power_of_2(rows))
    stages = min(4, _shared_memory(x.device) // (x.element_size() * DEPTH_TILE * (WEIGHT_TILE + wide)))
    if stages < 2 or not (x.is_contiguous() and weight.is_contiguous()):
        return None
    sums = torch.empty(shares, rows, width, dtype=torch.float32, device=x.device)
    _product_shares[(width // WEIGHT_TILE, shares)](
        x, weight, sums, rows, width, depth, depth // shares,
        ROWS=wide, TILE=WEIGHT_TILE, DEPTH=DEPTH_TILE, num_warps=4, num_stages=stages,
    )  # fmt: skip
    return sums


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of a multiprocessor that a program can have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@triton.jit
def _product_shares(x, weight, sums, rows, width, depth, share, ROWS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """The weights are the tall side of the tile: tensor cores want 64 rows, and the batch may have fewer."""
    column, row = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, ROWS)
    real = row[None, :] < rows
    k = tl.program_id(1) * share + tl.arange(0, DEPTH)
    weights = weight + column[:, None].to(tl.int64) * depth + k[None, :]
    inputs = x + row[None, :] * depth + k[:, None]
    total = tl.zeros((TILE, ROWS), tl.float32)
    for _ in range(0, share, DEPTH):
        total = tl.dot(tl.load(weights, eviction_policy="evict_first"), tl.load(inputs, mask=real, other=0.0), total)
        weights += DEPTH
        inputs += DEPTH
    tl.store(sums + (tl.program_id(1) * rows + row[None, :]) * width + column[:, None], total, mask=real)


# --- residual sum and norm --------------------------------------------------------------------------------------------


def add_norm(x: Tensor, deltas: tuple, norms: tuple) -> tuple[Tensor, ...]:
    """As kernels.add_norm: up to two deltas and two norms in one pass."""
    total = torch.empty_like(x) if deltas else x
    normed = [torch.empty_like(x) for _ in norms]
    (d1, e1, s1), (d2, e2, s2) = (*map(_added_parts, deltas), (x, None, 1), (x, None, 1))[:2]
    one, other = norms[0], norms[-1]
    width = x.size(-1)
    block = triton.next_power_of_2(width)
    _add_norm[(len(x),)](
        x, d1, e1 if e1 is not None else x, d2, e2 if e2 is not None else x, total,
        one.weight, one.bias if one.bias is not None else one.weight, normed[0],
        other.weight, other.bias if other.bias is not None else other.weight, normed[-1],
        width, x.numel(), one.eps,
        DELTAS=len(deltas), SHARES1=s1, BIAS1=e1 is not None, SHARES2=s2, BIAS2=e2 is not None,
        NORMS=len(norms), RMS=one.rms, BIAS=one.bias is not None, BLOCK=block, num_warps=min(8, max(1, block // 512)),
    )  # fmt: skip
    return total, *normed


def _added_parts(delta) -> tuple[Tensor, Tensor | None, int]:
    """What a delta consists of: its sums, its bias, and how many shares the sums have."""
    return (delta, None, 1) if isinstance(delta, Tensor) else (delta.sums, delta.bias, len(delta.sums))


@triton.jit
def _add_norm(
    x, d1, e1, d2, e2, total, w1, b1, y1, w2, b2, y2, width, size, eps,
    DELTAS: tl.constexpr, SHARES1: tl.constexpr, BIAS1: tl.constexpr, SHARES2: tl.constexpr, BIAS2: tl.constexpr,
    NORMS: tl.constexpr, RMS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = tl.program_id(0).to(tl.int64) * width + column
    sum_ = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if DELTAS > 0:
        sum_ += _added(d1 + place, e1 + column, size, inside, SHARES1, BIAS1)
        if DELTAS > 1:
            sum_ += _added(d2 + place, e2 + column, size, inside, SHARES2, BIAS2)
        # The norm sees what the residual stream keeps
        kept = sum_.to(total.dtype.element_ty)
        tl.store(total + place, kept, mask=inside)
        sum_ = kept.to(tl.float32)
    mean = 0.0 if RMS else tl.sum(sum_, axis=0) / width
    centered = tl.where(inside, sum_ - mean, 0.0)
    normed = centered * tl.rsqrt(tl.sum(centered * centered, axis=0) / width + eps)
    if RMS:  # as LLaMA's, which rounds before it scales
        normed = normed.to(y1.dtype.element_ty).to(tl.float32)
    _scale(normed, w1, b1, y1, place, column, inside, BIAS)
    if NORMS > 1:
        _scale(normed, w2, b2, y2, place, column, inside, BIAS)


@triton.jit
def _added(delta, bias, size, inside, SHARES: tl.constexpr, BIAS: tl.constexpr):
    sum_ = tl.load(delta, mask=inside, other=0.0).to(tl.float32)
    for n in tl.static_range(1, SHARES):
        sum_ += tl.load(delta + n * size, mask=inside, other=0.0)
    if BIAS:
        sum_ += tl.load(bias, mask=inside, other=0.0).to(tl.float32)
    return sum_


@triton.jit
def _scale(normed, w, b, y, place, column, inside, BIAS: tl.constexpr):
    out = normed * tl.load(w + column, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        out += tl.load(b + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, out.to(y.dtype.element_ty), mask=inside)


# --- the gate of LLaMA's MLP ------------------------------------------------------------------------------------------


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """As kernels.silu_product, of halves of one matrix where they are that."""
    count, width = gate.shape
    out = torch.empty(count, width, dtype=gate.dtype, device=gate.device)
    _silu_product[(count, triton.cdiv(width, 1024))](gate, up, out, gate.stride(0), up.stride(0), width, BLOCK=1024, num_warps=4)
    return out


@triton.jit
def _silu_product(gate, up, out, gate_row, up_row, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    # Rounded where plain torch rounds
    gated = (x * tl.sigmoid(x)).to(out.dtype.element_ty)
    tl.store(out + row * width + column, gated * tl.load(up + row * up_row + column, mask=inside, other=0.0), mask=inside)


# --- sampling ---------------------------------------------------------------------------------------------------------


def sample(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """As kernels.sample: the cumulative sum in two levels, of blocks of the vocabulary and inside one of them."""
    batch, vocabulary = logits.shape
    blocks = triton.cdiv(vocabulary, VOCABULARY_BLOCK)
    most, mass = (torch.empty(batch, blocks, dtype=torch.float32, device=logits.device) for _ in range(2))
    token = torch.empty(batch, dtype=torch.int64, device=logits.device)
    logprob = torch.empty(batch, dtype=torch.float32, device=logits.device)
    _masses[(batch, blocks)](logits, most, mass, vocabulary, blocks, BLOCK=VOCABULARY_BLOCK, num_warps=8)
    _pick[(batch,)](
        logits, most, mass, uniform, token, logprob, vocabulary, blocks,
        BLOCKS=max(2, triton.next_power_of_2(blocks)), BLOCK=VOCABULARY_BLOCK, num_warps=8,
    )  # fmt: skip
    return token, logprob


@triton.jit
def _masses(logits, most, mass, vocabulary, blocks, BLOCK: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * vocabulary + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
    top = tl.max(x, axis=0)
    # A block without a token that can be sampled has mass 0, not nan
    safe = tl.where(top == float("-inf"), 0.0, top)
    tl.store(most + row * blocks + block, top)
    tl.store(mass + row * blocks + block, tl.sum(tl.exp(x - safe), axis=0))


@triton.jit
def _pick(logits, most, mass, uniform, token, logprob, vocabulary, blocks, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, BLOCKS)
    tops = tl.load(most + row * blocks + b, mask=b < blocks, other=float("-inf"))
    top = tl.max(tops, axis=0)
    masses = (tl.load(mass + row * blocks + b, mask=b < blocks, other=0.0) * tl.exp(tops - top)).to(tl.float64)
    total = tl.sum(masses, axis=0)
    # fp64: an fp32 sum over a large vocabulary misses tail tokens
    point = tl.load(uniform + row) * total
    block = tl.sum((tl.cumsum(masses, axis=0) <= point).to(tl.int32), axis=0)
    block = tl.minimum(block, tl.max(tl.where(masses > 0, b, 0), axis=0))
    point -= tl.sum(tl.where(b < block, masses, 0.0), axis=0)

    i = tl.arange(0, BLOCK)
    column = block * BLOCK + i
    x = tl.load(logits + row * vocabulary + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
    share = tl.exp(x - top).to(tl.float64)
    inside = tl.sum((tl.cumsum(share, axis=0) <= point).to(tl.int32), axis=0)
    # Rounding may leave the point past the end: then it is the last token that can be sampled
    inside = tl.minimum(inside, tl.max(tl.where(share > 0, i, 0), axis=0))
    tl.store(token + row, (block * BLOCK + inside).to(tl.int64))
    picked = tl.sum(tl.where(i == inside, x, 0.0), axis=0)
    tl.store(logprob + row, picked - top - tl.log(total).to(tl.float32))


# --- the lanes --------------------------------------------------------------------------------------------------------


def advance(lanes, into, token: Tensor, logprob: Tensor, eos: int, stops) -> None:
    """As kernels.advance: a dozen tiny operations in one launch."""
    vocabulary, states = stops.table.shape if stops else (0, 0)
    _advance[(1,)](
        lanes.tokens, lanes.positions, lanes.steps, lanes.rows, lanes.states, token, logprob,
        into.tokens, into.logprobs, into.lengths, into.ended, into.stopped, into.limits, into.tokens.size(1), into.nobody, eos,
        stops.table if stops else None, vocabulary, states, len(token),
        BLOCK=max(32, triton.next_power_of_2(len(token))),
    )  # fmt: skip


@triton.jit
def _advance(
    lane_tokens, lane_positions, lane_steps, lane_rows, lane_states, token, logprob,
    tokens, logprobs, lengths, ended, stopped, limits, most, nobody, eos, table, vocabulary, states, lanes, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    real = lane < lanes
    new, row, step = tl.load(token + lane, mask=real), tl.load(lane_rows + lane, mask=real), tl.load(lane_steps + lane, mask=real)
    position = tl.load(lane_positions + lane, mask=real, other=-1)
    # Lanes that rest all write to the row that is thrown away
    tl.store(tokens + row * most + step, new, mask=real)
    tl.store(logprobs + row * most + step, tl.load(logprob + lane, mask=real), mask=real)
    tl.store(lengths + row, step + 1, mask=real)
    tl.store(ended + row, new == eos, mask=real)
    goes_on = (position >= 0) & (new != eos) & (step + 1 < tl.load(limits + row, mask=real))
    if table is not None:
        state = tl.load(lane_states + lane, mask=real)
        # NaN in the logits may give any number
        state = tl.load(table + new * states + state, mask=real & (new >= 0) & (new < vocabulary), other=0).to(tl.int64)
        reached = state == states - 1
        tl.store(stopped + row, reached, mask=real)
        goes_on = goes_on & ~reached
        tl.store(lane_states + lane, tl.where(goes_on, state, 0), mask=real)
    tl.store(lane_tokens + lane, new, mask=real)
    tl.store(lane_steps + lane, tl.where(goes_on, step + 1, 0), mask=real)
    tl.store(lane_positions + lane, tl.where(goes_on, position + 1, -1), mask=real)
    tl.store(lane_rows + lane, tl.where(goes_on, row, nobody), mask=real)
