"""Which stage a prompt belongs to, and whether it is held out: a function of its text alone.

The hash of the first human turn decides. So a prompt is in exactly one stage, whatever the seed, the order, or the data sets that contain
it, and no stage trains or evaluates on what another one has trained on. Rows that one stage alone can use, and those that a user wants to
evaluate on, are apart from this: runner/data/examples.py.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence

from runner.config.schema import PhaseSplit


def prompt_hash(turns: Sequence[dict]) -> int:
    """64-bit hash of the first human turn, without case, punctuation and spacing, however its accents are encoded."""
    first = next((t["content"] for t in turns if t["role"] == "user"), turns[0]["content"])
    normalised = " ".join(re.findall(r"\w+", unicodedata.normalize("NFC", first.lower()))) or first
    return int.from_bytes(hashlib.sha256(normalised.encode()).digest()[:8], "big")


def phase_of(number: int, split: PhaseSplit) -> str:
    """The stage that owns a prompt hash, in proportion to the shares."""
    shares = {"sft": split.sft, "reward": split.reward, "ppo": split.ppo}
    point, total, edge = number / 2**64, sum(shares.values()), 0.0
    for stage, share in shares.items():
        edge += share / total
        if point < edge:
            return stage
    return max(shares, key=shares.get)


def held_out(number: int, holdout: float) -> bool:
    """Whether a prompt hash is held out for evaluation."""
    return held_out_above(number) < holdout


def held_out_above(number: int) -> float:
    """The dataset.holdout above which a prompt is held out. Uses other bits than the phase, so that every phase loses the same share."""
    mixed = hashlib.sha256(number.to_bytes(8, "big")).digest()[:8]
    return int.from_bytes(mixed, "big") / 2**64
