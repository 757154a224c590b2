"""Sizes by which sampling is done, and by which the forecast counts it: no torch here."""

# Tokens of prompts that are read in one forward
PREFILL_TOKENS = 16384
# The trainer reads every so manyth row of a rollout again, to see whether it agrees with the sampler
PROBE = 8


def fits_whole(weights: float, free: float) -> bool:
    """Whether sampling under ZeRO-3 gathers all weights once: they leave half of a GPU's free memory to the cache. Both in bytes."""
    return 2 * weights < free
