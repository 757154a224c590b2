"""PPO (arXiv 1707.06347) against the reward model, from the SFT actor, as in InstructGPT (2203.02155).

Every rank holds the whole rollout batch, so statistics are global and minibatches do not depend on the number of ranks. The
random numbers of response i come from (seed, i) alone. Dropout is off in all four models.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from runner import checkpoint, engine, ranks
from runner.config import Config
from runner.data import cache, toy
from runner.data.batches import Batches, pick, sft_batch, subset, to
from runner.ema import Ema
from runner.losses import (
    adapt_kl_coef,
    explained_variance,
    gae,
    kl_estimate,
    learning_rate,
    masked_mean,
    policy_loss,
    sft_loss,
    token_rewards,
    value_loss,
    whiten,
)
from runner.metrics import RunLog
from runner.models import save_adapter, save_model
from runner.plan import accumulation, engine_configs, shares_reference, step_batch
from runner.rollout.collect import Models, Reader, collect, response_logprobs, response_values
from runner.rollout.record import Rollout
from runner.stages.build import load_actor, load_reward, tokenizer_for
from runner.stages.sft import loss_weights
from runner.tokenizer import decode_response
from runner.worker import Inputs

# Largest mean |ratio - 1| before the first update of a rollout: scoring and updating must compute the same numbers
RATIO_TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.1}
# Held-out prompts have random numbers of their own, far from those of training
EVAL_EPISODE = 2**40


@dataclass
class State:
    """What PPO carries from one iteration to the next, beside the weights; saved in every checkpoint."""

    kl_coef: float
    score_mean: float = 0.0
    score_std: float = 1.0
    tokens: int = 0
    before: dict | None = None  # evaluation of the SFT actor
    sft_rows: list | None = None  # its responses to the held-out prompts


def train(cfg: Config, step: Inputs, log: RunLog, device: torch.device) -> None:
    """Train the actor and export it to <step folder>/model, the critic to critic/, the averaged actor to model_ema/."""
    ppo = cfg.ppo

    # 1. Prompts: those of every iteration are fixed by the seed and the iteration's number
    tokenizer = tokenizer_for(cfg, step.tokenizer)
    rows, held, counts = cache.load(Path(step.data))
    batches = Batches(np.asarray(rows["length"]), ppo.rollout_batch, 1, world=1, rank=0, seed=cfg.seed, drop_last=True, pool=1)
    total = batches.steps(ppo.epochs, ppo.max_steps)
    mixture = Mixture(cfg, step.ptx, tokenizer.pad_token_id, device) if ppo.ptx_coef else None

    # 2. Four models: the actor and its frozen reference, the critic and the reward model that it starts from
    models = build(cfg, step, tokenizer, device)
    ema = Ema(models.actor.module, ppo.ema_decay) if ppo.ema_decay else None
    micro = cfg.hardware.micro_batch
    sizes = (cfg.model.max_response_tokens, micro.rollout, micro.score)
    reader = Reader(tokenizer.pad_token_id, tokenizer.eos_token_id, *sizes, device)
    evaluator = Evaluator(cfg, held, tokenizer, models, reader, log)

    # 3. Go on from the newest checkpoint, if there is one; otherwise see what the SFT actor can do
    engines = {"actor": models.actor, "critic": models.critic}
    first, saved, tensors = checkpoint.restore(step.folder, engines)
    state = State(**saved) if saved else State(kl_coef=ppo.kl_coef)
    if ema and tensors:
        ema.load(tensors)
    log.begin(first, total)
    if state.before is None:
        state.before, state.sft_rows = evaluator(0, state, calibrate=ppo.normalize_scores)

    for i in range(first, total):
        share = learning_rate(i, total, 1.0, ppo.lr_schedule, ppo.warmup, ppo.lr_end)
        engine.set_learning_rate(models.actor, share)
        engine.set_learning_rate(models.critic, share)

        # 4. Rollout: one response per prompt, scored by all four models
        with log.phase("rollout"):
            prompts = rows.select(batches.rows(i))["input_ids"]
            episodes = list(range(i * ppo.rollout_batch, (i + 1) * ppo.rollout_batch))
            rollout = collect(models, reader, prompts, cfg.seed, episodes)
        state.tokens += int(rollout.lengths.sum() + rollout.prompt_lengths.sum())

        # 5. Rewards, advantages and returns, over the whole batch
        metrics = fill_rewards(cfg, rollout, state)

        # 6. Update: several passes of several minibatches
        with log.phase("update"):
            metrics |= update(cfg, models, rollout, mixture, i)

        # 7. KL controller and averaged weights
        done, kl = i + 1, metrics["objective/kl"]
        if ppo.kl_target is not None:
            state.kl_coef = adapt_kl_coef(state.kl_coef, kl, ppo.kl_target, ppo.rollout_batch, ppo.kl_horizon)
        if ema:
            ema.update()

        # 8. Log, evaluate and save
        metrics |= {"episode": done * ppo.rollout_batch, "lr/actor": ppo.actor_lr * share, "lr/critic": ppo.critic_lr * share}
        tokens = int(rollout.lengths.sum() + rollout.prompt_lengths.sum())
        log.log(
            done,
            metrics,
            f"score {metrics['objective/scores']:+.2f}  kl {kl:.2f}  length {metrics['rollout/response_length_mean']:.0f}",
            tokens,
        )
        log.histogram(done, "rollout/scores", rollout.scores.tolist())
        if ppo.eval_every and done % ppo.eval_every == 0 and done < total:
            evaluator(done, state)
        if checkpoint.due(cfg.checkpoint.every, done, total):
            with log.phase("checkpoint"):
                checkpoint.save(step.folder, done, engines, vars(state), ema.state() if ema else None, cfg.checkpoint.keep_last)

    # 9. Export, and the facts for the summary
    after, ppo_rows = evaluator(total, state)
    with log.phase("export"):
        exports = export(cfg, step.folder, models, ema, tokenizer)
    samples = paired(state.sft_rows, ppo_rows)
    log.samples(total, samples)
    facts = {"before": state.before, "after": after, "eval_prompts": len(ppo_rows), "samples": samples[:3], "exports": exports}
    log.result({"steps": total, "data": counts, "tokens": state.tokens, **facts})


# --- building ---------------------------------------------------------------------------------------------------------


def build(cfg: Config, step: Inputs, tokenizer, device: torch.device) -> Models:
    """The four models of PPO. Dropout is off everywhere: the ratio of the first minibatch must be 1."""
    ppo, configs = cfg.ppo, engine_configs(cfg, "ppo")
    actor_part, reward_part = cfg.model.actor, cfg.model.reward
    sampling = {"temperature": ppo.temperature, "top_k": ppo.top_k, "top_p": ppo.top_p}
    checkpointing = cfg.hardware.gradient_checkpointing
    options = {"betas": ppo.betas, "eps": ppo.eps}

    args = {"dropout": 0.0, "lora": replace(actor_part.lora, dropout=0.0), "checkpointing": checkpointing.actor, "sampling": sampling}
    actor = load_actor(cfg, step.parents["sft"], tokenizer, configs["actor"], **args)
    actor = engine.trainable(
        actor, configs["actor"], lr=ppo.actor_lr, lora_lr=actor_part.lora.lr, weight_decay=ppo.actor_weight_decay, **options
    )
    args = {"dropout": 0.0, "lora": replace(reward_part.lora, dropout=0.0), "fresh_head": False, "checkpointing": checkpointing.critic}
    critic = load_reward(cfg, step.parents["reward"], tokenizer, configs["critic"], **args)
    critic = engine.trainable(
        critic, configs["critic"], lr=ppo.critic_lr, lora_lr=reward_part.lora.lr, weight_decay=ppo.critic_weight_decay, **options
    )
    ref, ds_config = None, configs.get("ref", {})
    if not shares_reference(actor_part):
        ref = load_actor(cfg, step.parents["sft"], tokenizer, ds_config, dropout=0.0, lora=None, sampling=sampling)
        ref = engine.frozen(ref, ds_config, device)
    ds_config = configs.get("reward", {})
    reward = load_reward(cfg, step.parents["reward"], tokenizer, ds_config, dropout=0.0, lora=None, fresh_head=False)
    return Models(actor, critic, ref, engine.frozen(reward, ds_config, device))


class Mixture:
    """The ptx batches: pretraining text or demonstrations, one micro batch beside each micro batch of PPO."""

    def __init__(self, cfg: Config, folder: str, pad: int, device: torch.device):
        self.rows, _, _ = cache.load(Path(folder))
        self.pad, self.device = pad, device
        lengths, prompts = np.asarray(self.rows["length"]), np.asarray(self.rows["prompt_length"])
        self.weights = loss_weights(lengths, prompts, 0.0)
        micro = cfg.hardware.micro_batch.ppo
        self.batches = Batches(lengths, step_batch(cfg, "ppo"), micro, world=ranks.world(), rank=ranks.rank(), seed=cfg.seed)

    def at(self, number: int) -> tuple[list[dict], float]:
        """Micro batches of this rank for optimizer step `number`, and the tokens of the whole step."""
        here = self.batches.rows(number)
        micros = [to(sft_batch(pick(self.rows, n), self.pad, 0.0), self.device) for n in self.batches.micro_batches(number)]
        return micros, float(self.weights[here[here >= 0]].sum())


# --- one iteration ----------------------------------------------------------------------------------------------------


def normalised(cfg: Config, state: State, scores: torch.Tensor, ended: torch.Tensor) -> torch.Tensor:
    """Scores as the actor is paid: in standard deviations above the SFT actor's, clipped, less the penalty for no EOS."""
    scores = (scores - state.score_mean) / state.score_std
    if cfg.ppo.score_clip:
        scores = scores.clamp(-cfg.ppo.score_clip, cfg.ppo.score_clip)
    return scores - cfg.ppo.missing_eos_penalty * (~ended).float()


