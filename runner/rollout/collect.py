"""From prompts to a scored rollout: sample responses, then score them with actor, reference, critic and reward model."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from runner import engine, ranks
from runner.batch_sizes import PROBE
from runner.data.batches import pad
from runner.device import send
from runner.losses import masked_sum
from runner.models.wrappers import Actor
from runner.rollout import graph, hf
from runner.rollout.families import network_of
from runner.rollout.record import CPU, Rollout, widen
from runner.rollout.sampling import uniforms
from runner.rollout.stats import Stats
from runner.rollout.stops import Stops
from runner.watch import stop

# Batches that the decode engine samples in one go, at the end of which lanes rest. A run can only stop between two goes
WAVE = 16


@dataclass
class Models:
    """The four models of PPO. ref is None where the actor without its adapters is the reference."""

    actor: object  # DeepSpeed engine around an Actor
    critic: object  # DeepSpeed engine around a Scalar
    ref: torch.nn.Module | None  # Actor, frozen
    reward: torch.nn.Module  # Scalar, frozen

    def reference(self):
        """(model, context) whose log-probabilities are the reference's."""
        return engine.reference(self.actor, self.ref)


@dataclass
class RolloutSettings:
    """Sizes, special tokens and settings that sampling and scoring need."""

    pad: int
    eos: int
    max_response: int
    rollout_micro: int  # responses sampled at a time
    score_micro: int  # responses scored at a time
    device: torch.device
    engine: str = "auto"
    max_mismatch: float = 0.0  # nats per token; see `fill_logprobs`
    stops: Stops | None = None
    stats: Stats = field(default_factory=Stats)  # of the newest rollout, on this rank


@torch.no_grad()
def collect(
    models: Models,
    settings: RolloutSettings,
    prompts: list[list[int]],
    seed: int,
    episodes: list[int],
    *,
    with_values: bool = True,
    stoppable: bool = False,
    phase=nullcontext,
) -> Rollout:
    """Sample a response to each prompt and score it. Returns the responses of all ranks on every rank, in order. Collective.

    Args:
        prompts: token lists of the whole batch, the same on every rank; the number of ranks must divide their number.
        episodes: number of each response in the run; together with the seed it determines what is sampled.
        stoppable: raise Stopped, when someone asks for it, between two goes of sampling (see WAVE).
        phase: RunLog.phase, which books the time on a phase by name.
    """
    mine = slice(ranks.rank(), None, ranks.world())
    with phase("rollout"):
        rollout = sample(models, settings, prompts[mine], seed, episodes[mine], stoppable).to(CPU)
    with phase("scoring"):
        score(models, settings, rollout, with_values)
    return rollout.gather(settings.pad, settings.device)


def sample(
    models: Models, settings: RolloutSettings, prompts: list[list[int]], seed: int, episodes: list[int], stoppable: bool = False
) -> Rollout:
    """Sample responses to this rank's prompts."""
    models.actor.eval()
    settings.stats = Stats()
    with engine.whole_weights(models.actor) as (actor, whole):
        return respond(actor, settings, prompts, seed, episodes, whole=whole, stoppable=stoppable)


@torch.no_grad()
def respond(
    actor: Actor,
    settings: RolloutSettings,
    prompts: list[list[int]],
    seed: int,
    episodes: list[int],
    *,
    whole: bool = True,
    stoppable: bool = False,
) -> Rollout:
    """Sample a response to each prompt. whole: the actor has all its weights; see engine.whole_weights."""
    parts, ends = [], {"pad": settings.pad, "eos": settings.eos, "stops": settings.stops}
    network = network_of(actor.hf) if whole and settings.engine != "hf" else None
    if network is not None:
        network = graph.folded(network)
    together = settings.rollout_micro * (WAVE if network else 1)
    for start in range(0, len(prompts), together):
        if stoppable and (reason := stop.asked()):
            raise stop.Stopped(reason)
        rows = prompts[start : start + together]
        uniform = uniforms(seed, episodes[start : start + together], settings.max_response)
        if network is None:
            ids, mask = (x.to(settings.device) for x in pad(rows, settings.pad, left=True))
            parts.append(hf.generate(actor, ids, mask.sum(dim=1), uniform, **ends, together=not whole))
            continue
        options = {"slots": settings.rollout_micro, "min_tokens": actor.min_tokens, "vocabulary": actor.vocabulary}
        decoder = graph.Decoder(network, actor.sampling, rows, uniform, **ends, **options)
        parts.append(decoder.run())
        settings.stats.add(decoder.stats)
        del decoder  # frees its cache before the next one allocates as much
    return join(parts, settings.pad)


