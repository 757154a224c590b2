"""A causal language model as decoding sees it: the weights of the training engine, read in place, without modules around them.

One description serves all four families. What differs between them (where the norms stand, how positions enter, how query,
key and value lie in one matrix) stands in the functions at the end, one for each family.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runner.rollout import kernels


@dataclass
class Linear:
    """y = x W^T + b, and on top of it, where an adapter is not folded into W, scale * (x A^T) B^T."""

    weight: Tensor  # (out, in)
    bias: Tensor | None
    adapter: tuple[Tensor, Tensor, float] | None = None  # A (r, in), B (out, r), scale

    def __call__(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.adapter:
            a, b, scale = self.adapter
            y = y + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * scale
        return y

    def relu(self, x: Tensor) -> Tensor:
        """max(y, 0), on CUDA in the same launch as the product."""
        if x.is_cuda and self.bias is not None and not self.adapter:
            return torch._addmm_activation(self.bias, x, self.weight.t())
        return F.relu(self(x))

    def folded(self) -> "Linear":
        """The same with W + scale * B A as a copy: the weights below the adapter stay as they are, exactly."""
        if self.adapter is None:
            return self
        a, b, scale = self.adapter
        return Linear((self.weight.float() + scale * b.float() @ a.float()).to(self.weight.dtype), self.bias)


class Together:
    """Matrices that read the same input: one product where their weights lie one behind the other in memory, else one for each.

    ZeRO 1 and 2 flatten the weights, and `side_by_side` does the same where nothing else does.
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
    """One view of tensors that follow each other in one storage, or None."""
    if any(t is None for t in tensors):
        return None
    first, sizes = tensors[0], [t.numel() * t.element_size() for t in tensors]
    places = [first.data_ptr() + sum(sizes[:n]) for n in range(len(sizes))]
    if [t.data_ptr() for t in tensors] != places or len({t.untyped_storage().data_ptr() for t in tensors}) > 1:
        return None
    shape = (sum(t.size(0) for t in tensors), *first.shape[1:])
    return first.detach().as_strided(shape, first.stride(), first.storage_offset())


@dataclass
class Norm:
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    rms: bool = False


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
    """All that one forward needs. N tokens of any sequences, one below the other: attention alone knows what belongs together."""

    blocks: list[Block]
    embed: Callable[[Tensor, Tensor], Tensor]  # token ids (N,), positions (N,) -> (N, H)
    final: Callable[[Tensor], Tensor]  # from the last norm to what the head reads
    final_norm: Norm | None
    head: Linear
    activation: Callable[[Tensor], Tensor]
    heads: int
    kv_heads: int
    head_dim: int
    interleaved: bool  # query, key and value lie head by head in one matrix
    residual: str  # sequential, parallel (NeoX), or post: the norm after the sum (OPT-350m)
    alibi: Tensor | None  # (heads,) slopes
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]] | None  # positions (N,) -> cos, sin (N, rotated dims)

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def parameters_read(self) -> int:
        """Numbers that one decode step reads: every matrix of every layer, and the head."""
        return sum(linear.weight.numel() for block in self.blocks for linear in block.linears()) + self.head.weight.numel()

    def hidden(self, ids: Tensor, positions: Tensor, attend: Callable, last_layer: bool = True) -> Tensor | None:
        """(N,) token ids and positions -> (N, H), ready for the head.

        Args:
            attend: (number of the layer, q (N, heads, D), k, v (N, kv_heads, D)) -> (N, heads * D). It also keeps k and v.
            last_layer: False ends after the last layer has met `attend`: a prompt leaves nothing but keys and values.
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
            attended = block.out(attended)
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
        """Query (N, heads, D), key and value (N, kv_heads, D) of normed states (N, H); views where they can be."""
        parts = block.qkv(y)
        if self.interleaved:
            return parts[0].view(len(y), self.heads, 3, self.head_dim).unbind(2)
        return tuple(part.unflatten(-1, (-1, self.head_dim)) for part in parts)

    def mlp(self, block: Block, y: Tensor) -> Tensor:
        if isinstance(self.activation, nn.ReLU):
            return block.down(block.up.parts[0].relu(y))
        first, *second = block.up(y)
        y = self.activation(first)
        return block.down(y * second[0] if second else y)

    def folded(self) -> "Network":
        """The same with every adapter folded into a copy of its matrix."""
        if not any(linear.adapter for block in self.blocks for linear in block.linears()):
            return self

        def fold(block: Block) -> Block:
            parts = {name: Together(*(p.folded() for p in getattr(block, name).parts)) for name in ("qkv", "up")}
            return replace(block, **parts, out=block.out.folded(), down=block.down.folded())

        return replace(self, blocks=[fold(block) for block in self.blocks], head=self.head.folded())

    def adapter_bytes(self) -> int:
        """Bytes that folding takes."""
        linears = [linear for block in self.blocks for linear in block.linears()]
        return sum(linear.weight.numel() * linear.weight.element_size() for linear in linears if linear.adapter)


def network_of(hf) -> Network | None:
    """The network inside a transformers model with or without peft's layers, or None where it has a form that we do not know."""
    on_embedding = any("lora_embedding" in name for name, _ in hf.named_parameters())
    return FORMS[hf.config.model_type](hf) if hf.config.model_type in FORMS and not on_embedding else None