def fill_rewards(cfg: Config, rollout: Rollout, state: State) -> dict[str, float]:
    """Fill in rewards, advantages and returns. Returns the metrics of the rollout."""
    ppo, mask = cfg.ppo, rollout.mask
    scores = normalised(cfg, state, rollout.scores, rollout.ended)
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, ppo.kl_estimator) * mask
    rollout.rewards = token_rewards(scores, kl, rollout.lengths, mask, state.kl_coef)
    advantages, rollout.returns = gae(rollout.rewards, rollout.values, mask, ppo.gamma, ppo.lam)
    rollout.advantages = whiten(advantages, mask) if ppo.whiten_advantages else advantages

    non_score = -state.kl_coef * kl.sum(1).mean()
    facts = {
        "objective/kl": ((rollout.logprobs - rollout.ref_logprobs) * mask).sum(1).mean(),
        "objective/scores": scores.mean(),
        "objective/non_score_reward": non_score,
        "objective/rlhf_reward": scores.mean() + non_score,
        "objective/entropy": masked_mean(-rollout.logprobs, mask),
        "objective/kl_coef": state.kl_coef,
        "rollout/response_length_mean": rollout.lengths.float().mean(),
        "rollout/truncated_rate": 1 - rollout.ended.float().mean(),
        "rollout/score_mean": rollout.scores.mean(),
        "rollout/score_std": rollout.scores.std(),
        "val/num_eos_tokens": rollout.ended.sum(),
        "val/explained_var": explained_variance(rollout.values, rollout.returns, mask),
        "perf/padding_fraction": 1 - (rollout.lengths.sum() + rollout.prompt_lengths.sum()) / rollout.sequences()[0].numel(),
    }
    return {name: float(value) for name, value in facts.items()}


