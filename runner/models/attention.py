"""Attention over packed rows, and the forward pass of a model's body on them, for the four families.

Attention runs on the packed row (flash attention) where that kernel exists, otherwise on rows padded on the right, where causality alone
hides the padding: neither needs a mask. Rows of one length have no padding, and cuDNN is faster on Hopper. It is registered in
transformers as the implementation "packed"; a forward pass without a Layout, as in generation, falls back to "sdpa" ("eager" for BLOOM).
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.models.bloom import modeling_bloom

from runner.device import send
from runner.models.packing import Layout

PACKED = "packed"


def attend(query: Tensor, key: Tensor, value: Tensor, at: Layout, dropout: float, scale: float, bias: Tensor | None = None) -> Tensor:
    """Causal attention of each row to itself. (N, heads, D) -> (N, heads, D); key and value may have fewer heads, each for a group.

    bias: (1, heads, longest, longest), added to the scores; minus infinity above the diagonal.
    """
    if bias is None and not dropout and _has_flash(query.device, query.dtype) and query.size(-1) % 8 == 0:
        even = _is_even(at) and _has_cudnn(query.device) and query.size(-1) <= 128
        return (_cudnn if even else _flash)(query, key, value, at, scale)
    groups = query.size(1) // key.size(1)
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    query, key, value = (at.unpack(x) for x in (query, key, value))
    causal = bias is None
    return at.pack(F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, is_causal=causal, scale=scale))


def _flash(query: Tensor, key: Tensor, value: Tensor, at: Layout, scale: float) -> Tensor:
    """What torch.nn.attention.varlen calls, without its operator around it, which is Python: launching a layer took a third longer."""
    where = at.bounds, at.bounds, at.longest, at.longest
    no_dropout, causal, no_debug_mask = 0.0, True, False
    return torch.ops.aten._flash_attention_forward(query, key, value, *where, no_dropout, causal, no_debug_mask, scale=scale)[0]


def _cudnn(query: Tensor, key: Tensor, value: Tensor, at: Layout, scale: float) -> Tensor:
    query, key, value = (x.unflatten(0, (at.rows, at.longest)).transpose(1, 2) for x in (query, key, value))
    no_bias, no_dropout, causal, no_debug_mask = None, 0.0, True, False
    how = no_bias, torch.is_grad_enabled(), no_dropout, causal, no_debug_mask
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, *how, scale=scale)[0]
    return out.transpose(1, 2).flatten(0, 1)


def _is_even(at: Layout) -> bool:
    """Whether all rows are as long as a multiple of 128. cuDNN spends 0.1 s on each new shape: single rows of any length are too many."""
    return at.rows * at.longest == len(at.slots) and at.longest % 128 == 0


def _has_cudnn(device: torch.device) -> bool:
    """Whether cuDNN's attention is faster than flash attention: on Hopper alone, and it does not repeat itself to the bit."""
    return torch.cuda.get_device_capability(device) == (9, 0) and not torch.are_deterministic_algorithms_enabled()


@cache
def _has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether flash attention over packed rows is available: in half precision, from Ampere on. It takes neither dropout nor a bias."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and torch.cuda.get_device_capability(device) >= (8, 0)


def _attention(module, query, key, value, attention_mask, scaling, dropout=0.0, layout: Layout | None = None, **kwargs):
    """The attention function for transformers. query (1, heads, N, D), key and value the same or with fewer heads -> (1, N, heads, D)."""
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    # squeeze, not x[0]: the gradient of an index is copied into zeros
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return attend(query, key, value, layout, dropout, scaling).unsqueeze(0), None


def _mask(config, **options):
    """The mask of a forward pass without a Layout. BLOOM adds its mask to the scores, so it cannot be boolean."""
    return (eager_mask if config.model_type == "bloom" else sdpa_mask)(config=config, **options)


AttentionInterface.register(PACKED, _attention)
AttentionMaskInterface.register(PACKED, _mask)


