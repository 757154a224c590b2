"""Stop strings.

A response is cut after sampling, behind the token that completes a stop string, in the same way for every engine. The decode engine also
asks now and then which responses hold one already, and samples no more of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from runner.rollout.record import Rollout

# Tokens at a response's end that are searched, besides as many as the longest string has bytes: more than are sampled between two looks
NEW = 16


@dataclass
class Stops:
    """Strings at which a response ends."""

    tokenizer: PreTrainedTokenizerBase
    strings: list[str]

    def reached(self, ids: Tensor) -> bool:
        """Whether one of the newest tokens of a response (T,) completed a stop string. May overlook one, which `cut` does not."""
        newest = ids[-NEW - max(len(string.encode()) for string in self.strings) :]
        return self.end_of(newest.tolist()) is not None and self.end_of(ids.tolist()) is not None

    def cut(self, rollout: Rollout, pad: int) -> None:
        """Cut each response behind its first stop string. rollout: freshly sampled, on the CPU; in place."""
        rows = zip(rollout.responses.tolist(), rollout.lengths.tolist(), strict=True)
        ends = [self.end_of(ids[:length]) for ids, length in rows]
        rollout.stopped = torch.tensor([end is not None for end in ends])
        rollout.lengths = torch.tensor([end or length for end, length in zip(ends, rollout.lengths.tolist(), strict=True)])
        rollout.ended = rollout.ended & ~rollout.stopped
        real = rollout.mask.bool()
        rollout.responses = rollout.responses.masked_fill(~real, pad)
        rollout.sampled_logprobs = rollout.sampled_logprobs.masked_fill(~real, 0.0)

    def end_of(self, ids: list[int]) -> int | None:
        """Number of tokens up to the one that completes the first stop string; None if there is none. More tokens never change it."""
        text, longest = "", max(map(len, self.strings))
        for count, piece in enumerate(self._pieces(ids), 1):
            if piece:
                text = text[-longest:] + piece
                if any(string in text for string in self.strings):
                    return count
        return None

    def _pieces(self, ids: list[int]) -> Iterator[str]:
        """The text that each token adds; none while a character is incomplete.

        Decoding all tokens up to each one would not do: LLaMA's tokenizer spells line breaks and rare characters in bytes, and makes a
        whole run of them unreadable while the last character is incomplete, so that a string comes and goes.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:  # a tokenizer in Python
            texts = (self.tokenizer.decode(ids[:n], skip_special_tokens=True) for n in range(len(ids) + 1))
            yield from (text.removeprefix(before) for before, text in pairwise(texts))
            return
        stream = DecodeStream(skip_special_tokens=True)
        for token in ids:
            try:
                piece = stream.step(backend, token)
            except Exception as error:  # it has no class of its own
                if "Invalid prefix" not in str(error):
                    raise
                # The bytes before this token were no text
                stream = DecodeStream(skip_special_tokens=True)
                piece = stream.step(backend, token)
            yield piece or ""
