"""The record of a rollout: prompts, responses, and everything computed from them.

B responses, P prompt tokens (left-padded), R response tokens (right-padded). After `gather` every rank holds the rows of all ranks, a few
megabytes: whitening, minibatches and statistics are then global without further communication. It stays on the CPU, where micro batches
are packed, so that nobody waits for the GPU to learn a length.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from runner import ranks
from runner.models.packing import spread

CPU = torch.device("cpu")


@dataclass
class Rollout:
    prompts: Tensor  # (B, P) token ids
    prompt_lengths: Tensor  # (B,)
    responses: Tensor  # (B, R) token ids, EOS included, PAD after it
    lengths: Tensor  # (B,) real tokens of each response, EOS included
    ended: Tensor  # (B,) bool: the response ends with EOS
    stopped: Tensor | None = None  # (B,) bool: cut at a stop string instead (stops.py); None without stop strings
    sampled_logprobs: Tensor | None = None  # (B, R) as computed by the sampler
    logprobs: Tensor | None = None  # (B, R) PPO's old log-probabilities: the sampler's, or the trainer's (collect.fill_logprobs)
    mismatch: Tensor | None = None  # (B, R) |sampler - trainer| in nats; 0 on rows that the trainer did not read
    recomputed: Tensor | None = None  # (B,) bool: the trainer read this row too
    ref_logprobs: Tensor | None = None  # (B, R) of the SFT model
    values: Tensor | None = None  # (B, R) of the critic, before each token
    scores: Tensor | None = None  # (B,) of the reward model, raw
    rewards: Tensor | None = None  # (B, R)
    advantages: Tensor | None = None  # (B, R)
    returns: Tensor | None = None  # (B, R)

    def __len__(self) -> int:
        return len(self.prompts)

    def tokens(self) -> int:
        """Real tokens of prompts and responses."""
        return int(self.lengths.sum() + self.prompt_lengths.sum())

    def as_rows(self, chosen) -> Iterator[dict]:
        """Some responses as plain rows, for bad_batch_step_N.jsonl."""
        for n in chosen:
            prompt, response = self.prompts[n, -int(self.prompt_lengths[n]) :], self.responses[n, : int(self.lengths[n])]
            score = None if self.scores is None else float(self.scores[n])
            yield {"row": int(n), "prompt_ids": prompt.tolist(), "response_ids": response.tolist(), "score": score}

    def sampled(self) -> dict[str, Tensor]:
        """Every tensor that cannot be recomputed without the models, by name."""
        derived = ("rewards", "advantages", "returns")
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None and f.name not in derived}

    @property
    def mask(self) -> Tensor:
        """(B, R) fp32: 1 on real response tokens."""
        positions = torch.arange(self.responses.size(1), device=self.lengths.device)
        return (positions < self.lengths.unsqueeze(1)).float()

    @property
    def finished(self) -> Tensor:
        """(B,) bool: the response ended by itself, before the limit."""
        return self.ended if self.stopped is None else self.ended | self.stopped

    def as_judged(self, eos: int, most: int) -> "Rollout":
        """The rollout with EOS appended after stop strings, within `most` tokens: the reward model has learnt to score at EOS."""
        if self.stopped is None:
            return self
        closed = self.stopped & (self.lengths < most)
        at = torch.arange(self.responses.size(1) + 1) == self.lengths.unsqueeze(1)
        responses = widen(self.responses, at.size(1), 0).masked_fill(at & closed.unsqueeze(1), eos)
        return Rollout(self.prompts, self.prompt_lengths, responses, self.lengths + closed, self.ended | closed)

    def sequences(self) -> tuple[Tensor, Tensor]:
        """Prompt and response in one row, and its attention mask. (B, P + R) each."""
        ids = torch.cat([self.prompts, self.responses], dim=1)
        width = self.prompts.size(1)
        prompt_mask = torch.arange(width, device=ids.device) >= (width - self.prompt_lengths).unsqueeze(1)
        return ids, torch.cat([prompt_mask.long(), self.mask.long()], dim=1)

    def response_index(self) -> tuple[Tensor, Tensor]:
        """Where the actor predicts response tokens: positions in the flattened (B * (P + R)), and those tokens. (N,), (N,)."""
        width = self.prompts.size(1) + self.responses.size(1)
        row, column = self.mask.nonzero(as_tuple=True)
        return row * width + self.prompts.size(1) + column - 1, self.responses[row, column]

    def response_steps(self) -> Tensor:
        """Position of each of those tokens in its response, from 0. (N,)."""
        return self.mask.nonzero(as_tuple=True)[1]

    def spread(self, flat: Tensor) -> Tensor:
        """Per-token results (N,) in the order of `response_index` -> (B, R), 0 on padding. On the results' device."""
        return spread(flat, self.mask)

    def to(self, device: torch.device) -> "Rollout":
        return Rollout(**{f.name: value.to(device) for f in fields(self) if (value := getattr(self, f.name)) is not None})

    def rows(self, index: Tensor) -> "Rollout":
        """Some rows, without columns that are padding in all of them."""
        picked = {f.name: getattr(self, f.name)[index] for f in fields(self) if getattr(self, f.name) is not None}
        prompt_width, width = int(picked["prompt_lengths"].max()), int(picked["lengths"].max())
        for name, value in picked.items():
            if name == "prompts":
                picked[name] = value[:, -prompt_width:]
            elif value.dim() == 2:
                picked[name] = value[:, :width]
        return Rollout(**picked)

    def first(self, count: int) -> "Rollout":
        """The first `count` rows, or all if there are fewer."""
        return self.rows(torch.arange(min(count, len(self))))

    def gather(self, pad: int, device: torch.device) -> "Rollout":
        """The rows of all ranks, on every rank's CPU, in the order of the prompts (rank r holds every world-th row). Collective.

        device: where the ranks exchange them. NCCL can only read GPU memory.
        """
        world = ranks.world()
        return self.to(CPU) if world == 1 else self.to(device)._gathered(pad, world).to(CPU)

    def _gathered(self, pad: int, world: int) -> "Rollout":
        widths = torch.tensor([self.prompts.size(1), self.responses.size(1)], device=self.prompts.device)
        dist.all_reduce(widths, op=dist.ReduceOp.MAX)
        same = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        for name, value in same.items():
            if value.dim() == 2:
                same[name] = widen(
                    value, int(widths[0 if name == "prompts" else 1]), pad if not value.is_floating_point() else 0, left=name == "prompts"
                )
        return Rollout(**{name: _interleave(value, world) for name, value in same.items()})


def widen(x: Tensor, width: int, fill: float, left: bool = False) -> Tensor:
    """(B, T) -> (B, width), new columns filled."""
    missing = width - x.size(1)
    return torch.nn.functional.pad(x, (missing, 0) if left else (0, missing), value=fill)


def _interleave(x: Tensor, world: int) -> Tensor:
    is_bool = x.dtype == torch.bool
    x = x.to(torch.uint8) if is_bool else x.contiguous()
    parts = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x)
    out = torch.stack(parts, dim=1).flatten(0, 1)
    return out.bool() if is_bool else out