def join(parts: list[Rollout], fill: int) -> Rollout:
    """Concatenate freshly sampled rollouts."""
    width = max(p.prompts.size(1) for p in parts)
    length = max(p.responses.size(1) for p in parts)
    return Rollout(
        prompts=torch.cat([widen(p.prompts, width, fill, left=True) for p in parts]),
        prompt_lengths=torch.cat([p.prompt_lengths for p in parts]),
        responses=torch.cat([widen(p.responses, length, fill) for p in parts]),
        lengths=torch.cat([p.lengths for p in parts]),
        ended=torch.cat([p.ended for p in parts]),
        stopped=None if parts[0].stopped is None else torch.cat([p.stopped for p in parts]),
        sampled_logprobs=torch.cat([widen(p.sampled_logprobs, length, 0.0) for p in parts]),
    )


def score(models: Models, settings: RolloutSettings, rollout: Rollout, with_values: bool) -> None:
    """Fill in logprobs, ref_logprobs, values and scores of this rank's rows."""
    models.critic.eval()
    fill_logprobs(models, settings, rollout)
    tables, scores = torch.zeros(2, *rollout.responses.shape, device=settings.device), torch.zeros(len(rollout), device=settings.device)
    ref_logprobs, values = tables
    for rows, part in micro_batches(rollout, torch.arange(len(rollout)), settings.score_micro):
        rows, width = send(rows, settings.device), part.responses.size(1)
        ref, context = models.reference()
        with context:
            ref_logprobs[rows, :width] = response_logprobs(ref, part)[0]
        if with_values:
            values[rows, :width] = response_values(models.critic, part)
        scores[rows] = final_scores(models.reward, part.as_judged(settings.eos, settings.max_response))
    rollout.ref_logprobs, rollout.values = tables.to(CPU)
    rollout.scores = scores.to(CPU)


def fill_logprobs(models: Models, settings: RolloutSettings, rollout: Rollout) -> None:
    """Fill in logprobs: the sampler's own if the trainer, on a share of the rollout, agrees within `max_mismatch`; else the trainer's.

    The sampler's save a forward pass and are the right ones: PPO's ratio is relative to the distribution that was sampled from. But a
    sampler far from the trainer (another model, lost precision) must not teach. All ranks decide alike. Collective.
    """
    read = torch.zeros(rollout.responses.shape, device=settings.device)
    rollout.recomputed = torch.zeros(len(rollout), dtype=torch.bool)

    def look(numbers: Tensor) -> Tensor:
        for rows, part in micro_batches(rollout, numbers, settings.score_micro):
            read[send(rows, settings.device), : part.responses.size(1)] = response_logprobs(models.actor, part)[0]
        rollout.recomputed[numbers] = True
        rollout.mismatch = (rollout.sampled_logprobs - read.to(CPU)).abs() * rollout.mask * rollout.recomputed.unsqueeze(1)
        return rollout.mismatch.sum()

    # Probe all over the rollout: rows that took over a finished row's place may be wrong where the first ones are not
    probe = torch.arange(0, len(rollout), PROBE if settings.max_mismatch else 1)
    seen = {"mismatch": look(probe), "tokens": masked_sum(rollout.mask, rollout.recomputed.float().unsqueeze(1))}
    seen = ranks.all_reduce_sum(seen, settings.device)
    if seen["mismatch"] <= settings.max_mismatch * seen["tokens"]:
        rollout.logprobs = rollout.sampled_logprobs.clone()
    else:
        look((~rollout.recomputed).nonzero().squeeze(1))
        rollout.logprobs = read.to(CPU)


def micro_batches(rollout: Rollout, numbers: Tensor, size: int) -> Iterator[tuple[Tensor, Rollout]]:
    """Yield (row numbers, those rows), `size` at a time."""
    for rows in numbers.split(size):
        if len(rows):
            yield rows, rollout.rows(rows)


def response_logprobs(actor, part: Rollout, with_entropy: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probabilities (and entropies) of the response tokens. part on the CPU -> (B, R) on the actor's device, 0 on padding."""
    ids, mask = part.sequences()
    logprobs, entropies = actor(ids, mask, *part.response_index(), with_entropy, part.response_steps())
    return part.spread(logprobs), part.spread(entropies)


def response_values(critic, part: Rollout) -> Tensor:
    """Value of the state before each response token: read one position earlier. (B, R)."""
    ids, mask = part.sequences()
    values = critic(ids, mask)[:, part.prompts.size(1) - 1 : -1]
    return values * send(part.mask, values.device)


def final_scores(reward, part: Rollout) -> Tensor:
    """The reward model's score at the last real token, which is EOS if the response ended. (B,)."""
    ids, mask = part.sequences()
    values, last = reward(ids, mask), part.prompts.size(1) + part.lengths - 1
    return values.gather(1, send(last.unsqueeze(1), values.device)).squeeze(1)
