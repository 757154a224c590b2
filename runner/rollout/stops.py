"""Stop strings, found after sampling.

A response up to its stop string does not depend on what follows, so it can be cut afterwards, in the same way for every engine.
"""

from bisect import bisect_left

import torch

from runner.rollout.record import Rollout


def stop_at_strings(rollout: Rollout, tokenizer, strings: list[str], pad: int) -> None:
    """Cut each response after the token that completes the first stop string. rollout: freshly sampled, on the CPU; in place."""
    rows = zip(rollout.responses.tolist(), rollout.lengths.tolist(), strict=True)
    ends = [end_of(tokenizer, ids[:length], strings) for ids, length in rows]
    rollout.stopped = torch.tensor([end is not None for end in ends])
    rollout.lengths = torch.tensor([end or length for end, length in zip(ends, rollout.lengths.tolist(), strict=True)])
    rollout.ended = rollout.ended & ~rollout.stopped
    real = rollout.mask.bool()
    rollout.responses = rollout.responses.masked_fill(~real, pad)
    rollout.sampled_logprobs = rollout.sampled_logprobs.masked_fill(~real, 0.0)


def end_of(tokenizer, ids: list[int], strings: list[str]) -> int | None:
    """Number of tokens up to the one that completes the first stop string; None if there is none."""

    def has_one(count: int) -> bool:
        text = tokenizer.decode(ids[:count], skip_special_tokens=True)
        return any(string in text for string in strings)

    return bisect_left(range(len(ids)), True, key=lambda n: has_one(n + 1)) + 1 if has_one(len(ids)) else None
