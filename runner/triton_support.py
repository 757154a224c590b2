"""Whether Triton can compile kernels on this machine. Does not import it: CPU builds of PyTorch come without."""

import os
import shutil
from functools import cache
from importlib.util import find_spec


@cache
def why_no_triton() -> str | None:
    """What is missing for Triton; None if nothing is."""
    if find_spec("triton") is None:
        return "Triton is missing, which comes with PyTorch's CUDA builds"
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang", "cc")))):
        return "Triton finds no C compiler: install gcc"
    return None
