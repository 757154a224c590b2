"""Parameters that ZeRO-3 has partitioned, whole again for a moment."""

from collections.abc import Iterator
from contextlib import contextmanager

from runner import ranks


@contextmanager
def gathered(parameters: list, modify: bool = False) -> Iterator[bool]:
    """Whole parameters inside the block, also under ZeRO-3; there it yields True on rank 0 only, which alone may write (modify)."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        yield True
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if modify else None):
        yield ranks.rank() == 0