def update(cfg: Config, models: Models, rollout: Rollout, mixture: Mixture | None, iteration: int) -> dict[str, float]:
    """Several passes over a rollout, each in minibatches of one optimizer step. Returns metrics averaged over tokens."""
    ppo, totals, norms = cfg.ppo, {}, {"grad_norm/actor": [], "grad_norm/critic": []}
    size = step_batch(cfg, "ppo")
    train_actor = iteration >= ppo.critic_warmup
    models.actor.train(), models.critic.train()
    number = iteration * ppo.ppo_epochs * ppo.minibatches
    passes = 0
    for epoch in range(ppo.ppo_epochs):
        order = np.random.default_rng([cfg.seed, iteration, epoch]).permutation(len(rollout))
        for k, chosen in enumerate(np.split(order, ppo.minibatches)):
            text = mixture.at(number + epoch * ppo.minibatches + k) if mixture and train_actor else None
            sums, grad_norms = minibatch(cfg, models, rollout, chosen[:size], text, train_actor)
            sums = ranks.total(sums, rollout.lengths.device)
            if epoch == k == 0:
                error = sums["ratio_error"] / sums["tokens"]
                check_first_ratio(error, cfg.hardware.precision)
            totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
            for name, norm in grad_norms.items():
                norms[name].append(norm)
            passes += 1
        if ppo.early_stop_kl is not None and sums["approxkl"] / sums["tokens"] > ppo.early_stop_kl:
            break
    mean = {name: value / totals["tokens"] for name, value in totals.items()}
    facts = {
        "policy/approxkl_avg": mean["approxkl"],
        "policy/clipfrac_avg": mean["clipfrac"],
        "policy/entropy_avg": mean["entropy"],
        "loss/policy_avg": mean["policy_loss"],
        "loss/value_avg": mean["value_loss"],
        "val/ratio": mean["ratio"],
        "val/clipfrac_avg": mean["value_clipfrac"],
        "val/first_ratio_error": error,
        "policy/updates": passes,
    }
    if text:
        facts["loss/ptx_avg"] = totals["ptx_loss"] / totals["ptx_tokens"]
    return facts | {name: float(np.mean(values)) for name, values in norms.items() if values}


