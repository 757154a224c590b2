"""PPO (arXiv 1707.06347) against the reward model, from the SFT actor, as in InstructGPT (2203.02155).

Every rank holds the whole rollout batch, so statistics are global and minibatches do not depend on the number of ranks. The
random numbers of response i depend on (seed, i) alone. Dropout is off in all four models.
"""

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from runner import engine, flops
from runner.config.schema import Config, Ppo
from runner.data import cache
from runner.data.batches import Batches
from runner.deepspeed_config import engine_configs
from runner.durable.checkpoint import Checkpoints
from runner.errors import UserError
from runner.losses import adapt_kl_coef, explained_variance, gae, kl_estimate, masked_mean, token_rewards, whiten
from runner.metrics import RunLog
from runner.models.ema import Ema
from runner.models.saving import save_model
from runner.rollout import graph
from runner.rollout.collect import Models, RolloutSettings, collect
from runner.rollout.families import side_by_side
from runner.rollout.record import Rollout
from runner.rollout.stops import Stops
from runner.schedules import is_due, lr_share, warmup_steps
from runner.stages import invariants
from runner.stages.build import Inputs, load_actor, load_reference, load_reward, tokenizer_for
from runner.stages.export import export, export_options
from runner.stages.heldout import HeldOut, paired
from runner.stages.ppo_update import Mixture, Progress, steps_before, update
from runner.watch.finite import check_finite
from runner.watch.stop import Stopped


@dataclass
class State:
    """What PPO carries from one iteration to the next, apart from the weights; saved in every checkpoint."""

    kl_coef: float
    score_mean: float = 0.0
    score_std: float = 1.0
    value_mean: float = 0.0  # of the initial critic's output, which then counts as the mean score
    value_std: float = 1.0
    tokens: int = 0
    before: dict | None = None  # evaluation of the SFT actor
    sft_rows: list | None = None  # its responses to the held-out prompts
    progress: Progress = field(default_factory=Progress)  # of the update of this iteration

    def facts(self) -> dict:
        """What a checkpoint holds. Called after every iteration, so it does not copy rows that never change."""
        return vars(self) | {"progress": asdict(self.progress)}

    @classmethod
    def of_checkpoint(cls, facts: dict) -> "State":
        return cls(**facts | {"progress": Progress(**facts["progress"])})

    def scales(self) -> dict[str, float]:
        """The units of rewards and values: (x - mean) / std of what the reward model and the critic output."""
        return {name: getattr(self, name) for name in ("score_mean", "score_std", "value_mean", "value_std")}

    def calibrate(self, rollout: Rollout, normalize: bool) -> None:
        """Set the scale of the scores, and where the critic starts, from the SFT actor's responses.

        The critic starts as the reward model, which has learnt to score whole responses. In the middle of one it may be off by several
        standard deviations; then ending looks like a gain, or a loss, and the first updates teach nothing but length.
        """
        scores, values = rollout.scores, rollout.values[rollout.mask.bool()]
        if normalize and len(scores) > 1:  # torch gives NaN as the deviation of one score
            self.score_mean, self.score_std = float(scores.mean()), max(float(scores.std()), 1e-3)
            # At least 1: a smaller one would magnify the values, and with them every optimizer step
            self.value_mean, self.value_std = float(values.mean()), max(1.0, float(values.std()), self.score_std)
        else:
            self.value_mean = float(values.mean() - scores.mean())


