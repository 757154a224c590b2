"""Invariants: what must hold while a run trains, whatever the model, the data and the settings.

Each is a pure function of tensors and numbers. It returns None, or says with numbers what is broken, what that most probably
means and what to type. `check` then stops the run, or counts it and goes on (`invariants=warn`). Every rank holds the whole
rollout, so all of them come to the same decision.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from runner import ranks
from runner.config import Config
from runner.durable.shards import shards, steps_taken
from runner.errors import UserError
from runner.losses import masked_mean
from runner.metrics import RunLog
from runner.rollout.collect import Reader
from runner.rollout.record import Rollout

Findings = dict[str, str | None]  # name of the invariant -> what is broken, or None

# Largest mean deviation of a log-probability (and so of a ratio from 1) between two ways to compute it from the same weights: token
# by token with a cache, in one pass, in another micro batch. The tiny models of tests/tiny.py differ by at most 6e-7 in fp32 and
# 0.009 in bf16. Depth adds to it, and bf16 rounds a logit of 16 by up to 0.06: there the bound finds another model, but
# not weights that are a few steps old or a temperature that is a little off
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.1}

# Tokens y drawn from P have E[prod Q(y) / P(y)] <= 1 for every distribution Q. So by Markov's inequality the sum over a rollout of
# log P - log Q, which estimates its KL, falls below -30 with a probability of e^-30, whatever its size and variance. A bound of some
# standard errors would need to know the variance, which eight responses do not tell
KL_SLACK = 30.0  # nats per rollout
# A Q that depends on the micro batch by rounding noise s per token loses s^2 / 2: nothing in fp32, 4e-4 at s = 0.03
KL_ROUNDING = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}  # nats per token

# Their gradient is zero but for rounding, so that in fp32 a step may be smaller than the last digit. OPT's keys: their bias adds
# the same number to all attention scores of a query, and softmax takes it away again. The last norm: with reward.center_coef=0
# its bias shifts the scores of a pair alike
IDLE = ("k_proj.bias", "decoder.final_layer_norm.bias", "gpt_neox.final_layer_norm.bias", "ln_f.bias")

# Steps of AdamW after which a parameter that has never moved is no accident: until then its gradient may have been zero in fp16, or so
# far below AdamW's epsilon that the step was smaller than the last digit
SURE = 20

# Elements that are summed at one time: a sum in double precision copies them
CHUNK = 2**20


def check(log: RunLog, where: str, findings: Findings) -> None:
    """Act on what is broken, as the key `invariants` says. where: 'iteration 3'.

    Raises UserError for the first broken one; with `warn` says each name once, and counts it in the metrics as invariants/<name>.
    """
    for name, fault in findings.items():
        if fault is None:
            continue
        message = f"invariant {name} is broken in {where}: {fault}"
        if log.cfg.invariants == "stop":
            raise UserError(f"{message}. To go on all the same, type invariants=warn")
        if name not in log.broken:
            log.say(f"{message}. Going on (invariants=warn); not said again, but counted as invariants/{name}")
        log.broken[name] += 1


def of_rollout(cfg: Config, reader: Reader, rollout: Rollout) -> Findings:
    """All that must hold of a gathered and scored rollout; of its advantages too, where it has them. Causes before consequences."""
    precision, mask = cfg.hardware.precision, rollout.mask
    findings = {
        "eos_and_pad": eos_and_pad(rollout, reader.pad, reader.eos, reader.max_response),
        "finite_rollout": finite_rollout(rollout),
        "rollout_weights": rollout_weights(rollout.mismatch, mask * rollout.reread.unsqueeze(1), precision),
        "kl_not_negative": kl_not_negative(rollout.sampled_logprobs, rollout.ref_logprobs, mask, precision, cfg.ppo.top_p),
        "scores_not_constant": scores_not_constant(rollout.scores, rollout.responses),
    }
    if rollout.advantages is not None:
        findings["advantages_not_zero"] = advantages_not_zero(rollout.advantages, mask, cfg.ppo.whiten_advantages)
    return findings


# --- the rollout ------------------------------------------------------------------------------------------------------


def eos_and_pad(rollout: Rollout, pad: int, eos: int, limit: int) -> str | None:
    """Lengths, EOS and PAD of every row tell the same story. limit: tokens of the longest response.

    A PAD may stand inside a response, because an actor may sample it; then it has a log-probability below 0.
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
        "ended, but their last token is no EOS": ended & ~last,
        "ended, but hold more than one EOS": ended & (is_eos.sum(1) > 1),
        "did not end, but hold an EOS": ~ended & is_eos.any(1),
        f"did not end, but are shorter than the limit of {limit} tokens": ~rollout.finished & (lengths < limit),
        "hold a PAD that was never sampled": (is_pad & real & (rollout.sampled_logprobs == 0)).any(1),
        "hold something other than PAD behind their end": (~is_pad & ~real).any(1),
        "have a prompt without tokens, or longer than the row": (start >= width).squeeze(1) | (start < 0).squeeze(1),
        "have a prompt with something other than PAD to its left": (~prompt_pad & ~behind_start).any(1),
        # Where all prompts begin with PAD it is the tokenizer's BOS
        "have a prompt that is shorter than its length says": first_is_pad & ~first_is_pad.all(),
    }
    for fault, rows in faults.items():
        if rows.any():
            number = int(rows.int().argmax())
            return (
                f"{int(rows.sum())} of {len(rollout)} responses {fault} (the first is number {number}, of length {int(lengths[number])}). "
                "Lengths and tokens of the rollout disagree, so that losses would count the wrong tokens; this is a bug of "
                "rollout.engine: try rollout.engine=hf, and report it"
            )
    return None


