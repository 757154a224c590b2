"""Attention of one new token per row over its cache (kernels.attend), as Triton kernels: each of them is one pass over the cache.

Sums and softmax are in fp32, whatever is stored.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers of the cache that a program of the attention reads at once: 64 tokens of 64 dims, with one warp (92 % of an H200's copy rate where
# four warps came to 68 %)
CACHE_TILE = 4096
# Programs of one warp, and of two with shared keys, that keep a GPU's memory busy. Where rows and heads are fewer, several programs read
# the cache of each, in parts, at most so many; where they are more, parts gain nothing
PROGRAMS, SHARED_PROGRAMS, PARTS = 2048, 256, 16


def parts_of(programs: int, enough: int) -> int:
    """How many programs share the work of each, so that there are no more than `enough`: a power of 2."""
    count = 1
    while count < PARTS and 2 * count * programs <= enough:
        count *= 2
    return count


def attend(q, k, v, keys, values, slots, positions, rotary, alibi) -> Tensor:
    """As kernels.attend, in programs that also rotate, and write the new key and value. Each is for one row and key head, or for a part of
    its cache: then the last of them to end puts the parts together."""
    batch, heads, dim = q.shape
    kv_heads, length = keys.shape[1:3]
    shared, wide = heads > kv_heads, max(16, triton.next_power_of_2(dim))
    out = torch.empty(batch, heads * dim, dtype=q.dtype, device=q.device)
    count = parts_of(batch * kv_heads, SHARED_PROGRAMS if shared else PROGRAMS)
    parts = torch.empty(batch * heads * count, wide + 2, dtype=torch.float32, device=q.device) if count > 1 else out
    tables = (*(rotary or (q, q)), alibi if alibi is not None else q)
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1))
    # A whole tile of wide heads, or beside ALiBi's numbers, takes more than 128 registers: then 15 programs fit where 16 do without
    small = not shared and (count > 1 or wide > 64 or alibi is not None)
    shape = {"KV_HEADS": kv_heads, "DIM": dim, "WIDE": wide, "TURNED": rotary[0].size(-1) if rotary else 0, "PARTS": count}
    shape |= {"BLOCK": max(16, CACHE_TILE // (2 if small else 1) // wide)}
    if shared:
        group = heads // kv_heads
        kernel, shape = _attend_shared, shape | {"GROUP": group, "ROWS": max(16, triton.next_power_of_2(group)), "num_warps": 2}
    else:
        kernel, shape = _attend, shape | {"ALIBI": alibi is not None, "num_warps": 1}
    kernel[(batch, kv_heads, count)](
        q, k, v, keys, values, out, slots, positions, *tables, parts, _arrivals(q.device), *strides, length, dim**-0.5, **shape
    )
    return out


@cache
def _arrivals(device: torch.device) -> Tensor:
    """How many parts of each row and head are done: 0 between two launches."""
    return torch.zeros(PROGRAMS, dtype=torch.int32, device=device)


@triton.jit
def _attend(
    q, k, v, keys, values, out, slots, positions, cos, sin, slopes, parts, arrivals,
    q_row, q_head, k_row, k_head, v_row, v_head, length, scale,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, TURNED: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    ALIBI: tl.constexpr,
):  # fmt: skip
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + row)
    if position < 0:
        return
    d = tl.arange(0, WIDE)
    real = d < DIM
    base = (tl.load(slots + row) * KV_HEADS + head) * length * DIM
    query = _turned(q + row * q_row + head * q_head, cos, sin, position, d, real, TURNED)
    if ALIBI:
        slope = tl.load(slopes + head)
    most, weight = float("-inf"), 0.0
    total = tl.zeros((WIDE,), tl.float32)
    if part == 0:
        new_k, new_v = _keep(
            k, v, keys, values, cos, sin, row, head, k_row, k_head, v_row, v_head, base + position * DIM, position, d, real, TURNED
        )  # fmt: skip
        most = tl.sum(query * new_k.to(tl.float32), axis=0) * scale
        weight = 1.0
        total = new_v.to(tl.float32)
    span = tl.cdiv(tl.cdiv(position, BLOCK), PARTS) * BLOCK
    for start in range(part * span, tl.minimum((part + 1) * span, position), BLOCK):
        t = start + tl.arange(0, BLOCK)
        past = t < position
        cell = base + t[:, None] * DIM + d[None, :]
        both = past[:, None] & real[None, :]
        key = tl.load(keys + cell, mask=both, other=0.0).to(tl.float32)
        value = tl.load(values + cell, mask=both, other=0.0).to(tl.float32)
        score = tl.sum(key * query[None, :], axis=1) * scale
        if ALIBI:
            score += slope * (t - position)
        score = tl.where(past, score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, axis=0))
        share = tl.exp(score - higher)
        fade = tl.exp(most - higher)
        total = total * fade + tl.sum(share[:, None] * value, axis=0)
        weight = weight * fade + tl.sum(share, axis=0)
        most = higher
    one = tl.arange(0, 1)
    lane = row * KV_HEADS + head
    _put(out, parts, arrivals + lane, lane + one, one < 1, total[None, :], most + one, weight + one, part, d, real, DIM, WIDE, PARTS)


@triton.jit
def _attend_shared(
    q, k, v, keys, values, out, slots, positions, cos, sin, slopes, parts, arrivals,
    q_row, q_head, k_row, k_head, v_row, v_head, length, scale,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, TURNED: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The queries that share a key head are the rows of a matrix product."""
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + row)
    if position < 0:
        return
    d = tl.arange(0, WIDE)
    real = d < DIM
    base = (tl.load(slots + row) * KV_HEADS + head) * length * DIM
    g = tl.arange(0, ROWS)
    mine = g < GROUP
    queries = _turned_rows(q + row * q_row + (head * GROUP + g) * q_head, cos, sin, position, d, mine, real, TURNED)
    queries = queries.to(keys.dtype.element_ty)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, WIDE), tl.float32)
    if part == 0:
        new_k, new_v = _keep(
            k, v, keys, values, cos, sin, row, head, k_row, k_head, v_row, v_head, base + position * DIM, position, d, real, TURNED
        )  # fmt: skip
        most = tl.sum(queries.to(tl.float32) * new_k.to(tl.float32)[None, :], axis=1) * scale
        weight += 1.0
        total += new_v.to(tl.float32)[None, :]
    span = tl.cdiv(tl.cdiv(position, BLOCK), PARTS) * BLOCK
    for start in range(part * span, tl.minimum((part + 1) * span, position), BLOCK):
        t = start + tl.arange(0, BLOCK)
        past = t < position
        cell = base + t[:, None] * DIM + d[None, :]
        both = past[:, None] & real[None, :]
        key = tl.load(keys + cell, mask=both, other=0.0)
        value = tl.load(values + cell, mask=both, other=0.0)
        score = tl.dot(queries, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(past[None, :], score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, axis=1))
        share = tl.exp(score - higher[:, None])
        fade = tl.exp(most - higher)
        total = total * fade[:, None] + tl.dot(share.to(value.dtype), value, input_precision="ieee")
        weight = weight * fade + tl.sum(share, axis=1)
        most = higher
    lane = row * KV_HEADS + head
    _put(out, parts, arrivals + lane, lane * GROUP + g, mine, total, most, weight, part, d, real, DIM, WIDE, PARTS)