def train(cfg: Config, inputs: Inputs, log: RunLog, device: torch.device) -> None:
    """Train the actor and export it to <step folder>/model, the critic to critic/, the averaged actor to model_ema/."""
    ppo = cfg.ppo

    # 1. Prompts: the seed and the number of an iteration fix its prompts
    tokenizer = tokenizer_for(cfg, cfg.model.actor, inputs.tokenizer)
    rows, held, counts = cache.load(Path(inputs.data))
    # Every rank holds the whole batch, and only its rows count here: micro batches are made of the rollout
    batches = Batches(np.asarray(rows["length"]), ppo.rollout_batch, 1, world=1, rank=0, seed=cfg.seed, drop_last=True)
    total = batches.steps(ppo.epochs, ppo.max_steps)

    # 2. Four models: the actor and its frozen reference, the critic and the reward model that it starts from
    models = build(cfg, inputs, tokenizer, device)
    mixture = Mixture(cfg, inputs.ptx, tokenizer.pad_token_id, models.actor.module.pads_nothing) if ppo.ptx_coef else None
    sizes = {name: flops.matrix_sizes(e.module.hf) for name, e in (("actor", models.actor), ("critic", models.critic))}
    ema = Ema(models.actor.module, ppo.ema_decay) if ppo.ema_decay else None
    settings = rollout_settings(cfg, models, tokenizer, log)
    held_out = HeldOut(cfg, held, tokenizer, models, settings, log)

    # 3. Resume from the newest checkpoint, if there is one; otherwise evaluate the SFT actor and calibrate
    checkpoints = Checkpoints(inputs.folder, inputs.key, cfg, {"actor": models.actor, "critic": models.critic}, log, average=ema)
    first, saved, tensors = checkpoints.restore()
    state = State.of_checkpoint(saved) if saved else State(kl_coef=ppo.kl_coef)
    if ppo.kl_target is None:  # without a controller it is no state: resume=force may have changed it
        state.kl_coef = ppo.kl_coef
    unfinished = Rollout(**tensors) if tensors else None  # of a run that stopped in the middle of an update
    log.begin(first, total)
    if state.before is None:
        responses = held_out.sample(0, max(ppo.calibration_prompts, ppo.eval_prompts), with_values=True)
        state.calibrate(responses.first(ppo.calibration_prompts), ppo.normalize_scores)
        state.before, state.sft_rows = held_out.evaluate(0, state, responses.first(ppo.eval_prompts))
    models.critic.module.normalise(state.value_mean, state.value_std)
    frozen = {"reward": models.reward} | ({"ref": models.ref} if models.ref else {})
    warm = ppo.critic_warmup + warmup_steps(ppo.warmup, max(1, total - ppo.critic_warmup))
    watch = invariants.WeightWatch(log, {"actor": models.actor, "critic": models.critic}, frozen, warm + 2)
    guard = partial(check_finite, cfg, inputs.folder, inputs.stage, tokenizer=tokenizer)

    for i in range(first, total):
        # The actor's schedule starts after the critic's warm-up
        for trained, start in ((models.actor, ppo.critic_warmup), (models.critic, 0)):
            share = lr_share(max(0, i - start), max(1, total - start), ppo.lr_schedule, ppo.warmup, ppo.lr_end)
            engine.set_learning_rate(trained, share)

        # 4. Rollout: one response per prompt, scored by all four models
        rollout, unfinished = unfinished, None
        if rollout is None:
            prompts = rows.select(batches.rows(i))["input_ids"]
            episodes = list(range(i * ppo.rollout_batch, (i + 1) * ppo.rollout_batch))
            try:
                rollout = collect(models, settings, prompts, cfg.seed, episodes, stoppable=True, phase=log.phase)
            except Stopped as stopped:  # nothing is lost: sampling again gives the same rollout
                checkpoints.leave(str(stopped), f"step_{i}", i, state.facts())
            state.tokens += rollout.tokens()
            state.progress = Progress()

        # 5. Rewards, advantages and returns, over the whole batch
        metrics = fill_rewards(cfg, rollout, state)
        invariants.check(log, f"iteration {i + 1}", invariants.of_rollout(cfg, settings, rollout))

        # 6. Update: several passes of several minibatches
        begun = state.progress.position
        with log.phase("update"):
            reason = update(cfg, models, rollout, mixture, i, state.progress, guard)
        if reason:
            checkpoints.leave(reason, f"step_{i}_{state.progress.position}", i, state.facts(), rollout.sampled())
        metrics |= state.progress.metrics()
        ratio = invariants.first_ratio(state.progress.ratio_error, cfg.hardware.precision)
        invariants.check(log, f"iteration {i + 1}", {"first_ratio": ratio})

        # 7. KL controller and averaged weights. While the critic warms up, the KL is that of an actor that nothing has trained
        done, kl = i + 1, metrics["objective/kl"]
        if ppo.kl_target is not None and i >= ppo.critic_warmup:
            state.kl_coef = adapt_kl_coef(state.kl_coef, kl, ppo.kl_target, ppo.rollout_batch, ppo.kl_horizon)
        if ema:
            ema.update()

        # 8. Log; evaluate and save if due, and stop if someone asked for it
        rates = {f"lr/{name}": engine.learning_rate(e) for name, e in (("actor", models.actor), ("critic", models.critic))}
        metrics |= {"episode": done * ppo.rollout_batch} | rates
        metrics |= decoding(cfg, models, sizes["actor"], settings.stats)
        watch(done)
        headline = f"score {metrics['objective/scores']:+z.2f}  kl {kl:z.2f}  length {metrics['rollout/response_length_mean']:.0f}"
        taken = range(begun, state.progress.position)
        tokens = 0 if begun else rollout.tokens()  # 0 if an earlier run sampled them: the time of this one gives no rate
        log.log(done, metrics, headline, tokens, update_flops(ppo, sizes, rollout, mixture, i, taken), during="update")
        log.histogram(done, "rollout/scores", rollout.scores.tolist())
        score = None
        if is_due(ppo.eval_every, done, total):
            score = held_out.ask_again(done, state)[0]["score"]
        checkpoints.after(done, total, state.facts(), score)
    checkpoints.finish()

    # 9. Export, and the facts for the summary
    after, ppo_rows = held_out.ask_again(total, state)
    with log.phase("export"):
        exports = export_all(cfg, inputs.folder, models, ema, tokenizer, state.scales(), best=lambda: checkpoints.load_best(after["score"]))
    samples = paired(state.sft_rows, ppo_rows)
    log.samples(total, samples)
    facts = {"before": state.before, "after": after, "eval_prompts": len(ppo_rows), "samples": samples[:3], "exports": exports}
    log.result({"steps": total, "data": counts, "tokens": state.tokens, **state.scales(), **facts})


