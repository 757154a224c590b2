"""Stop strings: a response ends with the token that completes one.

They are compiled into one table, in which sampling looks up a number per token. The table is that of the automaton of A. V. Aho and M. J.
Corasick ("Efficient string matching: an aid to bibliographic search", 1975) over bytes, which reads all bytes of a token at once.
A stop string is thus found wherever its bytes stand, in whatever tokens, and no text is decoded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from runner.models.token_bytes import token_bytes
from runner.rollout.record import Rollout


@dataclass
class Stops:
    """Compiled stop strings.

    table (vocabulary, states) int32: the state that each token leads to from each state. State 0 is the first; the last one says that a
    stop string has been reached, and is never left.
    """

    strings: Sequence[str]
    table: Tensor

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], rows: int, device: torch.device | str = "cpu") -> "Stops":
        """rows: of the model's embeddings. The strings are not empty."""
        step = automaton([string.encode() for string in strings])
        return Stops(strings, torch.from_numpy(table(step, token_bytes(tokenizer, range(rows)))).to(device))

    def next(self, states: Tensor, tokens: Tensor) -> Tensor:
        """(B,), (B,) -> states (B,)."""
        return self.table[tokens, states].long()

    def reached(self, states: Tensor) -> Tensor:
        return states == self.table.size(1) - 1

    def cut(self, rollout: Rollout, pad: int) -> None:
        """Cut each response behind its first stop string. In place; before log-probabilities are put in."""
        states = torch.zeros_like(rollout.lengths)
        ends, lengths = torch.zeros_like(states), rollout.lengths
        for count, tokens in enumerate(rollout.responses.unbind(1), 1):
            states = torch.where(count <= lengths, self.next(states, tokens), states)
            ends = torch.where(self.reached(states) & (ends == 0), count, ends)
        rollout.stopped = ends > 0
        rollout.lengths = torch.where(rollout.stopped, ends, lengths)
        rollout.ended = rollout.ended & ~rollout.stopped
        rollout.responses = rollout.responses.masked_fill(~rollout.mask.bool(), pad)


def automaton(strings: list[bytes]) -> np.ndarray:
    """(states, 256): the state after each byte. A state is the longest end of what was read that begins a string; the last one, that a
    whole string was read, is never left."""
    begun = sorted({string[:n] for string in strings for n in range(len(string))})  # nothing comes first
    number, whole = {prefix: n for n, prefix in enumerate(begun)}, len(begun)
    step = np.zeros((whole + 1, 256), dtype=np.int32)
    for prefix in begun:
        for byte in set(b"".join(strings)):
            read = prefix + bytes([byte])
            ends = (read[n:] for n in range(len(read) + 1))
            step[number[prefix], byte] = whole if read.endswith(tuple(strings)) else next(number[end] for end in ends if end in number)
    step[whole] = whole
    return step


def table(step: np.ndarray, tokens: list[bytes]) -> np.ndarray:
    """(tokens, states): the state that all bytes of each token lead to from each state."""
    lengths = np.array([len(token) for token in tokens])
    longest_first = np.argsort(-lengths, kind="stable")
    states = np.tile(np.arange(len(step), dtype=np.int32), (len(tokens), 1))
    for n in range(lengths.max()):
        longer = longest_first[: (lengths > n).sum()]
        byte = np.array([tokens[token][n] for token in longer])
        states[: len(longer)] = step[states[: len(longer)], byte[:, None]]
    found = np.empty_like(states)
    found[longest_first] = states
    return found
