"""Invariants: what must hold during training for every model, data set and setting.

Each is a pure function of tensors and numbers. It returns None, or a message: what is broken, with numbers, what that most likely means,
and what to type. `check` then stops the run, or counts it and continues (`invariants=warn`). Every rank holds the whole rollout, so all
ranks decide alike.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from runner import ranks
from runner.config.rates import lower_rate
from runner.config.schema import Config
from runner.durable.shards import shards, steps_taken
from runner.errors import UserError
from runner.losses import masked_mean
from runner.metrics import RunLog
from runner.rollout.collect import RolloutSettings
from runner.rollout.record import Rollout

Findings = dict[str, str | None]  # name of the invariant -> what is broken, or None

# Largest mean difference of a log-probability (and so of a ratio from 1) between two ways to compute it from the same weights: token by
# token with a cache, in one pass, in another micro batch. The tiny models of tests/tiny.py differ by at most 6e-7 in fp32 and 0.009 in
# bf16. Depth adds to it, and bf16 rounds a logit of 16 by up to 0.06: in bf16 the bound catches another model, but not weights that are a
# few steps old or a slightly wrong temperature
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.1}

# Tokens y drawn from P have E[prod Q(y) / P(y)] <= 1 for every distribution Q. So by Markov's inequality the sum over a rollout of
# log P - log Q, which estimates its KL, falls below -30 with a probability of at most e^-30, whatever its size and variance. A bound in
# standard errors would need the variance, which eight responses do not give
KL_SLACK = 30.0  # nats per rollout
# A Q that depends on the micro batch by rounding noise s per token loses s^2 / 2: nothing in fp32, 4e-4 at s = 0.03
KL_ROUNDING = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}  # nats per token

# Parameters whose gradient is zero up to rounding, so that in fp32 they may never move. OPT's keys: their bias adds the same number to
# all attention scores of a query, which softmax cancels. The last norm, in OPT-350m that of its last layer: with reward.center_coef=0 its
# bias shifts both scores of a pair by the same amount
IDLE = ("k_proj.bias", "final_layer_norm.bias", "ln_f.bias")

# Steps of AdamW after which a parameter that never moved is no accident. Before that its gradient may have been zero in fp16, or so far
# below AdamW's epsilon that the step was lost in rounding
SURE = 20

# Elements summed at a time: a sum in double precision copies them
CHUNK = 2**20


def check(log: RunLog, where: str, findings: Findings) -> None:
    """Act on broken invariants as the key `invariants` says. where: 'iteration 3'.

    Raises UserError for the first one; with `warn` logs each name once, and counts it in the metrics as invariants/<name>.
    """
    for name, fault in findings.items():
        if fault is None:
            continue
        message = f"invariant {name} is broken in {where}: {fault}"
        if log.cfg.invariants == "stop":
            raise UserError(f"{message}. To continue anyway, type invariants=warn")
        if name not in log.broken:
            log.say(f"{message}. Continuing (invariants=warn); from now on only counted, as invariants/{name}")
        log.broken[name] += 1


def of_rollout(cfg: Config, settings: RolloutSettings, rollout: Rollout) -> Findings:
    """All invariants of a gathered and scored rollout, and of its advantages if it has them. Causes come before consequences."""
    precision, mask = cfg.hardware.precision, rollout.mask
    findings = {
        "eos_and_pad": eos_and_pad(rollout, settings.pad, settings.eos, settings.max_response),
        "finite_rollout": finite_rollout(rollout, lower_rate(cfg, "ppo")),
        "rollout_weights": rollout_weights(rollout.mismatch, mask * rollout.recomputed.unsqueeze(1), precision),
        "kl_not_negative": kl_not_negative(rollout.sampled_logprobs, rollout.ref_logprobs, mask, precision, cfg.ppo.top_p),
        "scores_not_constant": scores_not_constant(rollout.scores, rollout.responses),
    }
    if rollout.advantages is not None:
        findings["advantages_not_zero"] = advantages_not_zero(rollout.advantages, mask, cfg.ppo.whiten_advantages)
    return findings


# --- the rollout ------------------------------------------------------------------------------------------------------


def eos_and_pad(rollout: Rollout, pad: int, eos: int, limit: int) -> str | None:
    """Lengths, EOS and PAD of every row agree. limit: tokens of the longest response.

    A response may contain PAD, because an actor may sample it; then it has a log-probability below 0.
    """
    real, lengths, ended = rollout.mask.bool(), rollout.lengths, rollout.ended
    is_eos, is_pad = (rollout.responses == eos) & real, rollout.responses == pad
    last = is_eos.gather(1, (lengths.clamp(1, real.size(1)) - 1).unsqueeze(1)).squeeze(1)
    width = rollout.prompts.size(1)
    start = (width - rollout.prompt_lengths).unsqueeze(1)
    prompt_pad = rollout.prompts == pad
    first_is_pad = prompt_pad.gather(1, start.clamp(0, width - 1)).squeeze(1)
    behind_start = torch.arange(width, device=start.device) >= start
    faults = {
        f"are not 1 to {limit} tokens long": (lengths < 1) | (lengths > limit),
        "ended, but their last token is not EOS": ended & ~last,
        "ended, but contain more than one EOS": ended & (is_eos.sum(1) > 1),
        "did not end, but contain an EOS": ~ended & is_eos.any(1),
        f"did not end, but are shorter than the limit of {limit} tokens": ~rollout.finished & (lengths < limit),
        "contain a PAD that was never sampled": (is_pad & real & (rollout.sampled_logprobs == 0)).any(1),
        "have something other than PAD after their end": (~is_pad & ~real).any(1),
        "have a prompt without tokens, or one longer than the row": (start >= width).squeeze(1) | (start < 0).squeeze(1),
        "have a prompt with something other than PAD to its left": (~prompt_pad & ~behind_start).any(1),
        # If all prompts start with PAD, it is the tokenizer's BOS
        "have a prompt shorter than its length says": first_is_pad & ~first_is_pad.all(),
    }
    for fault, rows in faults.items():
        if rows.any():
            number = int(rows.int().argmax())
            return (
                f"{int(rows.sum())} of {len(rollout)} responses {fault} (the first is number {number}, of length {int(lengths[number])}). "
                "Lengths and tokens of the rollout disagree, so losses would count the wrong tokens. This is a bug of "
                "rollout.engine: try rollout.engine=hf, and report it"
            )
    return None


SUSPECTS = {
    "sampled_logprobs": "the actor has diverged while sampling: lower the learning rate ({})",
    "logprobs": "the actor has diverged: lower the learning rate ({})",
    "ref_logprobs": "the SFT model is damaged: look at its loss, or give another with sft.use=",
    "values": "the critic has diverged: lower the learning rate ({})",
    "scores": "the reward model is damaged: look at its loss, or give another with reward.use=",
    "rewards": "scores or KL are out of range: raise ppo.kl_coef or set ppo.score_clip=5",
    "advantages": "rewards or values are out of range: set ppo.score_clip=5, or lower the learning rate ({})",
    "returns": "rewards or values are out of range: set ppo.score_clip=5, or lower the learning rate ({})",
}


def finite_rollout(rollout: Rollout, rates: str) -> str | None:
    """No NaN or infinity in any result, padding included: GAE multiplies padding by 0, and 0 * NaN is NaN. rates: lower ones, to type."""
    for name, suspect in SUSPECTS.items():
        value = getattr(rollout, name)
        if value is not None and not value.isfinite().all():
            bad = ~value.isfinite().flatten(1) if value.dim() > 1 else ~value.isfinite().unsqueeze(1)
            return (
                f"{name} of {int(bad.any(1).sum())} of {len(rollout)} responses are NaN or infinite. Most likely {suspect.format(rates)}; "
                "fp16 also overflows where hardware.precision=bf16 does not"
            )
    return None


def rollout_weights(mismatch: Tensor, mask: Tensor, precision: str) -> str | None:
    """What sampled the responses is what the trainer trains. (B, R): their difference in nats, and 1 on tokens that both have read."""
    mismatch = float(masked_mean(mismatch, mask))
    if mismatch <= TOLERANCE[precision]:
        return None
    return (
        f"log-probabilities of the sampled tokens differ by {mismatch:.2g} nats on average between sampling and scoring (bound "
        f"{TOLERANCE[precision]:g} in {precision}). The sampler used other weights, another temperature, top_k or top_p, or other "
        "positions than the trainer: type ppo.top_k=0 ppo.top_p=1 to rule these out, and rollout.engine=hf for the engine"
    )


def kl_not_negative(sampled: Tensor, ref: Tensor, mask: Tensor, precision: str, top_p: float) -> str | None:
    """A KL is never negative; by chance its estimate may be, but not beyond `KL_SLACK`. sampled, ref: log-probabilities (B, R).

    top_p: the sampled token is added to the reference's nucleus (see warp_logits), whose mass may then reach 1 / top_p.
    """
    kl, tokens = float(((sampled - ref) * mask).double().sum()), float(mask.sum())
    bound = -(KL_SLACK + tokens * (KL_ROUNDING[precision] - math.log(top_p)))
    if kl >= bound:
        return None
    return (
        f"the KL to the SFT model is {kl / len(mask):.3g} nats per response; chance explains nothing below {bound / len(mask):.2g}. "
        "The responses were not drawn from the distribution that is scored (a hidden top_k, greedy decoding): try rollout.engine=hf"
    )


def scores_not_constant(scores: Tensor, responses: Tensor) -> str | None:
    """The reward model does not give every response the same score, if at least 8 of them differ. scores (B,), responses (B, R)."""
    distinct = len(responses.unique(dim=0))
    # fp32 carries 7 digits: a spread in the last of them is rounding
    if distinct < 8 or float(scores.std()) > 1e-6 * float(scores.abs().mean()):
        return None
    return (
        f"the reward model gives {distinct} different responses the same score, {float(scores.mean()):.6g}. There is nothing to learn "
        "from it: look at eval/accuracy of the reward stage, or give another model with reward.use="
    )


def advantages_not_zero(advantages: Tensor, mask: Tensor, whitened: bool) -> str | None:
    """There is something to learn. (B, R) each."""
    rms = float(masked_mean(advantages.square(), mask)) ** 0.5
    # Whitening gives 1, unless the spread was near its epsilon of 1e-4: a result of 0.05 was a spread of 5e-6, which is rounding
    bound = 0.05 if whitened else 1e-6
    if mask.sum() < 2 or rms > bound:
        return None
    return (
        f"the advantages are {rms:.2g} (root mean square, bound {bound:g}): the update has nothing to learn from. Rewards and values are "
        "equal everywhere: look at rollout/score_std, and set ppo.normalize_scores=true if scores are tiny"
    )


# --- the update -------------------------------------------------------------------------------------------------------


def first_ratio(error: float, precision: str) -> str | None:
    """Before the first update on a rollout the ratio is 1. error: mean |ratio - 1| over the tokens of the first minibatch."""
    if error <= TOLERANCE[precision]:
        return None
    return (
        f"the probability ratio of the first minibatch is off by {error:.2g} on average (bound {TOLERANCE[precision]:g} in {precision}). "
        "The update does not compute what the scoring computed: try model.attention=eager, and report it with model and hardware"
    )


def first_margin(error: float, precision: str) -> str | None:
    """Before the first update DPO's actor equals the reference: all margins are 0, and the loss is log 2.

    error: |log actor - log reference| of whole responses, per token of the first batch.
    """
    if error <= TOLERANCE[precision]:
        return None
    return (
        f"actor and reference differ by {error:.2g} nats a token before the first update (bound {TOLERANCE[precision]:g} in {precision}): "
        "the first loss is not log 2. They do not start as the same SFT model, or do not compute alike: try "
        "model.attention=eager, and report it with model and hardware"
    )


# --- the weights ------------------------------------------------------------------------------------------------------


class WeightWatch:
    """Compares the weights with those at the start, at most twice: what trains must have moved, what is frozen must not.

    After two steps of AdamW some parameter of every layer must have moved. That catches a part without gradient and spares healthy runs:
    one of two steps may have a zero gradient (fp16 underflow, or B of an adapter, which starts at 0), and steps skipped for an overflow
    do not count. If single parameters have not moved by then, all are compared once more after `SURE` steps.

    A run that resumes later does not compare: near its end the learning rate may be too small to move an fp32 digit.
    """

    def __init__(self, log: RunLog, engines: dict, frozen: dict[str, nn.Module], not_before: int):
        """frozen: modules that must not change. not_before: the step at which the warm-up is over."""
        late = log.first > not_before
        # With a learning rate of 0 nothing is meant to move
        moving = {} if late else {n: e for n, e in engines.items() if all(group["peak_lr"] > 0 for group in e.optimizer.param_groups)}
        self.log, self.engines, self.not_before = log, moving, not_before
        self.frozen = {} if late else frozen
        self.begun = {name: (steps_taken(e), fingerprint(engine_pieces(e))) for name, e in self.engines.items()}
        self.still = {name: fingerprint(local_pieces(module)) for name, module in self.frozen.items()}
        # Steps after which to compare, and what must have moved as a whole by then: a layer, a single parameter
        self.comparisons = [(2, module_of), (SURE, str)] if self.engines or self.frozen else []

    def __call__(self, done: int) -> None:
        """Compare if it is time. done: steps finished."""
        if not self.comparisons or done < self.not_before:
            return
        steps, whole = self.comparisons[0]
        if any(steps_taken(e) < self.begun[name][0] + steps for name, e in self.engines.items()):
            return
        self._compare_trained(done, whole)
        self._compare_frozen(done)
        self.comparisons = self.comparisons[1:] if self.engines else []

    def _compare_trained(self, done: int, whole: Callable[[str], str]) -> None:
        """Those of which every single parameter has moved need no second look."""
        for name, engine in list(self.engines.items()):
            trainable = {n for n, p in engine.module.named_parameters() if p.requires_grad}
            moved = changes(self.begun[name][1], fingerprint(engine_pieces(engine)))
            check(self.log, f"{name} at step {done}", of_weights(moved, trainable, whole))
            if parameters_moved(moved, trainable) is None:
                del self.engines[name]

    def _compare_frozen(self, done: int) -> None:
        for name, module in self.frozen.items():
            changed = changes(self.still[name], fingerprint(local_pieces(module)))
            check(self.log, f"{name} at step {done}", of_weights(changed, set()))
        self.frozen = {}


def module_of(parameter: str) -> str:
    """The layer that a parameter belongs to; both matrices of an adapter to the layer that it adapts."""
    return re.sub(r"\.(lora_|base_layer\.).*|\.[^.]*$", "", parameter, count=1)


def engine_pieces(engine) -> Iterator[tuple[str, int, Tensor]]:
    """What this rank holds of an engine's module: fp32 masters of what trains, and the frozen rest."""
    yield from ((shard.name, shard.start, shard.tensors["weight"]) for shard in shards(engine))
    trains = {n for n, p in engine.module.named_parameters() if p.requires_grad}
    yield from (piece for piece in local_pieces(engine.module) if piece[0] not in trains)