SUSPECTS = {
    "sampled_logprobs": "the actor has diverged while sampling: lower ppo.actor_lr",
    "logprobs": "the actor has diverged: lower ppo.actor_lr",
    "ref_logprobs": "the SFT model is damaged: look at its loss, or name another with sft.use=",
    "values": "the critic has diverged: lower ppo.critic_lr",
    "scores": "the reward model is damaged: look at its loss, or name another with reward.use=",
    "rewards": "scores or KL are out of range: raise ppo.kl_coef or set ppo.score_clip=5",
    "advantages": "rewards or values are out of range: set ppo.score_clip=5, or lower ppo.critic_lr",
    "returns": "rewards or values are out of range: set ppo.score_clip=5, or lower ppo.critic_lr",
}


def finite_rollout(rollout: Rollout) -> str | None:
    """No NaN and no infinity in anything that was computed, padding included: GAE multiplies it by 0, which leaves NaN a NaN."""
    for name, suspect in SUSPECTS.items():
        value = getattr(rollout, name)
        if value is not None and not value.isfinite().all():
            bad = ~value.isfinite().flatten(1) if value.dim() > 1 else ~value.isfinite().unsqueeze(1)
            return (
                f"{name} of {int(bad.any(1).sum())} of {len(rollout)} responses are NaN or infinite. Most probably {suspect}; "
                "fp16 also overflows where hardware.precision=bf16 does not"
            )
    return None


def rollout_weights(mismatch: Tensor, mask: Tensor, precision: str) -> str | None:
    """What sampled the responses is what the trainer trains. (B, R): nats between both, and 1 on tokens that both have read."""
    mismatch = float(masked_mean(mismatch, mask))
    if mismatch <= TOLERANCE[precision]:
        return None
    return (
        f"log-probabilities of the sampled tokens differ by {mismatch:.2g} nats on average between sampling and scoring (bound "
        f"{TOLERANCE[precision]:g} in {precision}). The rollout came from other weights, another temperature, top_k or top_p, or from "
        "other positions than the trainer's: type ppo.top_k=0 ppo.top_p=1 to rule these out, and rollout.engine=hf for the engine"
    )


