"""Reproducible sampling: the random number of token t of response i depends only on (seed, i, t).

One uniform number per token is enough to sample from any distribution, by inverting its cumulative sum. Drawn from a counter-based
generator, it makes a rollout independent of batch size, number of ranks, and interruptions.
"""

import numpy as np
import torch
from torch import Tensor


def uniforms(seed: int, episodes: list[int], tokens: int) -> Tensor:
    """Uniform numbers in [0, 1) for each response and token. episodes: number of each response in the run. Returns (B, tokens)."""
    rows = [np.random.Generator(np.random.Philox(key=[seed, episode])).random(tokens) for episode in episodes]
    return torch.from_numpy(np.stack(rows))


def invert(logits: Tensor, uniform: Tensor) -> Tensor:
    """Sample from softmax(logits) with given uniform numbers. (B, V), (B,) -> (B,) token ids.

    Double precision: at 250k tokens an fp32 cumulative sum misses tail tokens.
    """
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    point = uniform.to(cumulative).unsqueeze(-1) * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, point, right=True).squeeze(-1)
    # A point that rounds past the end: take the last token with any probability
    return torch.minimum(token, (cumulative < cumulative[:, -1:]).sum(dim=-1))