def minibatch(cfg: Config, models: Models, rollout: Rollout, chosen: np.ndarray, text, train_actor: bool) -> tuple[dict, dict]:
    """One optimizer step of critic and actor. Returns sums over this rank's tokens, and the gradient norms."""
    ppo, device = cfg.ppo, rollout.lengths.device
    # The same rows whatever the number of ranks; neighbours in length share a micro batch
    lengths = (rollout.prompt_lengths + rollout.lengths).cpu().numpy()
    ordered = chosen[np.argsort(-lengths[chosen], kind="stable")]
    mine = ordered[ranks.rank() :: ranks.world()]
    tokens = float(rollout.lengths[torch.as_tensor(chosen, device=device)].sum())
    texts, text_tokens = text or ([], 0.0)
    names = ("policy_loss", "value_loss", "ptx_loss", "ratio", "ratio_error", "clipfrac", "approxkl", "value_clipfrac", "entropy")
    sums = dict.fromkeys(names, torch.zeros((), device=device)) | {
        "tokens": tokens / ranks.world(),
        "ptx_tokens": text_tokens / ranks.world(),
    }
    norms: dict[str, float] = {}

    def add(facts: dict) -> None:
        for name, value in facts.items():
            sums[name] = sums[name] + value.detach()

    micros = np.split(mine, accumulation(cfg, "ppo"))
    for m, numbers in enumerate(micros):
        part = rollout.rows(torch.as_tensor(numbers, device=device))
        mask, last = part.mask, m == len(micros) - 1
        values = response_values(models.critic, part)
        loss, facts = value_loss(values, part.values, part.returns, mask, cliprange_value=ppo.cliprange_value)
        engine.backward(models.critic, loss, tokens)
        add(facts | {"value_loss": loss})
        steps = [(models.critic, "grad_norm/critic")]
        if train_actor:
            logprobs, entropies = response_logprobs(models.actor, part, with_entropy=True)
            clip = {"cliprange": ppo.cliprange, "dual_clip": ppo.dual_clip, "log_ratio_clamp": ppo.log_ratio_clamp}
            loss, facts = policy_loss(logprobs, part.logprobs, part.advantages, mask, **clip)
            engine.backward(models.actor, loss, tokens)
            error = ((logprobs - part.logprobs).exp() - 1).abs() * mask
            add(facts | {"policy_loss": loss, "entropy": (entropies * mask).sum(), "ratio_error": error.sum()})
            if texts:
                engine.step(models.actor)  # not yet at the boundary: the text belongs to the same optimizer step
                batch = texts[m]
                logprobs, _ = models.actor(batch["ids"], batch["mask"], batch["index"], batch["targets"])
                loss = sft_loss(logprobs, batch["weights"])
                engine.backward(models.actor, ppo.ptx_coef * loss, text_tokens)
                add({"ptx_loss": loss})
            steps.append((models.actor, "grad_norm/actor"))
        if last and ppo.align_overflow and train_actor:
            engine.align_overflow(models.actor, models.critic)
        for trained, name in steps:
            norm = engine.step(trained)
            if last:
                norms[name] = norm
    return sums, norms


def check_first_ratio(error: float, precision: str) -> None:
    """Before the first update of a rollout, actor and rollout are the same: the ratio must be 1."""
    if not error <= RATIO_TOLERANCE[precision]:
        raise RuntimeError(
            f"the probability ratio of the first minibatch is off by {error:.2g} on average (bound {RATIO_TOLERANCE[precision]:g} in {precision}): "
            "the update does not compute what the rollout was scored with"
        )