def kl_not_negative(sampled: Tensor, ref: Tensor, mask: Tensor, precision: str, top_p: float) -> str | None:
    """A KL is not negative; its estimate is, by chance alone, not further than `KL_SLACK`. sampled, ref: log-probabilities (B, R).

    top_p: the reference's nucleus is widened by the sampled token (see warp_logits), and then holds up to 1 / top_p of mass.
    """
    kl, tokens = float(((sampled - ref) * mask).double().sum()), float(mask.sum())
    bound = -(KL_SLACK + tokens * (KL_ROUNDING[precision] - math.log(top_p)))
    if kl >= bound:
        return None
    return (
        f"the KL to the SFT model is {kl / len(mask):.3g} nats per response, which chance does not bring below {bound / len(mask):.2g}. "
        "The responses were not drawn from the distribution that is scored (a hidden top_k, greedy decoding): try rollout.engine=hf"
    )


def scores_not_constant(scores: Tensor, responses: Tensor) -> str | None:
    """The reward model tells responses apart, where at least 8 of them are different. scores (B,), responses (B, R)."""
    distinct = len(responses.unique(dim=0))
    # fp32 carries 7 digits: a spread in the last of them is rounding
    if distinct < 8 or float(scores.std()) > 1e-6 * float(scores.abs().mean()):
        return None
    return (
        f"the reward model gives {distinct} different responses the same score, {float(scores.mean()):.6g}. There is nothing to learn "
        "from it: look at eval/accuracy of the reward stage, or name another model with reward.use="
    )


def advantages_not_zero(advantages: Tensor, mask: Tensor, whitened: bool) -> str | None:
    """There is something to learn. (B, R) each."""
    rms = float(masked_mean(advantages.square(), mask)) ** 0.5
    # Whitening gives 1, and less only where the spread was near its epsilon of 1e-4: 0.05 was 5e-6, the rounding of values
    bound = 0.05 if whitened else 1e-6
    if mask.sum() < 2 or rms > bound:
        return None
    return (
        f"the advantages are {rms:.2g} (root mean square, bound {bound:g}): the update has nothing to learn from. Rewards and values are "
        "equal everywhere: look at rollout/score_std, and set ppo.normalize_scores=true if scores are tiny"
    )


# --- the update -------------------------------------------------------------------------------------------------------


def first_ratio(error: float, precision: str) -> str | None:
    """Before the first update of a rollout the ratio is 1. error: mean |ratio - 1| over the tokens of the first minibatch."""
    if error <= TOLERANCE[precision]:
        return None
    return (
        f"the probability ratio of the first minibatch is off by {error:.2g} on average (bound {TOLERANCE[precision]:g} in {precision}). "
        "The update does not compute what the rollout was scored with: try model.attention=eager, and report it with model and hardware"
    )


def first_margin(error: float, precision: str) -> str | None:
    """Before its first update DPO's actor is the reference: all margins are 0, and the loss is log 2.

    error: mean over the responses' tokens of |log actor - log reference|, of whole responses in the first batch.
    """
    if error <= TOLERANCE[precision]:
        return None
    return (
        f"actor and reference differ by {error:.2g} nats a token before the first update (bound {TOLERANCE[precision]:g} in {precision}): "
        "the first loss is not log 2. They do not begin as the same SFT model, or do not read it alike: try "
        "model.attention=eager, and report it with model and hardware"
    )


# --- the weights ------------------------------------------------------------------------------------------------------