# --- building ---------------------------------------------------------------------------------------------------------


def build(cfg: Config, inputs: Inputs, tokenizer, device: torch.device) -> Models:
    """The four models of PPO. Dropout is off everywhere: the ratio of the first minibatch must be 1."""
    ppo, configs = cfg.ppo, engine_configs(cfg, "ppo")
    actor_part, reward_part = cfg.model.actor, cfg.model.reward
    sampling = {"temperature": ppo.temperature, "top_k": ppo.top_k, "top_p": ppo.top_p, "min_tokens": ppo.min_response_tokens}
    sampling["vocabulary"] = max(tokenizer.get_vocab().values()) + 1
    checkpointing = cfg.hardware.gradient_checkpointing
    options = {"betas": ppo.betas, "eps": ppo.eps}

    args = {"dropout": 0.0, "lora": replace(actor_part.lora, dropout=0.0), "checkpointing": checkpointing.actor, "sampling": sampling}
    actor = load_actor(cfg, inputs.parents["sft"], tokenizer, configs["actor"], **args)
    actor = engine.trainable(
        actor, configs["actor"], lr=ppo.actor_lr, lora_lr=ppo.actor_lora_lr, weight_decay=ppo.actor_weight_decay, **options
    )
    if not actor.zero_optimization():  # ZeRO lays weights out itself
        side_by_side(actor.module.hf)
    args = {"dropout": 0.0, "lora": replace(reward_part.lora, dropout=0.0), "fresh_head": False, "checkpointing": checkpointing.critic}
    critic = load_reward(cfg, inputs.parents["reward"], tokenizer, configs["critic"], **args)
    critic = engine.trainable(
        critic, configs["critic"], lr=ppo.critic_lr, lora_lr=ppo.critic_lora_lr, weight_decay=ppo.critic_weight_decay, **options
    )
    ref = load_reference(cfg, inputs.parents["sft"], tokenizer, configs.get("ref", {}), device, sampling)
    ds_config = configs.get("reward", {})
    reward = load_reward(cfg, inputs.parents["reward"], tokenizer, ds_config, dropout=0.0, lora=None, fresh_head=False)
    return Models(actor, critic, ref, engine.frozen(reward, ds_config, device))


def rollout_settings(cfg: Config, models: Models, tokenizer, log: RunLog) -> RolloutSettings:
    """How rollouts are sampled and scored."""
    ppo, rollout, micro = cfg.ppo, cfg.rollout, cfg.hardware.micro_batch
    sizes = (cfg.model.max_response_tokens, micro.rollout, micro.score)
    settings = RolloutSettings(tokenizer.pad_token_id, tokenizer.eos_token_id, *sizes, log.device, rollout.engine, rollout.max_mismatch)
    if ppo.stop:
        settings.stops = Stops.of(tokenizer, ppo.stop, models.actor.module.hf.config.vocab_size, log.device)
    if rollout.engine != "hf" and (reason := graph.why_not(models.actor.module.hf, log.device)):
        if rollout.engine == "graph":
            raise UserError(f"rollout.engine=graph cannot sample here ({reason}): type rollout.engine=auto")
        log.say(f"the decode engine cannot sample here ({reason}): transformers' generate does instead, slowly")
        settings.engine = "hf"
    return settings