# --- the body of a model ----------------------------------------------------------------------------------------------


def is_packed(model: nn.Module) -> bool:
    return model.config._attn_implementation == PACKED


def pads_nothing(model: nn.Module) -> bool:
    """Whether not even attention computes padding while the model trains, as it stands on its device."""
    config = model.config
    flash = config.model_type != "bloom" and not getattr(config, "attention_dropout", 0.0) and _has_flash(model.device, model.dtype)
    return is_packed(model) and flash


def adopt(model: nn.Module) -> None:
    """Prepare a model that was loaded as "packed" for `body`: BLOOM's attention does not use transformers' attention interface."""
    for module in model.modules():
        if type(module) is modeling_bloom.BloomAttention:
            module.__class__ = BloomAttention


def body(model: nn.Module, at: Layout) -> Tensor:
    """Hidden states of the real tokens after the last layer norm. (N, H)."""
    if model.config.model_type == "bloom":
        return _bloom(model, at)
    # The Layout is passed as an argument, so that recomputed layers get it too. transformers passes on a mask of four dimensions as it is;
    # without one it would look for packed rows by itself, wait for the GPU and build an N x N mask
    no_mask = at.bounds.view(1, 1, 1, -1)
    out = model(input_ids=at.ids, position_ids=at.positions, attention_mask=no_mask, use_cache=False, layout=at)
    return out.last_hidden_state.squeeze(0)


def _bloom(model: nn.Module, at: Layout) -> Tensor:
    """transformers' BloomModel.forward with a Layout, which the original does not take: it is passed in place of the mask."""
    hidden = model.word_embeddings_layernorm(model.word_embeddings(at.ids))
    alibi = alibi_bias(model.num_heads, at.longest, hidden.dtype, hidden.device)
    for block in model.h:
        hidden = block(hidden, alibi=alibi, attention_mask=at)[0]
    return model.ln_f(hidden).squeeze(0)


def alibi_bias(heads: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """slope * (key - query) below the diagonal, minus infinity above. (1, heads, length, length).

    After softmax it equals transformers' slope * key. Rounded to bf16 it is exact where it matters: for near keys.
    """
    slopes = send(alibi_slopes(heads), device).view(-1, 1, 1)
    width = length + -length % 16  # the CUDA kernel would copy rows that do not start at a multiple of 16
    distance = torch.arange(width, device=device) - torch.arange(length, device=device).unsqueeze(1)
    bias = torch.empty(heads, length, width, dtype=dtype, device=device)
    torch.mul(slopes, distance, out=bias).masked_fill_(distance > 0, -torch.inf)
    return bias[None, :, :, :length]


def alibi_slopes(heads: int) -> Tensor:
    """Slopes of arXiv 2108.12409: a geometric series for a power of two; for other numbers, every second one of the next."""
    power = 2 ** (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (n + 1) / power) for n in range(power)]
    more = [2.0 ** (-4.0 * (2 * n + 1) / power) for n in range(heads - power)]
    return torch.tensor(slopes + more)


class BloomAttention(modeling_bloom.BloomAttention):
    """BLOOM's attention; with a Layout as its mask it keeps no matrix of scores in memory."""

    def forward(self, hidden_states: Tensor, residual: Tensor, alibi: Tensor, attention_mask: Tensor | Layout | None, **kwargs):
        if not isinstance(attention_mask, Layout):
            return super().forward(hidden_states, residual, alibi, attention_mask, **kwargs)
        heads = self.query_key_value(hidden_states).squeeze(0).unflatten(-1, (self.num_heads, 3, self.head_dim))
        dropout = self.attention_dropout.p if self.training else 0.0
        context = attend(*heads.unbind(2), attention_mask, dropout, self.inv_norm_factor, bias=alibi)
        out = self.dense(context.flatten(1).unsqueeze(0))
        return residual + F.dropout(out, self.hidden_dropout, self.training), None
