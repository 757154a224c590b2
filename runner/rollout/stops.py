"""Stop strings.

A response up to its stop string does not depend on what follows, so it is cut after sampling, in the same way for every engine. The decode
engine also asks now and then which responses hold one already, and samples no more of them.
"""

from bisect import bisect_left
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from runner.rollout.record import Rollout

# Tokens of a response, besides as many as the longest string has characters, that are searched for a string which is new. More than
# the decode engine samples between two looks
NEW = 16


@dataclass
class Stops:
    """Strings at which a response ends. pad: the token behind its end."""

    tokenizer: PreTrainedTokenizerBase
    strings: list[str]
    pad: int

    def reached(self, ids: list[int]) -> bool:
        """Whether one of the newest tokens of a response completed a stop string. May overlook one, where texts merge; `cut` does not."""
        end = ids[-NEW - max(map(len, self.strings)) :]
        return self._in(end) and self._in(ids)

    def cut(self, rollout: Rollout) -> None:
        """Cut each response after the token that completes the first stop string. rollout: freshly sampled, on the CPU; in place."""
        rows = zip(rollout.responses.tolist(), rollout.lengths.tolist(), strict=True)
        ends = [self._end(ids[:length]) for ids, length in rows]
        rollout.stopped = torch.tensor([end is not None for end in ends])
        rollout.lengths = torch.tensor([end or length for end, length in zip(ends, rollout.lengths.tolist(), strict=True)])
        rollout.ended = rollout.ended & ~rollout.stopped
        real = rollout.mask.bool()
        rollout.responses = rollout.responses.masked_fill(~real, self.pad)
        rollout.sampled_logprobs = rollout.sampled_logprobs.masked_fill(~real, 0.0)

    def _end(self, ids: list[int]) -> int | None:
        """Number of tokens up to the one that completes the first stop string; None if there is none."""
        return bisect_left(range(len(ids)), True, key=lambda n: self._in(ids[: n + 1])) + 1 if self._in(ids) else None

    def _in(self, ids: list[int]) -> bool:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return any(string in text for string in self.strings)