# --- one iteration ----------------------------------------------------------------------------------------------------


def normalised(cfg: Config, state: State, scores: torch.Tensor, finished: torch.Tensor) -> torch.Tensor:
    """Scores as PPO uses them: in standard deviations above the SFT actor's mean, clipped, less the penalty for a missing EOS."""
    scores = (scores - state.score_mean) / state.score_std
    if cfg.ppo.score_clip:
        scores = scores.clamp(-cfg.ppo.score_clip, cfg.ppo.score_clip)
    return scores - cfg.ppo.missing_eos_penalty * (~finished).float()


def fill_rewards(cfg: Config, rollout: Rollout, state: State) -> dict[str, float]:
    """Fill in rewards, advantages and returns. Returns the metrics of the rollout."""
    ppo, mask = cfg.ppo, rollout.mask
    scores = normalised(cfg, state, rollout.scores, rollout.finished)
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
        "rollout/truncated_rate": 1 - rollout.finished.float().mean(),
        "rollout/score_mean": rollout.scores.mean(),
        "rollout/score_std": rollout.scores.std(),
        "rollout/logprob_mismatch": masked_mean(rollout.mismatch, mask * rollout.recomputed.unsqueeze(1)),
        "rollout/logprob_mismatch_max": rollout.mismatch.max(),
        "rollout/recomputed": rollout.recomputed.float().mean(),
        "val/num_eos_tokens": rollout.ended.sum(),
        "val/explained_var": explained_variance(rollout.values, rollout.returns, mask),
    }
    return {name: float(value) for name, value in facts.items()}


# --- efficiency -------------------------------------------------------------------------------------------------------


def pass_flops(sizes: dict[str, flops.MatrixSizes], rollout: Rollout, actor_trains: bool) -> float:
    """FLOPs of one pass of updates over a rollout, without the ptx mixture."""
    lengths = rollout.prompt_lengths + rollout.lengths
    actor = flops.training(sizes["actor"], lengths, float(rollout.lengths.sum())) if actor_trains else 0.0
    return actor + flops.training(sizes["critic"], lengths)


def update_flops(ppo: Ppo, sizes: dict[str, flops.MatrixSizes], rollout: Rollout, mixture: Mixture | None, i: int, taken: range) -> float:
    """FLOPs of the optimizer steps `taken` of iteration i, counted from 0 in it. Each reads one of ppo.minibatches parts of a rollout."""
    actor_trains = i >= ppo.critic_warmup
    done = len(taken) / ppo.minibatches * pass_flops(sizes, rollout, actor_trains)
    if not mixture or not actor_trains:
        return done
    first = steps_before(ppo, i)
    return done + mixture.work(sizes["actor"], range(first + taken.start, first + taken.stop))


def decoding(cfg: Config, models: Models, actor: flops.MatrixSizes, stats) -> dict[str, float]:
    """Metrics of this rank's decoding; {} if the engine did not count. stats: see runner/rollout/stats.py."""
    if not stats.steps:
        return {}
    found = {"rollout/decode_ms_per_token": 1e3 * stats.decode_seconds / stats.steps}
    if cfg.hardware.bandwidth_gb_s:
        itemsize = next(models.actor.module.parameters()).element_size()
        read = flops.decode_bytes(actor, stats.steps, stats.cached, itemsize)
        found["perf/mbu"] = flops.mbu(read, stats.decode_seconds, cfg.hardware.bandwidth_gb_s)
    return found


# --- export -----------------------------------------------------------------------------------------------------------


def export_all(cfg: Config, folder: Path, models: Models, ema: Ema | None, tokenizer, scales: dict, best) -> dict[str, str | None]:
    """Save critic, averaged actor, actor, adapters, and the best actor if `best()` loads one. Collective.

    scales: State.scales, the units of the critic's values; they go into its config.json.
    """
    actor, options = models.actor.module, export_options(cfg)
    save_model(models.critic.module, folder / "critic", tokenizer, extra=scales, **options)
    if ema:
        with ema.swapped_in():
            save_model(actor, folder / "model_ema", tokenizer, **options)
    export(cfg, folder, actor, tokenizer, cfg.model.actor.lora, best)
    made = {"actor": "model", "critic": "critic", "actor_ema": "model_ema", "actor_best": "model_best", "adapter": "adapter"}
    return {name: str(folder / part) if (folder / part).exists() else None for name, part in made.items()}
