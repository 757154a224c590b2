"""How much work a model does, counted from its matrices: floating-point operations, and the bytes that decoding reads.

The definitions behind `perf/mfu`, model FLOPs utilisation (arXiv 2204.02311), and `perf/mbu`, memory bandwidth utilisation:

- A multiply-add is 2 FLOPs. Matrix products count and nothing else: no embedding look-up, norm, softmax or loss.
- Body: 2 per weight of its matrices and token. Head: 2 per weight and token whose logits are made; a scalar head, a vector, is left out.
- Attention: 4 x heads x head_dim per layer and pair of a query and a key that it sees (q k^T, and the product with v). Causal attention
  over T tokens has T (T + 1) / 2 such pairs.
- Backward: one forward's worth for the gradient of the inputs, and one for the gradient of the weights that train. So 3 x forward in
  full training, 2 x for matrices below adapters; attention, which has no weights, 3 x.
- Only real tokens count, and recomputation (gradient checkpointing, chunks of logits) does not: both padding and recomputation lower the
  utilisation, as they should.
- Decoding reads every matrix once per step, and the keys and values of all tokens before the new one.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class MatrixSizes:
    """Sizes of a model, in numbers (not bytes)."""

    body: int  # weights of the body's matrices
    body_trained: int  # of these, the ones that train
    head: int  # weights of the matrix that makes logits; 0 for a scalar head
    head_trained: int
    attention: int  # layers x heads x head_dim
    cache: int  # keys and values of one token, in all layers


def matrix_sizes(hf) -> MatrixSizes:
    """The work of a Hugging Face model, adapters included; also if it is partitioned by ZeRO-3 or on the meta device."""
    from torch import nn  # the forecast imports this module without torch

    config = hf.config.get_text_config()
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    body = [m.weight for m in hf.base_model.modules() if isinstance(m, nn.Linear)]
    head = [] if hasattr(hf, "score") else [hf.get_output_embeddings().weight]
    sizes = (_numbers(body), _numbers(body, trained=True), _numbers(head), _numbers(head, trained=True))
    return MatrixSizes(*sizes, attention=layers * heads * width, cache=2 * layers * groups * width)


def _numbers(weights: list, trained: bool = False) -> int:
    return sum(getattr(w, "ds_numel", w.numel()) for w in weights if w.requires_grad or not trained)


def forward(sizes: MatrixSizes, lengths, logits: float = 0) -> float:
    """FLOPs of a forward pass. lengths: tokens of each sequence; logits: tokens, over all of them, that get logits."""
    return 2.0 * sizes.body * _tokens(lengths) + 4.0 * sizes.attention * _pairs(lengths) + 2.0 * sizes.head * logits


def training(sizes: MatrixSizes, lengths, logits: float = 0) -> float:
    """FLOPs of forward and backward together."""
    weights = 2.0 * sizes.body_trained * _tokens(lengths) + 2.0 * sizes.head_trained * logits
    return 2 * forward(sizes, lengths, logits) + weights + 4.0 * sizes.attention * _pairs(lengths)


def _tokens(lengths) -> float:
    return float(sum(_listed(lengths)))


def _pairs(lengths) -> float:
    return sum(n * (n + 1) for n in _listed(lengths)) / 2


def _listed(lengths) -> list:
    """A list, an array or a tensor as a list."""
    return lengths.tolist() if hasattr(lengths, "tolist") else lengths


def decode_bytes(sizes: MatrixSizes, steps: float, cached: float, itemsize: int) -> float:
    """Bytes that decoding must read. steps: of the whole batch; cached: tokens read from the cache, summed over rows and steps."""
    return itemsize * ((sizes.body + sizes.head) * float(steps) + sizes.cache * float(cached))


def mfu(flops: float, seconds: float, tflops: float, devices: int = 1) -> float:
    """Model FLOPs utilisation: share of the data sheet's matrix rate. tflops: of one device, TFLOP/s."""
    return flops / seconds / (tflops * 1e12 * devices)


def mbu(read: float, seconds: float, gb_s: float) -> float:
    """Memory bandwidth utilisation: share of the data sheet's rate. read: bytes on one device; gb_s: its bandwidth, GB/s."""
    return read / seconds / (gb_s * 1e9)
