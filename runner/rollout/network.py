"""A causal language model for decoding: the weights of the training engine, read in place, without modules around them.

One description serves all four families. runner/rollout/families.py fills in what differs between them: where the norms are, how positions
enter, how query, key and value are laid out in one matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runner.rollout import kernels
from runner.rollout.kernels import Norm, Shares


@dataclass
class Linear:
    """y = x W^T + b, plus scale * (x A^T) B^T if there is an adapter that is not folded into W."""

    weight: Tensor  # (out, in)
    bias: Tensor | None
    adapter: tuple[Tensor, Tensor, float] | None = None  # A (r, in), B (out, r), scale

    def __call__(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.adapter:
            a, b, scale = self.adapter
            y = y + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * scale
        return y

    def onto(self, x: Tensor) -> Tensor | Shares:
        """y, for add_norm to add to the residual stream."""
        return self(x) if self.adapter else kernels.product(x, self.weight, self.bias)

    def relu(self, x: Tensor) -> Tensor:
        """max(y, 0), on CUDA in the same launch as the product."""
        if x.is_cuda and self.bias is not None and not self.adapter:
            return torch._addmm_activation(self.bias, x, self.weight.t())
        return F.relu(self(x))

    def folded(self) -> "Linear":
        """The same with W + scale * B A as a copy; W itself stays exactly as it is."""
        if self.adapter is None:
            return self
        a, b, scale = self.adapter
        return Linear((self.weight.float() + scale * b.float() @ a.float()).to(self.weight.dtype), self.bias)


class Together:
    """Matrices that read the same input: one product if their weights are adjacent in memory, otherwise one for each.

    They are adjacent under ZeRO-1 and -2, which flatten the weights; otherwise `side_by_side` makes them so.
    """

    def __init__(self, *parts: Linear):
        self.parts = parts
        self.order = sorted(range(len(parts)), key=lambda n: parts[n].weight.data_ptr())
        inner = [parts[n] for n in self.order]
        weight, bias = _run([p.weight for p in inner]), _run([p.bias for p in inner])
        whole = weight is not None and (bias is not None or inner[0].bias is None) and not any(p.adapter for p in parts)
        self.whole = Linear(weight, bias) if whole and len(parts) > 1 else None

    def __call__(self, x: Tensor) -> list[Tensor]:
        """(N, in) -> (N, out) of each part."""
        if self.whole is None:
            return [part(x) for part in self.parts]
        pieces = self.whole(x).split([self.parts[n].weight.size(0) for n in self.order], dim=-1)
        return [pieces[self.order.index(n)] for n in range(len(self.parts))]


def _run(tensors: list[Tensor | None]) -> Tensor | None:
    """One view over tensors that are adjacent in one storage; None if they are not."""
    if any(t is None for t in tensors):
        return None
    first, sizes = tensors[0], [t.numel() * t.element_size() for t in tensors]
    places = [first.data_ptr() + sum(sizes[:n]) for n in range(len(sizes))]
    if [t.data_ptr() for t in tensors] != places or len({t.untyped_storage().data_ptr() for t in tensors}) > 1:
        return None
    shape = (sum(t.size(0) for t in tensors), *first.shape[1:])
    return first.detach().as_strided(shape, first.stride(), first.storage_offset())


@dataclass
class Block:
    """One decoder layer."""

    attention_norm: Norm
    qkv: Together  # one matrix of all three, or three
    out: Linear
    mlp_norm: Norm
    up: Together  # one matrix, or gate and up
    down: Linear

    def linears(self) -> tuple[Linear, ...]:
        return (*self.qkv.parts, self.out, *self.up.parts, self.down)


@dataclass
class Network:
    """All that a forward pass needs. It takes N tokens of any sequences; only `attend` knows which belong together."""

    blocks: list[Block]
    embed: Callable[[Tensor, Tensor], Tensor]  # token ids (N,), positions (N,) -> (N, H)
    final: Callable[[Tensor], Tensor]  # from the last norm to what the head reads
    final_norm: Norm | None
    head: Linear
    activation: Callable[..., Tensor]  # of what `up` gives: one matrix, or gate and up
    heads: int
    kv_heads: int
    head_dim: int
    interleaved: bool  # one matrix holds query, key and value, head by head
    residual: str  # sequential, parallel (NeoX), or post: the norm after the sum (OPT-350m)
    alibi: Tensor | None  # (heads,) slopes
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]] | None  # positions (N,) -> cos, sin (N, rotated dims)

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def hidden(self, ids: Tensor, positions: Tensor, attend: Callable, last_layer: bool = True) -> Tensor | None:
        """(N,) token ids and positions -> (N, H), ready for the head.

        Args:
            attend: (number of the layer, q (N, heads, D), k, v (N, kv_heads, D)) -> (N, heads * D). It also caches k and v.
            last_layer: False stops after the last `attend` and returns None: prefill needs only keys and values.
        """
        x, deltas = self.embed(ids, positions), ()
        for n, block in enumerate(self.blocks):
            parallel = self.residual == "parallel"
            norms = (block.attention_norm, block.mlp_norm) if parallel else (block.attention_norm,)
            if self.residual == "post":
                y = x
            else:
                x, y, *other = kernels.add_norm(x, deltas, norms)
            attended = attend(n, *self.split(block, y))
            if not last_layer and n == len(self.blocks) - 1:
                return None
            attended = block.out.onto(attended)
            if parallel:
                deltas = (attended, self.mlp(block, other[0]))
            elif self.residual == "post":
                _, x = kernels.add_norm(x, (attended,), (block.attention_norm,))
                _, x = kernels.add_norm(x, (self.mlp(block, x),), (block.mlp_norm,))
            else:
                x, y = kernels.add_norm(x, (attended,), (block.mlp_norm,))
                deltas = (self.mlp(block, y),)
        x, *normed = kernels.add_norm(x, deltas, (self.final_norm,) if self.final_norm else ())
        return self.final(normed[0] if normed else x)

    def split(self, block: Block, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query (N, heads, D), key and value (N, kv_heads, D) of normed states (N, H); views where possible."""
        parts = block.qkv(y)
        if self.interleaved:
            return parts[0].view(len(y), self.heads, 3, self.head_dim).unbind(2)
        return tuple(part.unflatten(-1, (-1, self.head_dim)) for part in parts)

    def mlp(self, block: Block, y: Tensor) -> Tensor | Shares:
        if isinstance(self.activation, nn.ReLU) and len(block.up.parts) == 1:
            return block.down.onto(block.up.parts[0].relu(y))
        return block.down.onto(self.activation(*block.up(y)))

    def folded(self) -> "Network":
        """The same with every adapter folded into a copy of its matrix."""
        if not any(linear.adapter for block in self.blocks for linear in block.linears()):
            return self

        def fold(block: Block) -> Block:
            parts = {name: Together(*(p.folded() for p in getattr(block, name).parts)) for name in ("qkv", "up")}
            return replace(block, **parts, out=block.out.folded(), down=block.down.folded())

        return replace(self, blocks=[fold(block) for block in self.blocks], head=self.head.folded())

    def adapter_bytes(self) -> int:
        """Bytes that folding would take."""
        linears = [linear for block in self.blocks for linear in block.linears()]
        return sum(linear.weight.numel() * linear.weight.element_size() for linear in linears if linear.adapter)