def fingerprint(pieces: Iterable[tuple[str, int, Tensor]]) -> dict[tuple[str, int], tuple]:
    """A few numbers per piece (name, start, tensor) that change when it does: cheaper than a copy of the model."""
    return {(name, start): _numbers(tensor.detach().flatten()) for name, start, tensor in pieces}


def _numbers(flat: Tensor) -> tuple:
    """Sum and sum of squares in double precision, which reveal a change in one last digit, and 16 elements, which reveal a reordering."""
    total = squares = torch.zeros((), dtype=torch.float64, device=flat.device)
    for part in flat.split(CHUNK):
        total = total + part.sum(dtype=torch.float64)
        squares = squares + torch.linalg.vector_norm(part, dtype=torch.float64).square()
    return float(total), float(squares), *flat[:: max(1, len(flat) // 16)][:16].tolist()


def local_pieces(module: nn.Module) -> Iterator[tuple[str, int, Tensor]]:
    """What this rank holds of a module's parameters, as `fingerprint` takes it."""
    for name, parameter in module.named_parameters():
        yield name, 0, getattr(parameter, "ds_tensor", parameter)


def changes(before: dict, after: dict) -> dict[str, bool]:
    """Whether any element of each parameter has changed on any rank. before, after: fingerprints on this rank. Collective."""
    here: dict[str, bool] = {}
    for (name, start), old in before.items():
        here[name] = here.get(name, False) or after[name, start] != old
    moved: dict[str, bool] = {}
    for there in ranks.all_gather(here):
        moved |= {name: moved.get(name, False) or changed for name, changed in there.items()}
    return moved


def of_weights(moved: dict[str, bool], trainable: set[str], group: Callable[[str], str] = str) -> Findings:
    """Both invariants of `changes`: what trains has moved, and nothing else has."""
    return {"parameters_moved": parameters_moved(moved, trainable, group), "frozen_unchanged": frozen_unchanged(moved, trainable)}


def parameters_moved(moved: dict[str, bool], trainable: set[str], group: Callable[[str], str] = str) -> str | None:
    """Every trainable parameter has moved, or another of its group. group: name of a parameter -> name of its group."""
    alive = {group(name) for name in trainable if moved.get(name)}
    still = sorted(name for name in trainable if group(name) not in alive and not name.endswith(IDLE))
    if not still:
        return None
    return (
        f"{_some(still, len(trainable))} trainable parameters never moved. They got no gradient, or the learning rate is too small to "
        "move an fp32 digit: check the learning rate and model.actor.lora, then report it with model and hardware"
    )


def frozen_unchanged(moved: dict[str, bool], trainable: set[str]) -> str | None:
    """No frozen parameter has moved."""
    stray = sorted(name for name, changed in moved.items() if changed and name not in trainable)
    if not stray:
        return None
    frozen = len(moved.keys() - trainable)
    return f"{_some(stray, frozen)} frozen parameters moved. Something writes to them: report it with model and hardware"


def _some(names: list[str], total: int) -> str:
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} of {total} ({shown})"