def side_by_side(hf) -> None:
    """Move weights that read the same input into one storage, in place: then sampling multiplies once where training does thrice."""
    groups = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    for module in hf.modules():
        for names in groups:
            parts = [getattr(module, name, None) for name in names]
            if not all(isinstance(part, nn.Linear) for part in parts):
                continue
            for kind in ("weight", "bias"):
                tensors = [getattr(part, kind) for part in parts]
                if all(t is not None and t.numel() for t in tensors):
                    for tensor, piece in zip(tensors, torch.cat([t.data for t in tensors]).split([len(t) for t in tensors]), strict=True):
                        tensor.data = piece


# --- parts ------------------------------------------------------------------------------------------------------------


def _linear(module: nn.Module) -> Linear:
    if not hasattr(module, "base_layer"):
        return Linear(module.weight, getattr(module, "bias", None))
    if not hasattr(module, "lora_A") or module.disable_adapters:
        return _linear(module.base_layer)
    base = module.base_layer
    adapter = (module.lora_A["default"].weight, module.lora_B["default"].weight, module.scaling["default"])
    return Linear(base.weight, getattr(base, "bias", None), adapter)


def _norm(module: nn.Module) -> Norm:
    return Norm(module.weight, module.bias, module.eps)


def _embedding(module: nn.Module) -> Tensor:
    return module.base_layer.weight if hasattr(module, "base_layer") else module.weight


# --- the four families ------------------------------------------------------------------------------------------------


def _opt(hf) -> Network:
    config, body = hf.config, hf.model.decoder
    places = body.embed_positions

    def embed(ids: Tensor, positions: Tensor) -> Tensor:
        x = F.embedding(ids, body.embed_tokens.weight)
        x = body.project_in(x) if body.project_in is not None else x
        return x + F.embedding(positions + places.offset, places.weight)

    def block(layer) -> Block:
        attention = layer.self_attn
        qkv = Together(*map(_linear, (attention.q_proj, attention.k_proj, attention.v_proj)))
        norms = _norm(layer.self_attn_layer_norm), _norm(layer.final_layer_norm)
        return Block(norms[0], qkv, _linear(attention.out_proj), norms[1], Together(_linear(layer.fc1)), _linear(layer.fc2))

    return Network(
        blocks=[block(layer) for layer in body.layers],
        embed=embed,
        final=body.project_out if body.project_out is not None else lambda x: x,
        final_norm=_norm(body.final_layer_norm) if body.final_layer_norm is not None else None,
        head=_linear(hf.lm_head),
        activation=body.layers[0].activation_fn,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        interleaved=False,
        residual="sequential" if config.do_layer_norm_before else "post",
        alibi=None,
        rotary=None,
    )