@triton.jit
def _put(
    out, parts, arrived, query, mine, total, most, weight, part, d, real, DIM: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Write what queries (ROWS,) have read: their sums of values `total` (ROWS, WIDE) and of shares `weight`, both times exp(-most).

    Of several parts the last to arrive sums all, in the order of the cache, so that it does not matter which one it is."""
    both = mine[:, None] & real[None, :]
    if PARTS > 1:
        first = parts + query * PARTS * (WIDE + 2)
        cell = first + part * (WIDE + 2)
        tl.store(cell[:, None] + d[None, :], total, mask=both)
        tl.store(cell + WIDE, most, mask=mine)
        tl.store(cell + WIDE + 1, weight, mask=mine)
        # All warps have written before one of them says so
        tl.debug_barrier()
        if tl.atomic_add(arrived, 1, sem="acq_rel") == PARTS - 1:
            tl.store(arrived, 0)
            most = tl.full(most.shape, float("-inf"), tl.float32)
            weight = tl.zeros(weight.shape, tl.float32)
            total = tl.zeros(total.shape, tl.float32)
            for n in range(PARTS):
                cell = first + n * (WIDE + 2)
                # From the second-level cache, which all multiprocessors share
                other = tl.load(cell + WIDE, mask=mine, other=0.0, cache_modifier=".cg")
                higher = tl.maximum(most, other)
                fade, grow = tl.exp(most - higher), tl.exp(other - higher)
                weight = weight * fade + grow * tl.load(cell + WIDE + 1, mask=mine, other=1.0, cache_modifier=".cg")
                whole = tl.load(cell[:, None] + d[None, :], mask=both, other=0.0, cache_modifier=".cg")
                total = total * fade[:, None] + grow[:, None] * whole
                most = higher
            tl.store(out + query[:, None] * DIM + d[None, :], (total / weight[:, None]).to(out.dtype.element_ty), mask=both)
    else:
        tl.store(out + query[:, None] * DIM + d[None, :], (total / weight[:, None]).to(out.dtype.element_ty), mask=both)


@triton.jit
def _keep(
    k, v, keys, values, cos, sin, row, head, k_row, k_head, v_row, v_head, place, position, d, real, TURNED: tl.constexpr
):  # fmt: skip
    """The new key, rotated, and the new value, as they stand in the cache now."""
    new_k = _turned(k + row * k_row + head * k_head, cos, sin, position, d, real, TURNED).to(keys.dtype.element_ty)
    new_v = tl.load(v + row * v_row + head * v_head + d, mask=real, other=0.0)
    tl.store(keys + place + d, new_k, mask=real)
    tl.store(values + place + d, new_v, mask=real)
    return new_k, new_v


@triton.jit
def _turned(x, cos, sin, position, d, real, TURNED: tl.constexpr):
    """A head's vector in fp32, its first TURNED dims rotated."""
    out = tl.load(x + d, mask=real, other=0.0).to(tl.float32)
    if TURNED > 0:
        half: tl.constexpr = TURNED // 2
        turns = d < TURNED
        partner = tl.load(x + tl.where(d < half, d + half, d - half), mask=turns, other=0.0).to(tl.float32)
        c = tl.load(cos + position * TURNED + d, mask=turns, other=1.0).to(tl.float32)
        s = tl.load(sin + position * TURNED + d, mask=turns, other=0.0).to(tl.float32)
        out = out * c + tl.where(d < half, -partner, partner) * s
    return out


@triton.jit
def _turned_rows(x, cos, sin, position, d, mine, real, TURNED: tl.constexpr):
    """The same for several heads, whose addresses stand in x."""
    both = mine[:, None] & real[None, :]
    out = tl.load(x[:, None] + d[None, :], mask=both, other=0.0).to(tl.float32)
    if TURNED > 0:
        half: tl.constexpr = TURNED // 2
        turns = d < TURNED
        other = tl.where(d < half, d + half, d - half)
        partner = tl.load(x[:, None] + other[None, :], mask=mine[:, None] & turns[None, :], other=0.0).to(tl.float32)
        c = tl.load(cos + position * TURNED + d, mask=turns, other=1.0).to(tl.float32)
        s = tl.load(sin + position * TURNED + d, mask=turns, other=0.0).to(tl.float32)
        out = out * c[None, :] + tl.where(d < half, -1.0, 1.0)[None, :] * partner * s[None, :]
    return out
