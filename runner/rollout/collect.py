"""From prompts to a scored rollout: sampling responses, then reading them with actor, reference, critic and reward model."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from runner import engine, ranks
from runner.data.batches import pad, send
from runner.rollout import hf
from runner.rollout.record import CPU, Rollout, widen
from runner.rollout.sampling import uniforms
from runner.watch import stop


@dataclass
class Models:
    """The four models of PPO. ref is None where the actor without its adapters is the reference."""

    actor: object  # DeepSpeed engine around an Actor
    critic: object  # DeepSpeed engine around a Scalar
    ref: torch.nn.Module | None  # Actor, frozen
    reward: torch.nn.Module  # Scalar, frozen

    def reference(self):
        """(model, context) whose log-probabilities are the reference's."""
        if self.ref is not None:
            return self.ref, nullcontext()
        return self.actor, self.actor.module.without_adapter()


@dataclass
class Reader:
    """Sizes and special tokens that sampling and scoring need."""

    pad: int
    eos: int
    max_response: int
    rollout_micro: int
    score_micro: int
    device: torch.device


@torch.no_grad()
def collect(
    models: Models,
    reader: Reader,
    prompts: list[list[int]],
    seed: int,
    episodes: list[int],
    *,
    with_values: bool = True,
    stoppable: bool = False,
) -> Rollout:
    """Sample a response to each prompt and score it. Returns the rows of all ranks on every rank, in order. Collective.

    Args:
        prompts: token lists of the whole batch, the same on every rank; their number divides by the number of ranks.
        episodes: number of each response in the run; with the seed it fixes what is sampled.
        stoppable: raise Stopped between two micro batches when someone asks for it.
    """
    mine = slice(ranks.rank(), None, ranks.world())
    rollout = sample(models, reader, prompts[mine], seed, episodes[mine], stoppable).to(CPU)
    score(models, reader, rollout, with_values)
    return rollout.gather(reader.pad, reader.device)


def sample(models: Models, reader: Reader, prompts: list[list[int]], seed: int, episodes: list[int], stoppable: bool = False) -> Rollout:
    """Responses of this rank's prompts."""
    models.actor.eval()
    parts = []
    with engine.whole_weights(models.actor) as actor:
        for start in range(0, len(prompts), reader.rollout_micro):
            if stoppable and (reason := stop.asked()):
                raise stop.Stopped(reason)
            rows = prompts[start : start + reader.rollout_micro]
            ids, mask = pad(rows, reader.pad, left=True)
            uniform = uniforms(seed, episodes[start : start + reader.rollout_micro], reader.max_response)
            lengths = mask.sum(dim=1).to(reader.device)
            parts.append(hf.generate(actor, ids.to(reader.device), lengths, uniform, pad=reader.pad, eos=reader.eos))
    return join(parts, reader.pad)


def join(parts: list[Rollout], fill: int) -> Rollout:
    """Freshly sampled rollouts one below the other."""
    width = max(p.prompts.size(1) for p in parts)
    length = max(p.responses.size(1) for p in parts)
    return Rollout(
        prompts=torch.cat([widen(p.prompts, width, fill, left=True) for p in parts]),
        prompt_lengths=torch.cat([p.prompt_lengths for p in parts]),
        responses=torch.cat([widen(p.responses, length, fill) for p in parts]),
        lengths=torch.cat([p.lengths for p in parts]),
        ended=torch.cat([p.ended for p in parts]),
        sampled_logprobs=torch.cat([widen(p.sampled_logprobs, length, 0.0) for p in parts]),
    )


def score(models: Models, reader: Reader, rollout: Rollout, with_values: bool) -> None:
    """Fill in logprobs, ref_logprobs, values and scores of this rank's rows."""
    models.critic.eval()
    shape = (3, *rollout.responses.shape)
    tables, scores = torch.zeros(shape, device=reader.device), torch.zeros(len(rollout), device=reader.device)
    logprobs, ref_logprobs, values = tables
    for start in range(0, len(rollout), reader.score_micro):
        rows = slice(start, start + reader.score_micro)
        part = rollout.rows(torch.arange(len(rollout))[rows])
        width = part.responses.size(1)
        logprobs[rows, :width] = response_logprobs(models.actor, part)[0]
        ref, context = models.reference()
        with context:
            ref_logprobs[rows, :width] = response_logprobs(ref, part)[0]
        if with_values:
            values[rows, :width] = response_values(models.critic, part)
        scores[rows] = final_scores(models.reward, part)
    rollout.logprobs, rollout.ref_logprobs, rollout.values = tables.to(CPU)
    rollout.scores = scores.to(CPU)


def response_logprobs(actor, part: Rollout, with_entropy: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probabilities (and entropies) of the response tokens. part on the CPU -> (B, R) on the actor's device, 0 on padding."""
    ids, mask = part.sequences()
    index, targets = part.response_index()
    logprobs, entropies = actor(ids, mask, index, targets, with_entropy)
    return part.spread(logprobs), part.spread(entropies)


def response_values(critic, part: Rollout) -> Tensor:
    """Value of the state before each response token: read one position earlier. (B, R)."""
    ids, mask = part.sequences()
    values = critic(ids, mask)[:, part.prompts.size(1) - 1 : -1]
    return values * send(part.mask, values.device)


def final_scores(reward, part: Rollout) -> Tensor:
    """The reward model's score at the last real token, which is EOS where the response ended. (B,)."""
    ids, mask = part.sequences()
    values, last = reward(ids, mask), part.prompts.size(1) + part.lengths - 1
    return values.gather(1, send(last.unsqueeze(1), values.device)).squeeze(1)