def _bloom(hf) -> Network | None:
    config, body = hf.config, hf.transformer
    if config.apply_residual_connection_post_layernorm or (config.pretraining_tp > 1 and config.slow_but_exact):
        return None

    def embed(ids: Tensor, positions: Tensor) -> Tensor:
        x = F.embedding(ids, body.word_embeddings.weight)
        return kernels.add_norm(x, (), (_norm(body.word_embeddings_layernorm),))[1]

    def block(layer) -> Block:
        attention, mlp = layer.self_attention, layer.mlp
        norms = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        up, down = Together(_linear(mlp.dense_h_to_4h)), _linear(mlp.dense_4h_to_h)
        return Block(norms[0], Together(_linear(attention.query_key_value)), _linear(attention.dense), norms[1], up, down)

    return Network(
        blocks=[block(layer) for layer in body.h],
        embed=embed,
        final=lambda x: x,
        final_norm=_norm(body.ln_f),
        head=_linear(hf.lm_head),
        activation=lambda x: F.gelu(x, approximate="tanh"),
        heads=config.n_head,
        kv_heads=config.n_head,
        head_dim=config.hidden_size // config.n_head,
        interleaved=True,
        residual="sequential",
        alibi=alibi_slopes(config.n_head).to(hf.lm_head.weight.device),
        rotary=None,
    )


def _llama(hf) -> Network:
    config, body = hf.config, hf.model

    def norm(module) -> Norm:
        return Norm(module.weight, None, module.variance_epsilon, rms=True)

    def block(layer) -> Block:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = Together(*map(_linear, (attention.q_proj, attention.k_proj, attention.v_proj)))
        norms = norm(layer.input_layernorm), norm(layer.post_attention_layernorm)
        up = Together(_linear(mlp.gate_proj), _linear(mlp.up_proj))
        return Block(norms[0], qkv, _linear(attention.o_proj), norms[1], up, _linear(mlp.down_proj))

    return Network(
        blocks=[block(layer) for layer in body.layers],
        embed=lambda ids, positions: F.embedding(ids, _embedding(body.embed_tokens)),
        final=lambda x: x,
        final_norm=norm(body.norm),
        head=_linear(hf.lm_head),
        activation=body.layers[0].mlp.act_fn,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=body.layers[0].self_attn.head_dim,
        interleaved=False,
        residual="sequential",
        alibi=None,
        rotary=_rotary(body.rotary_emb, hf.lm_head.weight),
    )


def _neox(hf) -> Network:
    config, body = hf.config, hf.gpt_neox

    def block(layer) -> Block:
        attention, mlp = layer.attention, layer.mlp
        norms = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        up, down = Together(_linear(mlp.dense_h_to_4h)), _linear(mlp.dense_4h_to_h)
        return Block(norms[0], Together(_linear(attention.query_key_value)), _linear(attention.dense), norms[1], up, down)

    return Network(
        blocks=[block(layer) for layer in body.layers],
        embed=lambda ids, positions: F.embedding(ids, _embedding(body.embed_in)),
        final=lambda x: x,
        final_norm=_norm(body.final_layer_norm),
        head=_linear(hf.get_output_embeddings()),
        activation=body.layers[0].mlp.act,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        interleaved=True,
        residual="parallel" if config.use_parallel_residual else "sequential",
        alibi=None,
        rotary=_rotary(body.rotary_emb, hf.get_output_embeddings().weight),
    )


FORMS = {"opt": _opt, "bloom": _bloom, "llama": _llama, "gpt_neox": _neox}


def _rotary(module: nn.Module, like: Tensor) -> Callable:
    """transformers' own tables: whatever scaling of RoPE a checkpoint names comes with them."""

    def tables(positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = module(like, positions.unsqueeze(0))
        return cos[0], sin[0]

    return tables


def alibi_slopes(heads: int) -> Tensor:
    """Slopes of arXiv 2108.12409: a geometric series for a power of two; for other numbers of heads, every second one of the next."""
    power = 2 ** (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (n + 1) / power) for n in range(power)]
    more = [2.0 ** (-4.0 * (2 * n + 1) / power) for n in range(heads - power)]
    return torch.tensor(slopes + more)
