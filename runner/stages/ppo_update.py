"""The update of PPO: several passes over a rollout, in minibatches of one optimizer step of critic and actor each."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runner import engine, flops, ranks
from runner.batch_sizes import micro_positions
from runner.config.schema import Config, Ppo
from runner.data import cache
from runner.data.batches import deal, loss_weights, pick, sft_batch
from runner.device import send
from runner.losses import policy_loss, sft_loss, value_loss
from runner.rollout.collect import Models, response_logprobs, response_values
from runner.rollout.record import Rollout
from runner.stages.build import batches_for
from runner.watch import stop

# What every minibatch sums over its response tokens, and over the tokens of the mixture
SUMS = ("policy_loss", "value_loss", "ptx_loss", "ratio", "ratio_error", "clipfrac", "approxkl", "value_clipfrac", "entropy")


class Mixture:
    """The ptx mixture: pretraining text or demonstrations, as many rows per optimizer step as PPO has responses."""

    def __init__(self, cfg: Config, folder: str, pad: int, packed: bool):
        self.rows, _, _ = cache.load(Path(folder))
        self.pad = pad
        self.lengths, prompts = np.asarray(self.rows["length"]), np.asarray(self.rows["prompt_length"])
        self.weights = loss_weights(self.lengths, prompts, 0.0)
        self.batches = batches_for(cfg, "ppo", self.lengths, packed)

    def at(self, number: int) -> tuple[list[dict], float]:
        """Micro batches of this rank for optimizer step `number`, and the tokens of the whole step."""
        here = self.batches.rows(number)
        micros = [sft_batch(pick(self.rows, n), self.pad, 0.0) for n in self.batches.micro_batches(number)]
        return micros, float(self.weights[here[here >= 0]].sum())

    def work(self, actor: flops.MatrixSizes, numbers: range) -> float:
        """FLOPs of the optimizer steps with these numbers, of all ranks."""
        rows = [here[here >= 0] for here in map(self.batches.rows, numbers)]
        return sum(flops.training(actor, self.lengths[here], float(self.weights[here].sum())) for here in rows)


@dataclass
class Progress:
    """How far the update of a rollout has come, and its sums so far. A run that stops in the middle saves it."""

    position: int = 0  # optimizer steps taken
    ended: bool = False  # by the early stop
    totals: dict[str, float] = field(default_factory=dict)
    norms: dict[str, list[float]] = field(default_factory=lambda: {"grad_norm/actor": [], "grad_norm/critic": []})
    ratio_error: float = 0.0  # before the first step

    def add(self, sums: dict[str, float], norms: dict[str, float]) -> None:
        """Count an optimizer step."""
        if not self.position:
            self.ratio_error = sums["ratio_error"] / sums["tokens"]
        self.position += 1
        self.totals = {name: self.totals.get(name, 0.0) + value for name, value in sums.items()}
        for name, norm in norms.items():
            self.norms[name].append(norm)

    def metrics(self) -> dict[str, float]:
        """Averages over the tokens of all passes."""
        mean = {name: value / self.totals["tokens"] for name, value in self.totals.items()}
        facts = {"loss/value_avg": mean["value_loss"], "val/clipfrac_avg": mean["value_clipfrac"], "policy/updates": self.position}
        facts["perf/padding_fraction"] = 1 - self.totals["real"] / self.totals["slots"]
        if self.norms["grad_norm/actor"]:  # not in the warm-up of the critic
            facts |= {
                "policy/approxkl_avg": mean["approxkl"],
                "policy/clipfrac_avg": mean["clipfrac"],
                "policy/entropy_avg": mean["entropy"],
                "loss/policy_avg": mean["policy_loss"],
                "val/ratio": mean["ratio"],
                "val/first_ratio_error": self.ratio_error,
            }
        if self.totals["ptx_tokens"]:
            facts["loss/ptx_avg"] = self.totals["ptx_loss"] / self.totals["ptx_tokens"]
        # A step that fp16 skipped because of an overflow has an infinite norm
        norms = {name: [norm for norm in values if math.isfinite(norm)] for name, values in self.norms.items()}
        return facts | {name: float(np.mean(finite)) for name, finite in norms.items() if finite}


def steps_before(ppo: Ppo, iteration: int) -> int:
    """Number of the first optimizer step of an iteration."""
    return iteration * ppo.ppo_epochs * ppo.minibatches


def update(
    cfg: Config, models: Models, rollout: Rollout, mixture: Mixture | None, iteration: int, progress: Progress, guard: Callable[..., None]
) -> str | None:
    """Several passes over a rollout, each in minibatches of one optimizer step, from where `progress` says.

    Args: guard: called with step, loss, norm and rows of every minibatch; raises if they are not finite (see finite.py).
    Returns None at the end, or what asked it to stop earlier. Collective.
    """
    ppo = cfg.ppo
    train_actor = iteration >= ppo.critic_warmup
    models.actor.train(), models.critic.train()
    number, last = steps_before(ppo, iteration), steps_before(ppo, 1)
    while progress.position < last and not progress.ended:
        epoch, k = divmod(progress.position, ppo.minibatches)
        order = np.random.default_rng([cfg.seed, iteration, epoch]).permutation(len(rollout))
        text = mixture.at(number + progress.position) if mixture and train_actor else None
        chosen = np.split(order, ppo.minibatches)[k]
        sums, norms = minibatch(cfg, models, rollout, chosen, text, train_actor)
        sums = ranks.all_reduce_sum(sums, models.actor.device)  # waits for the GPU, as the gradient norms do
        loss = sum(sums[name] for name in ("policy_loss", "value_loss", "ptx_loss")) / sums["tokens"]
        guard(step=iteration + 1, loss=loss, norm=sum(norms.values()), rows=rollout.as_rows(chosen))
        progress.add(sums, norms)
        progress.ended = ppo.early_stop_kl is not None and sums["approxkl"] / sums["tokens"] > ppo.early_stop_kl
        if progress.position < last and not progress.ended and (reason := stop.asked()):
            return reason
    return None


def minibatch(cfg: Config, models: Models, rollout: Rollout, chosen: np.ndarray, text, train_actor: bool) -> tuple[dict, dict]:
    """One optimizer step of critic and actor. Returns sums over this rank's tokens, and the gradient norms.

    Sum "real" counts tokens of prompts and responses, "slots" the positions that the models compute, padding included.
    """
    # The same rows whatever the number of ranks
    lengths, packed = (rollout.prompt_lengths + rollout.lengths).numpy(), models.actor.module.packed
    ordered = chosen[np.argsort(-lengths[chosen], kind="stable")]
    # With padding on both sides, rows are wider than the longest of them
    widths = lengths[ordered] if packed else np.full(len(ordered), rollout.prompts.size(1) + rollout.responses.size(1))
    micros = deal(ordered, widths, micro_positions(cfg, "ppo"), models.actor.module.pads_nothing, world=ranks.world(), rank=ranks.rank())
    tokens = float(rollout.lengths[torch.as_tensor(chosen)].sum())
    texts, text_tokens = text or ([], 0.0)
    sums = {name: torch.zeros((), device=models.actor.device) for name in SUMS}
    # Tokens of the whole step, which every rank knows: each gives its part of the sum over ranks
    sums |= {"tokens": tokens / ranks.world(), "ptx_tokens": text_tokens / ranks.world(), "real": 0, "slots": 0}

    def add(facts: dict[str, Tensor]) -> None:
        for name, value in facts.items():
            sums[name] += value.detach()

    for numbers in micros:
        part, last = rollout.rows(torch.as_tensor(numbers)), numbers is micros[-1]
        sums["real"] += part.tokens()
        sums["slots"] += part.tokens() if packed else part.prompts.numel() + part.responses.numel()
        add(critic_backward(cfg.ppo, models.critic, part, tokens, last))
        if train_actor:
            add(actor_backward(cfg.ppo, models.actor, part, tokens, last and not texts))
    for batch in texts:
        add(mixture_backward(cfg.ppo, models.actor, batch, text_tokens, batch is texts[-1]))
    if cfg.ppo.align_overflow and train_actor:
        engine.align_overflow(models.actor, models.critic)
    norms = {"grad_norm/critic": engine.step(models.critic)}
    if train_actor:
        norms["grad_norm/actor"] = engine.step(models.actor)
    return sums, norms


# --- one micro batch -------------------------------------------------------------------------------------------------
# tokens: of the whole optimizer step, over which the loss is averaged; last: whether it is the model's last micro batch in this step


def critic_backward(ppo: Ppo, critic, part: Rollout, tokens: float, last: bool) -> dict[str, Tensor]:
    """Forward and backward of the critic. Returns sums over the response tokens."""
    old_values, returns, mask = (send(x, critic.device) for x in (part.values, part.returns, part.mask))
    values = response_values(critic, part)
    loss, facts = value_loss(values, old_values, returns, mask, cliprange_value=ppo.cliprange_value)
    engine.backward(critic, loss, tokens, last)
    return facts | {"value_loss": loss}


def actor_backward(ppo: Ppo, actor, part: Rollout, tokens: float, last: bool) -> dict[str, Tensor]:
    """Forward and backward of the actor. Returns sums over the response tokens."""
    old_logprobs, advantages, mask = (send(x, actor.device) for x in (part.logprobs, part.advantages, part.mask))
    logprobs, entropies = response_logprobs(actor, part, with_entropy=True)
    clip = {"cliprange": ppo.cliprange, "dual_clip": ppo.dual_clip, "log_ratio_clamp": ppo.log_ratio_clamp}
    loss, facts = policy_loss(logprobs, old_logprobs, advantages, mask, **clip)
    engine.backward(actor, loss, tokens, last)
    error = ((logprobs - old_logprobs).exp() - 1).abs() * mask
    return facts | {"policy_loss": loss, "entropy": (entropies * mask).sum(), "ratio_error": error.sum()}


def mixture_backward(ppo: Ppo, actor, batch: dict[str, Tensor], tokens: float, last: bool) -> dict[str, Tensor]:
    """Forward and backward of the actor on a micro batch of the ptx mixture."""
    logprobs, _ = actor(batch["ids"], batch["mask"], batch["index"], batch["targets"])
    loss = sft_loss(logprobs, send(batch["weights"], actor.device))
    engine.backward(actor, ppo.ptx_coef * loss, tokens, last)
    return {"ptx_loss": loss}