def watch_weights(log: RunLog, engines: dict, frozen: dict[str, nn.Module], not_before: int) -> Callable[[int], None]:
    """Remember the weights as they are now. Returns a function to call with the number of every finished step: it compares, twice at most.

    Two steps of AdamW after the start every module must have moved, in one of its parameters. That finds a part without gradient, and
    no run that is well: of two steps one may give a zero gradient, by fp16's underflow or because B of an adapter starts at 0, and
    steps skipped for an overflow do not count. If single parameters then stand still, all are compared once more after `SURE` steps.

    Args: frozen: modules that nothing may touch. not_before: the step at which the warm-up is over.
    A run that resumes later than that does not look again: near its end the learning rate may be too small to move an fp32 digit.
    """
    if log.first > not_before:
        return lambda done: None
    # With a learning rate of 0 nothing moves, and is meant not to
    engines = {name: e for name, e in engines.items() if all(group["peak_lr"] > 0 for group in e.optimizer.param_groups)}
    begun = {name: (steps_taken(e), fingerprint(engine_pieces(e))) for name, e in engines.items()}
    still = {name: fingerprint(local_pieces(module)) for name, module in frozen.items()}
    looks = [(2, module_of), (SURE, str)]

    def after(done: int) -> None:
        if not looks or done < not_before or any(steps_taken(e) < begun[name][0] + looks[0][0] for name, e in engines.items()):
            return
        _, group = looks.pop(0)
        for name, e in list(engines.items()):
            trainable = {n for n, p in e.module.named_parameters() if p.requires_grad}
            moved = changes(begun[name][1], fingerprint(engine_pieces(e)))
            check(log, f"{name} at step {done}", of_weights(moved, trainable, group))
            if parameters_moved(moved, trainable) is None:
                del engines[name]
        for name, module in frozen.items():
            check(log, f"{name} at step {done}", of_weights(changes(still.pop(name), fingerprint(local_pieces(module))), set()))
        frozen.clear()
        if not engines:
            looks.clear()

    return after


def module_of(parameter: str) -> str:
    """The layer that a parameter belongs to; both matrices of an adapter to the layer that it adapts."""
    return re.sub(r"\.(lora_|base_layer\.).*|\.[^.]*$", "", parameter, count=1)


def engine_pieces(engine) -> Iterator[tuple[str, int, Tensor]]:
    """What this rank holds of a trained module: fp32 masters of what trains, and the frozen rest."""
    yield from ((shard.name, shard.start, shard.tensors["weight"]) for shard in shards(engine))
    trains = {n for n, p in engine.module.named_parameters() if p.requires_grad}
    yield from (piece for piece in local_pieces(engine.module) if piece[0] not in trains)


def fingerprint(pieces: Iterable[tuple[str, int, Tensor]]) -> dict[tuple[str, int], tuple]:
    """A few numbers per piece (name, start, tensor) that change with any change of it, and take no copy of the model."""
    return {(name, start): _numbers(tensor.detach().flatten()) for name, start, tensor in pieces}


def _numbers(flat: Tensor) -> tuple:
    """Sum and sum of squares in double precision, which show a change of one last digit, and 16 elements, which show a change of order."""
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
    for there in ranks.every(here):
        moved |= {name: moved.get(name, False) or changed for name, changed in there.items()}
    return moved


def of_weights(moved: dict[str, bool], trainable: set[str], group: Callable[[str], str] = str) -> Findings:
    """All that must hold of `changes`: what trains has moved, and nothing else has."""
    return {"parameters_moved": parameters_moved(moved, trainable, group), "frozen_unchanged": frozen_unchanged(moved, trainable)}


def parameters_moved(moved: dict[str, bool], trainable: set[str], group: Callable[[str], str] = str) -> str | None:
    """Every trainable parameter has moved, or another of its group. group: name of a parameter -> name of its group."""
    alive = {group(name) for name in trainable if moved.get(name)}
    still = sorted(name for name in trainable if group(name) not in alive and not name.endswith(IDLE))
    if not still:
        return None
    return (
        f"{_some(still, len(trainable))} trainable parameters never moved. They got no gradient, or the learning rate is below fp32's last "
        "digit: check the learning rate and model.actor.lora, then report it with model and hardware"
    )


def frozen_unchanged(moved: dict[str, bool], trainable: set[str]) -> str | None:
    """The same for parameters that no optimizer may touch."""
    stray = sorted(name for name, changed in moved.items() if changed and name not in trainable)
    if not stray:
        return None
    frozen = len(moved.keys() - trainable)
    return f"{_some(stray, frozen)} frozen parameters moved. Something writes into them: report it with model and hardware"


def _some(names: list[str], total: int) -> str:
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} of {total} ({shown})"