# --- evaluation and export --------------------------------------------------------------------------------------------


class Evaluator:
    """Responses to held-out prompts, always with the same random numbers: differences are the actor's."""

    def __init__(self, cfg: Config, held, tokenizer, models: Models, reader: Reader, log: RunLog):
        self.cfg, self.tokenizer, self.models, self.reader, self.log = cfg, tokenizer, models, reader, log
        count = min(cfg.ppo.eval_prompts, len(held))
        # Every rank answers equally many; with fewer prompts than ranks, some are asked twice
        count = max(count // ranks.world(), 1) * ranks.world()
        picked = np.resize(subset(len(held), count), count)
        chosen = held.select(picked)
        self.prompts = chosen["input_ids"]
        self.turns = [json.loads(text) for text in chosen["turns"]]
        self.judged = any(source.adapter == "toy" for source in cfg.dataset.sources.values())

    def __call__(self, done: int, state: State, calibrate: bool = False) -> tuple[dict, list[dict]]:
        """Returns mean facts, and one row per prompt. calibrate: set the score normaliser from these responses. Collective."""
        with self.log.phase("eval"):
            episodes = [EVAL_EPISODE + n for n in range(len(self.prompts))]
            rollout = collect(self.models, self.reader, list(self.prompts), self.cfg.seed, episodes, with_values=False)
        if calibrate:
            state.score_mean, state.score_std = float(rollout.scores.mean()), max(float(rollout.scores.std()), 1e-3)
        scores = (rollout.scores - state.score_mean) / state.score_std
        responses = [
            decode_response(self.tokenizer, ids[:n]) for ids, n in zip(rollout.responses.tolist(), rollout.lengths.tolist(), strict=True)
        ]
        judged = [toy.judge(r) for r in responses] if self.judged else [None] * len(responses)
        facts = {
            "score": float(scores.mean()),
            "kl": float(((rollout.logprobs - rollout.ref_logprobs) * rollout.mask).sum(1).mean()),
            "length": float(rollout.lengths.float().mean()),
            "truncated_rate": 1 - float(rollout.ended.float().mean()),
            "judge": float(np.mean(judged)) if self.judged else None,
        }
        judge = f"  judge {facts['judge']:+.3f}" if self.judged else ""
        headline = f"held-out score {facts['score']:+.2f}  kl {facts['kl']:.2f}  length {facts['length']:.0f}{judge}"
        metrics = {f"eval/{k}": v for k, v in facts.items() if v is not None}
        self.log.record(done, metrics | {"episode": done * self.cfg.ppo.rollout_batch}, headline)
        asked = [t[-1]["content"] for t in self.turns]
        rows = zip(asked, responses, scores.tolist(), judged, strict=True)
        return facts, [{"prompt": p, "response": r, "score": s, "judge": j} for p, r, s, j in rows]


def paired(before: list[dict], after: list[dict]) -> list[dict]:
    """SFT's response beside PPO's, for every held-out prompt."""
    return [
        {
            "prompt": old["prompt"],
            "sft": old["response"],
            "ppo": new["response"],
            "sft_score": old["score"],
            "ppo_score": new["score"],
            "sft_judge": old["judge"],
            "ppo_judge": new["judge"],
        }
        for old, new in zip(before, after, strict=True)
    ]


def export(cfg: Config, folder: Path, models: Models, ema: Ema | None, tokenizer) -> dict[str, str | None]:
    """Save actor, critic, averaged actor and adapters. Collective."""
    options = {"dtype": engine.DTYPES[cfg.hardware.precision], "max_new_tokens": cfg.model.max_response_tokens}
    actor, critic = models.actor.module, models.critic.module
    save_model(actor, folder / "model", tokenizer, **options)
    save_model(critic, folder / "critic", tokenizer, **options)
    if ema:
        with ema.swapped_in():
            save_model(actor, folder / "model_ema", tokenizer, **options)
    if cfg.model.actor.lora.dim:
        save_adapter(actor, folder / "adapter")
    made = {"actor": "model", "critic": "critic", "actor_ema": "model_ema", "adapter": "adapter"}
    return {name: str(folder / part) if (folder / part).exists() else None for name, part in made.items()}
