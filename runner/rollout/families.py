"""The four families: from a transformers model to a runner/rollout/network.py Network over the same weights."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from runner.models.attention import alibi_slopes
from runner.rollout import kernels
from runner.rollout.kernels import Norm
from runner.rollout.network import Block, Linear, Network, Together


def network_of(hf) -> Network | None:
    """The Network of a transformers model, with or without peft's layers; None for a variant that we do not support."""
    on_embedding = any("lora_embedding" in name for name, _ in hf.named_parameters())
    return NETWORKS[hf.config.model_type](hf) if hf.config.model_type in NETWORKS and not on_embedding else None


def side_by_side(hf) -> None:
    """Move weights that read the same input into one storage, in place, so that sampling needs one product where training makes three."""
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


def _interleaved_block(layer, attention) -> Block:
    """A layer of BLOOM or GPT-NeoX: they share all names except the attention's."""
    norms = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
    up, down = Together(_linear(layer.mlp.dense_h_to_4h)), _linear(layer.mlp.dense_4h_to_h)
    return Block(norms[0], Together(_linear(attention.query_key_value)), _linear(attention.dense), norms[1], up, down)


# --- the four families ------------------------------------------------------------------------------------------------


def _opt(hf) -> Network | None:
    config, body = hf.config, hf.model.decoder
    if not config.layer_norm_elementwise_affine:
        return None
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

    return Network(
        blocks=[_interleaved_block(layer, layer.self_attention) for layer in body.h],
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
    act = body.layers[0].mlp.act_fn

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
        embed=lambda ids, positions: F.embedding(ids, body.embed_tokens.weight),
        final=lambda x: x,
        final_norm=norm(body.norm),
        head=_linear(hf.lm_head),
        activation=kernels.silu_product if isinstance(act, SiLUActivation) else lambda gate, up: act(gate) * up,
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

    return Network(
        blocks=[_interleaved_block(layer, layer.attention) for layer in body.layers],
        embed=lambda ids, positions: F.embedding(ids, body.embed_in.weight),
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


NETWORKS = {"opt": _opt, "bloom": _bloom, "llama": _llama, "gpt_neox": _neox}


def _rotary(module: nn.Module, like: Tensor) -> Callable:
    """transformers' own tables, which include whatever RoPE scaling a checkpoint asks for."""

    def tables(positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = module(like, positions.unsqueeze(0))
        return cos[0], sin[0]

    return tables
