"""Sizes that sampling uses and the forecast counts with. No torch here."""

# Prompt tokens per prefill
PREFILL_TOKENS = 16384
# The trainer rereads every PROBE-th row of a rollout, to check that it agrees with the sampler
PROBE = 8


def fits_whole(weights: float, free: float) -> bool:
    """Whether sampling under ZeRO-3 gathers all weights once: only if that leaves half of the GPU's free memory for the cache. In bytes."""
    return 2 * weights < free
