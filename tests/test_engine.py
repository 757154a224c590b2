"""Engines: one update is the same on any number of ranks and under any ZeRO stage; averages and checkpoints are exact."""

import json
import math
from dataclasses import asdict, replace
from functools import cache as cached
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import numpy as np
import pytest
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from safetensors.torch import load_file
from tiny import EOS, NAMES, PAD, actor, causal, config, family, predictions, rows
from trained import bits, run_worker, train, trainable
from workers import overflow, update

from runner import engine
from runner.config.schema import SHARES, Lora
from runner.data import cache
from runner.data.batches import EMPTY, Batches, loss_weights, pad, pair_batch, pick, sft_batch
from runner.deepspeed_config import engine_configs
from runner.durable.shards import shards, steps_taken
from runner.engine import parameter_groups
from runner.errors import UserError
from runner.losses import pairwise_loss, policy_loss, sft_loss, value_loss
from runner.models.ema import Ema
from runner.models.loading import load_causal, load_scalar
from runner.models.lora import add_lora
from runner.models.saving import full_state_dict
from runner.models.tokenizer import load_tokenizer
from runner.models.wrappers import Actor, Scalar
from runner.rollout.collect import RolloutSettings, collect, response_logprobs, response_values, sample
from runner.stages import ppo, ppo_update
from runner.stages.invariants import first_ratio
from runner.stages.reward import last_scores
from runner.watch.finite import check_finite

ROOT = Path(__file__).resolve().parents[1]


# --- the step in half precision without ZeRO --------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.0, 0.015])
def test_a_loss_scale_that_grows_changes_no_step(clip, alone):
    """Plain descent on a constant gradient of 0.01 (of norm 0.02): every step is the same, before, at and after a growth of the scale."""
    deepspeed.init_distributed("gloo")
    half = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
    scaling = {"init_scale": 1024.0, "scale_window": 2, "min_scale": 1.0, "delayed_shift": 1, "consecutive_hysteresis": False}
    inner = torch.optim.SGD([half], lr=1.0)
    optimizer = FP16_UnfusedOptimizer(inner, deepspeed=None, dynamic_loss_scale=True, dynamic_loss_args=scaling, clip_grad=clip)
    (master,), counts, scales, moves = optimizer.fp32_groups[0], optimizer.loss_scale_config, [], []
    for _ in range(5):
        before = master.detach().clone()
        scales.append(counts.cur_scale)
        half.grad = torch.full_like(half, 0.01 * counts.cur_scale)
        assert not engine._step_at_once(optimizer)
        assert optimizer._global_grad_norm == pytest.approx(0.02, rel=1e-3)
        moves.append(float((before - master.detach())[0]))
    assert scales[-1] > scales[0]
    assert moves == pytest.approx([0.0075 if clip else 0.01] * 5, rel=1e-3)


@pytest.mark.parametrize("zero", [0, 1])
def test_half_precision_begins_with_the_first_step(zero, alone):
    """And with the weights that were loaded. AdamW's first step is the sign of the gradient times the rate; weight decay comes on top."""
    made, rate = rows([7, 9]), 1e-2
    ids, mask = pad(made, PAD)
    trained = trainable(actor("opt").bfloat16(), zero, "bf16", lr=rate, weight_decay=0.5)
    assert steps_taken(trained) == 0
    (weight,) = [s.tensors["weight"] for s in shards(trained) if s.name.endswith("layers.0.fc1.weight")]
    loaded = dict(actor("opt").bfloat16().named_parameters())["model.model.decoder.layers.0.fc1.weight"].float()
    assert torch.equal(weight.view_as(loaded), loaded)
    engine.set_learning_rate(trained, 1.0)
    logprobs, _ = trained(ids, mask, *predictions(made, ids.size(1), False))
    engine.backward(trained, sft_loss(logprobs, torch.ones_like(logprobs)), 5, last=True)
    engine.step(trained)
    (after,) = [s.tensors["weight"] for s in shards(trained) if s.name.endswith("layers.0.fc1.weight")]
    moved = (after.view_as(loaded) - loaded * (1 - 0.5 * rate)).abs()
    assert moved.median().item() == pytest.approx(rate, rel=1e-3)


def test_a_fixed_loss_scale_skips_a_step_that_overflows(alone):
    deepspeed.init_distributed("gloo")
    half = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
    inner = torch.optim.SGD([half], lr=1.0)
    optimizer = FP16_UnfusedOptimizer(inner, deepspeed=None, static_loss_scale=128.0, dynamic_loss_scale=False)
    half.grad = torch.full_like(half, torch.inf)
    assert engine._step_at_once(optimizer)
    engine._check_scale(SimpleNamespace(fp16_enabled=lambda: True, optimizer=optimizer))  # does not raise
    assert torch.equal(half, torch.ones_like(half))


# --- one update, whatever the machine ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer) -> Path:
    made = tmp_path_factory.mktemp("updates")
    update.prepare(made, tokenizer)
    return made


@pytest.fixture(scope="session")
def on_one_rank(folder, alone):
    """on_one_rank(zero) -> what `update.updates` gives in this process."""
    return cached(lambda zero: update.updates(folder, zero, alone))


@pytest.fixture(scope="session")
def on_ranks(folder):
    """on_ranks(world, zero) -> the same from 2 or 4 processes."""
    run_worker(update.__file__, folder, "2", "4")
    return lambda world, zero: torch.load(folder / f"{world}x{zero}.pt", weights_only=True)


BEFORE = {name: "actor/before" for name in ("sft", "dpo", "actor", "ema")} | {name: "critic/before" for name in ("reward", "critic")}


def assert_same(found: dict, expected: dict) -> None:
    """Weights by how they moved: to 1e-5 of the whole movement. Tokens exactly, other numbers to 1e-5."""
    assert found.keys() == expected.keys()
    for name, before in BEFORE.items():
        moved, wanted = found[name] - found[before], expected[name] - expected[before]
        assert wanted.norm() > 0.2
        assert (moved - wanted).norm() < 1e-5 * wanted.norm(), name
    for name in expected.keys() - BEFORE.keys():
        exact = not expected[name].is_floating_point() or name.endswith("/before")
        tolerance = 0 if exact else 1e-5
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_zero_stages_make_the_same_updates(zero, on_one_rank):
    assert_same(on_one_rank(zero), on_one_rank(0))


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2, 3])
@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_ranks_makes_the_same_updates(world, zero, on_ranks, on_one_rank):
    """Two steps of SFT, reward model and DPO, the second with empty slots; a rollout; a step of PPO with text beside it."""
    assert_same(on_ranks(world, zero), on_one_rank(0))


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 3])
def test_the_average_is_exported_and_the_own_weights_come_back(zero, on_one_rank):
    found = on_one_rank(zero)
    # Decay 0.75: a quarter of the way
    torch.testing.assert_close(found["ema"], 0.75 * found["actor/before"] + 0.25 * found["actor"], rtol=1e-6, atol=1e-6)
    assert torch.equal(found["logprobs/own"], found["logprobs/again"])


def plain_model(folder: Path, stage: str):
    """The model of a stage without DeepSpeed, as it begins."""
    cfg = update.configuration(1, 0)
    tokenizer = load_tokenizer(str(folder / "tokenizer"), chat_template=cfg.model.chat_template)
    options = {"dtype": torch.float32, "attention": "auto", "dropout": 0.0, "seed": cfg.seed}
    if stage in ("sft", "dpo", "actor"):
        vocabulary = len(tokenizer) if stage == "actor" else None  # PPO samples nothing that is no token
        return Actor(load_causal(str(folder / "actor"), tokenizer, **options), "opt", 0, vocabulary=vocabulary)
    return Scalar(load_scalar(str(folder / "reward"), tokenizer, fresh_head=stage == "reward", **options), "opt")


def plain_steps(model, losses, *, lr: float, weight_decay: float, betas) -> tuple[torch.Tensor, list[float]]:
    """AdamW steps on whole batches. Returns the weights and the gradient norms."""
    optimizer = torch.optim.AdamW(parameter_groups(model, lr, lr, weight_decay), lr=lr, betas=tuple(betas), eps=1.0)
    norms = []
    for loss in losses:
        optimizer.zero_grad()
        loss().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
    return update.flat(full_state_dict(model, torch.float32)), norms


def assert_moved_alike(found, expected, before) -> None:
    assert (found - expected).norm() < 1e-5 * (expected - before).norm()


def whole_batches(folder: Path, stage: str) -> list[list[dict]]:
    """The rows of each of the two steps, in one batch."""
    train = cache.load(folder / "data" / SHARES[stage])[0]
    batches = Batches(train["length"], 8, 8, world=1, rank=0, seed=update.configuration(1, 0).seed)
    found = [pick(train, batches.rows(s)[batches.rows(s) != EMPTY]) for s in (0, 1)]
    assert sorted(map(len, found)) == [3, 8]
    return found


@pytest.mark.slow
def test_sft_is_plain_gradient_descent_on_whole_batches(folder, on_one_rank):
    """Mean loss over all (weighted) tokens of the global batch: accumulation, ranks and empty slots leave no trace."""
    model, sft = plain_model(folder, "sft"), update.configuration(1, 0).sft
    before, values = update.flat(full_state_dict(model, torch.float32)), []

    def loss_of(made: list[dict]):
        def loss():
            batch = sft_batch(made, PAD, sft.prompt_loss)
            total = loss_weights(np.array([r["length"] for r in made]), np.array([r["prompt_length"] for r in made]), sft.prompt_loss).sum()
            logprobs, _ = model(batch["ids"], batch["mask"], batch["index"], batch["targets"])
            assert total == pytest.approx(batch["weights"].sum().item())
            values.append(sft_loss(logprobs, batch["weights"]) / total)
            return values[-1]

        return loss

    losses = [loss_of(made) for made in whole_batches(folder, "sft")]
    weights, norms = plain_steps(model, losses, lr=sft.lr, weight_decay=sft.weight_decay, betas=sft.betas)
    found = on_one_rank(0)
    assert_moved_alike(found["sft"], weights, before)
    logged = found["sft/metrics"].tolist()  # eval, (loss, norm), (loss, norm), eval
    assert logged[1:5] == pytest.approx([values[0].item(), norms[0], values[1].item(), norms[1]], rel=1e-5)


@pytest.mark.slow
def test_reward_model_is_plain_gradient_descent_on_whole_batches(folder, on_one_rank):
    model, rm = plain_model(folder, "reward"), update.configuration(1, 0).reward
    before, values = update.flat(full_state_dict(model, torch.float32)), []

    def loss_of(made: list[dict]):
        def loss():
            values.append(pairwise_loss(*last_scores(model, pair_batch(made, PAD)), rm.center_coef) / len(made))
            return values[-1]

        return loss

    losses = [loss_of(made) for made in whole_batches(folder, "reward")]
    weights, norms = plain_steps(model, losses, lr=rm.lr, weight_decay=rm.weight_decay, betas=rm.betas)
    found = on_one_rank(0)
    assert_moved_alike(found["reward"], weights, before)
    logged = found["reward/metrics"].tolist()  # (loss, norm, accuracy, mean of the chosen) twice
    assert [logged[0], logged[1], logged[4], logged[5]] == pytest.approx([values[0].item(), norms[0], values[1].item(), norms[1]], rel=1e-5)


@pytest.mark.slow
def test_dpo_is_plain_gradient_descent_on_whole_batches(folder, on_one_rank):
    """By the formula of the paper (arXiv 2305.18290), token by token, with a tenth of the labels taken to be wrong."""
    model, ref, dpo = plain_model(folder, "dpo"), plain_model(folder, "dpo").requires_grad_(False), update.configuration(1, 0).dpo
    before, values = update.flat(full_state_dict(model, torch.float32)), []

    def logprob(model, ids: list[int], prompt: int) -> torch.Tensor:
        row = torch.tensor([ids])
        index, targets = predictions([ids], len(ids), False)
        return model(row, torch.ones_like(row), index, targets)[0][prompt - 1 :].sum()

    def log_ratio(row: dict, name: str) -> torch.Tensor:
        return logprob(model, row[name], row["prompt_length"]) - logprob(ref, row[name], row["prompt_length"])

    def loss_of(made: list[dict]):
        def loss():
            margins = torch.stack([dpo.beta * (log_ratio(r, "chosen_ids") - log_ratio(r, "rejected_ids")) for r in made])
            right = torch.sigmoid(margins)
            values.append(-(0.9 * right.log() + 0.1 * (1 - right).log()).mean())
            return values[-1]

        return loss

    losses = [loss_of(made) for made in whole_batches(folder, "dpo")]
    weights, norms = plain_steps(model, losses, lr=dpo.lr, weight_decay=dpo.weight_decay, betas=dpo.betas)
    found = on_one_rank(0)
    assert_moved_alike(found["dpo"], weights, before)
    logged = found["dpo/metrics"].tolist()  # eval; (loss, norm, accuracy, mean of the chosen) twice; eval
    assert logged[:2] == pytest.approx([math.log(2)] * 2, rel=1e-6)
    assert [logged[1], logged[2], logged[5], logged[6]] == pytest.approx([values[0].item(), norms[0], values[1].item(), norms[1]], rel=1e-5)


@pytest.mark.slow
def test_ppo_minibatch_is_plain_gradient_descent_on_the_whole_minibatch(folder, on_one_rank, alone):
    block, rollout = update.configuration(1, 0).ppo, update.fixed_rollout()
    tokens, mask = float(rollout.lengths.sum()), rollout.mask
    clip = {"cliprange": block.cliprange, "dual_clip": block.dual_clip, "log_ratio_clamp": block.log_ratio_clamp}
    models = {name: plain_model(folder, name) for name in ("actor", "critic")}
    before = {name: update.flat(full_state_dict(model, torch.float32)) for name, model in models.items()}
    made, facts = whole_batches(folder, "sft")[0], {}

    def actor_loss():
        logprobs, _ = response_logprobs(models["actor"], rollout)
        loss, sums = policy_loss(logprobs, rollout.logprobs, rollout.advantages, mask, **clip)
        facts.update(policy=loss.item(), **{name: value.item() for name, value in sums.items()})
        text = sft_batch(made, PAD, 0.0)
        ptx = sft_loss(models["actor"](text["ids"], text["mask"], text["index"], text["targets"])[0], text["weights"])
        facts["ptx"] = ptx.item()
        return loss / tokens + block.ptx_coef * ptx / text["weights"].sum()

    def critic_loss():
        values = response_values(models["critic"], rollout)
        loss, sums = value_loss(values, rollout.values, rollout.returns, mask, cliprange_value=block.cliprange_value)
        facts.update(value=loss.item(), **{name: value.item() for name, value in sums.items()})
        return loss / tokens

    found, norms = on_one_rank(0), {}
    for name, loss in (("actor", actor_loss), ("critic", critic_loss)):
        weights, norms[name] = plain_steps(models[name], [loss], lr=getattr(block, f"{name}_lr"), weight_decay=0.0, betas=block.betas)
        assert_moved_alike(found[name], weights, before[name])
    assert found["ppo/norms"].tolist() == pytest.approx(norms["actor"] + norms["critic"], rel=1e-5)
    assert 0.1 < facts["clipfrac"] / tokens < 0.9  # the fixed rollout has clipped and unclipped tokens
    order = ("policy", "value", "ptx", "ratio", None, "clipfrac", "approxkl", "value_clipfrac")
    for name, value in zip(order, found["ppo/sums"].tolist(), strict=False):
        assert name is None or value == pytest.approx(facts[name], rel=1e-5), name


def test_sampling_gathers_layer_by_layer_where_zero3_weights_do_not_fit(alone, monkeypatch):
    models = ppo.Models(trainable(actor("llama"), 3, lr=0.1), None, None, None)
    prompts = rows([4, 9, 1], seed=2)

    def sampled() -> tuple[list, int]:
        settings = RolloutSettings(PAD, EOS, 8, 2, 2, alone)
        return sample(models, settings, prompts, 5, [0, 1, 2]).responses.tolist(), settings.stats.rows

    whole, counted = sampled()
    monkeypatch.setattr(engine, "_fits_whole", lambda engine: False)
    assert sampled() == (whole, 0) and counted > 0


# --- the passes over a rollout ----------------------------------------------------------------------------------------


def answered(cfg, models, device: torch.device):
    """A scored rollout of 16 responses, with rewards."""
    found = collect(models, RolloutSettings(PAD, EOS, 10, 4, 4, device), rows(list(range(2, 18)), seed=4), seed=3, episodes=list(range(16)))
    ppo.fill_rewards(cfg, found, ppo.State(kl_coef=0.1))
    return found


def ppo_models(folder: Path, device: torch.device, lora: Lora | None = None, **changes):
    """(config, models, their rollout)"""
    cfg = update.configuration(1, 0)
    cfg = replace(cfg, ppo=replace(cfg.ppo, ptx_coef=0.0, eps=1e-5, actor_lr=1e-3, critic_lr=1e-3, **changes))
    if lora:
        cfg = replace(cfg, model=replace(cfg.model, **{n: replace(getattr(cfg.model, n), lora=lora) for n in ("actor", "reward")}))
    step = update.inputs(folder, "ppo", folder)
    models = ppo.build(cfg, step, ppo.tokenizer_for(cfg, cfg.model.actor, step.tokenizer), device)
    return cfg, models, answered(cfg, models, device)


def updated(cfg, models, rollout, iteration: int) -> dict[str, float]:
    """A whole update. Returns its metrics."""
    progress = ppo_update.Progress()
    assert ppo_update.update(cfg, models, rollout, None, iteration, progress, guard=lambda **_: None) is None
    return progress.metrics()


@pytest.mark.parametrize("adapters", [False, True])
def test_the_ratio_of_the_first_minibatch_is_1(adapters, folder, alone):
    """Scoring and updating compute the same numbers; dropout is off, that of the adapters too."""
    lora = Lora(dim=4, alpha=8, dropout=0.5, targets=[], train_rest=False) if adapters else None
    rates = {"actor_lora_lr": 1e-2, "critic_lora_lr": 1e-2}
    cfg, models, rollout = ppo_models(folder, alone, lora, ppo_epochs=2, early_stop_kl=None, **rates)
    assert (models.ref is None) == adapters
    torch.testing.assert_close(rollout.logprobs, rollout.ref_logprobs, rtol=1e-5, atol=1e-5)
    first = updated(cfg, models, rollout, 0)
    assert first["policy/updates"] == 4 and first["policy/approxkl_avg"] > 1e-5
    # The adapters have left zero, where no dropout could be seen
    rollout = answered(cfg, models, alone)
    assert (rollout.logprobs - rollout.ref_logprobs).abs().max() > 0.01
    second = updated(cfg, models, rollout, 1)
    assert max(found["val/first_ratio_error"] for found in (first, second)) < 1e-5
    # The old log-probabilities are not this actor's any more
    assert "is off" in first_ratio(updated(cfg, models, rollout, 2)["val/first_ratio_error"], "fp32")


@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_padding_is_that_of_the_micro_batches_which_the_models_read(attention, folder, alone, monkeypatch):
    cfg, models, rollout = ppo_models(folder, alone)
    for model in (models.actor, models.critic):
        model.module.hf.config._attn_implementation = attention
    masks, read = [], response_values
    monkeypatch.setattr(ppo_update, "response_values", lambda critic, part: masks.append(part.sequences()[1]) or read(critic, part))
    found, whole = updated(cfg, models, rollout, 0)["perf/padding_fraction"], rollout.sequences()[1]
    empty = 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert found == (0.0 if attention == "packed" else pytest.approx(empty))
    assert 0 < empty < 1 - int(whole.sum()) / whole.numel()


def test_a_rollout_of_another_actor_is_noticed(folder, alone):
    cfg, models, rollout = ppo_models(folder, alone)
    rollout.logprobs = rollout.logprobs + 0.01 * rollout.mask
    fault = first_ratio(updated(cfg, models, rollout, 0)["val/first_ratio_error"], "fp32")
    assert "ratio of the first minibatch is off by 0.01 on average (bound 0.001 in fp32)" in fault


def test_early_stop_leaves_the_remaining_passes(folder, alone):
    cfg, models, rollout = ppo_models(folder, alone, ppo_epochs=4, early_stop_kl=1e-9)
    assert updated(cfg, models, rollout, 0)["policy/updates"] == 2  # one pass of two minibatches


def test_early_stop_leaves_the_remaining_minibatches_of_a_pass_too(folder, alone):
    cfg, models, rollout = ppo_models(folder, alone, minibatches=4, ppo_epochs=1, early_stop_kl=1e-9)
    assert updated(cfg, models, rollout, 0)["policy/updates"] == 2  # in the first the actor is still the one that sampled


@pytest.mark.parametrize("normalize", [True, False])
def test_the_critic_begins_at_the_mean_score(normalize, folder, alone):
    """Wherever the reward model stands in the middle of a response."""
    _, models, rollout = ppo_models(folder, alone)
    rollout.values = response_values(models.critic, rollout).detach() + 7.0 * rollout.mask
    state = ppo.State(kl_coef=0.0)
    state.calibrate(rollout, normalize)
    mask = rollout.mask.bool()
    read = (rollout.values[mask] - state.value_mean) / state.value_std
    scores = (rollout.scores - state.score_mean) / state.score_std
    torch.testing.assert_close(read.mean(), scores.mean(), atol=1e-5, rtol=0)
    assert not normalize or (read.std() <= 1 + 1e-5 and abs(scores.std() - 1) < 1e-5)


def test_a_single_held_out_prompt_gives_no_scale(folder, alone):
    """Its deviation is NaN, which would reach every reward; the critic begins at the mean score all the same."""
    *_, rollout = ppo_models(folder, alone)
    state = ppo.State(kl_coef=0.0)
    state.calibrate(rollout.rows(torch.tensor([0])), normalize=True)
    assert (state.score_mean, state.score_std, state.value_std) == (0.0, 1.0, 1.0)
    assert np.isfinite(state.value_mean)


def test_the_critic_is_read_in_the_units_of_the_rewards(folder, alone):
    _, models, _ = ppo_models(folder, alone)
    fixed = update.fixed_rollout()
    with torch.no_grad():
        raw = response_values(models.critic, fixed)
        models.critic.module.normalise(2.0, 4.0)
        torch.testing.assert_close(response_values(models.critic, fixed), (raw - 2.0) / 4.0 * fixed.mask)


def test_nan_stops_an_update_at_its_first_minibatch_and_leaves_the_batch_for_a_look(folder, alone, tmp_path, tokenizer):
    cfg, models, rollout = ppo_models(folder, alone, ppo_epochs=2)
    rollout.advantages = rollout.advantages * torch.nan
    progress = ppo_update.Progress()
    with pytest.raises(UserError, match=r"step 1 gave loss nan and gradient norm .*; its batch is in .*bad_batch_step_1.jsonl"):
        ppo_update.update(cfg, models, rollout, None, 0, progress, partial(check_finite, cfg, tmp_path, "ppo", tokenizer=tokenizer))
    assert progress.position == 0
    saved = [json.loads(line) for line in (tmp_path / "bad_batch_step_1.jsonl").read_text().splitlines()]
    assert len(saved) == 8 and saved[0]["response_ids"] == rollout.responses[saved[0]["row"], : rollout.lengths[saved[0]["row"]]].tolist()
    assert all(isinstance(row["prompt_text"], str) for row in saved)


def test_an_update_that_stops_in_the_middle_goes_on_alike(folder, alone, monkeypatch):
    """It stops after every optimizer step, and its progress travels as JSON."""
    cfg, models, rollout = ppo_models(folder, alone, ppo_epochs=2, early_stop_kl=None)
    expected = updated(cfg, models, rollout, 0), update.weights(models.actor), update.weights(models.critic)
    cfg, models, rollout = ppo_models(folder, alone, ppo_epochs=2, early_stop_kl=None)
    monkeypatch.setattr(ppo_update.stop, "asked", lambda: "stopped")
    progress, stops = ppo_update.Progress(), 0
    while ppo_update.update(cfg, models, rollout, None, 0, progress, guard=lambda **_: None):
        progress, stops = ppo_update.Progress(**json.loads(json.dumps(asdict(progress)))), stops + 1
    assert stops == 3
    assert progress.metrics() == expected[0]
    assert torch.equal(update.weights(models.actor), expected[1]) and torch.equal(update.weights(models.critic), expected[2])


def test_a_step_that_fp16_skips_has_no_norm():
    ones = dict.fromkeys(("tokens", "value_loss", "value_clipfrac", "ratio_error", "real", "slots"), 1.0)
    ones |= dict.fromkeys(("approxkl", "clipfrac", "entropy", "policy_loss", "ratio", "ptx_tokens", "ptx_loss"), 1.0)
    progress = ppo_update.Progress()
    for norm in (2.0, float("inf"), 4.0):
        progress.add(ones, {"grad_norm/actor": float("inf"), "grad_norm/critic": norm})
    found = progress.metrics()
    assert found["grad_norm/critic"] == 3.0 and "grad_norm/actor" not in found and found["policy/updates"] == 3


def test_in_the_warmup_of_the_critic_the_actor_rests(folder, alone):
    cfg, models, rollout = ppo_models(folder, alone, critic_warmup=1)
    before = [update.weights(one) for one in (models.actor, models.critic)]
    found = updated(cfg, models, rollout, 0)
    after = [update.weights(one) for one in (models.actor, models.critic)]
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
    assert "grad_norm/actor" not in found and found["grad_norm/critic"] > 0
    updated(cfg, models, rollout, 1)
    assert not torch.equal(before[0], update.weights(models.actor))


# --- engines in this process ------------------------------------------------------------------------------------------


def test_set_learning_rate(alone):
    """Every group gets its share of its own peak."""
    model = Actor(add_lora(causal("llama"), Lora(dim=2, alpha=4, dropout=0, targets=[], train_rest=True)), "llama", 0)
    trained = trainable(model)
    for share in (0.5, 0.1):
        engine.set_learning_rate(trained, share)
        assert {g["peak_lr"]: g["lr"] for g in trained.optimizer.param_groups} == {0.1: 0.1 * share, 0.3: 0.3 * share}
    engine.set_learning_rate(trained, 0.0)
    before = bits(trained)
    train(trained, 1)
    assert all(torch.equal(before[n], after) for n, after in bits(trained).items())


@pytest.mark.parametrize(("zero", "offload"), [(0, False), (1, False), (2, False), (3, False), (2, True), (3, True)])
def test_step_returns_the_norm_of_the_whole_gradient_before_clipping(zero, offload, alone):
    """Stage 0 in fp32 keeps none of its own. One engine takes steps of many and of few micro batches in turn."""
    made = rows([7, 9])
    ids, mask = pad(made, PAD)
    where = predictions(made, ids.size(1), False)

    def loss(model):
        return sft_loss(model(ids, mask, *where)[0], torch.ones(len(where[0])))

    model = actor("gpt_neox")
    (loss(model) / 5).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert expected > 1.5  # above the clip
    trained = trainable(actor("gpt_neox"), zero, offload=offload)
    engine.set_learning_rate(trained, 0.0)
    for count in (4, 1, 3, 1, 4):  # as many as the engine was told at most, and fewer
        for n in range(count):
            engine.backward(trained, loss(trained), count * 5, last=n == count - 1)
        assert engine.step(trained) == pytest.approx(expected, rel=1e-5)


def test_the_first_norm_in_half_precision_is_as_exact_as_the_others(alone):
    """A resumed run logs the norm that an undisturbed one does: not one that is summed in bf16 where DeepSpeed has none yet."""
    made = rows([7, 9])
    ids, mask = pad(made, PAD)
    trained, norms = trainable(actor("opt").bfloat16(), precision="bf16"), []
    engine.set_learning_rate(trained, 0.0)
    for _ in range(2):
        logprobs, _ = trained(ids, mask, *predictions(made, ids.size(1), False))
        engine.backward(trained, sft_loss(logprobs, torch.ones_like(logprobs)), 5, last=True)
        norms.append(engine.step(trained))
    assert norms[0] == norms[1]
    assert norms[0] != float(torch.tensor(norms[0]).bfloat16())


@pytest.mark.parametrize("stage", [0, 3])
def test_what_deepspeed_refuses_is_named_by_our_key(stage, alone, tokenizer, tmp_path):
    """Wherever it looks at its settings first: with ZeRO-3 before there is a model."""
    causal("opt").save_pretrained(tmp_path)
    ds_config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage, "reduce_bucket_size": "lots"}}
    options = {"dtype": torch.float32, "attention": "auto", "dropout": 0.0, "seed": 5}
    with pytest.raises(UserError, match=r"hardware.deepspeed.zero_optimization.reduce_bucket_size=lots is refused by DeepSpeed: .*int"):
        with engine.building(ds_config):
            model = Actor(load_causal(str(tmp_path), tokenizer, **options), "opt", 0)
        engine.trainable(model, ds_config, lr=0.1, lora_lr=0.1, weight_decay=0.0, betas=(0.9, 0.9), eps=1e-8)


def test_a_frozen_model_is_read_only(alone):
    model = engine.frozen(actor("opt"), {}, alone)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_zero3_builds_the_checkpoint_and_its_frozen_model_reads_alike(name, alone, tokenizer, tmp_path):
    """Loading under ZeRO-3, with an embedding that must grow, and a forward pass of a partitioned model."""
    causal(name).save_pretrained(tmp_path)
    options = {"dtype": torch.float32, "attention": "auto", "dropout": 0.0, "seed": 5}
    ds_config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    made, found = rows([7, 4]), []
    ids, mask = pad(made, PAD)
    for part in ({}, ds_config):
        with engine.building(part):
            model = Actor(load_causal(str(tmp_path), tokenizer, **options), family(name), 0)
            head = Scalar(load_scalar(str(tmp_path), tokenizer, fresh_head=True, **options), family(name))
        states = [full_state_dict(m, torch.float32) for m in (model, head)]
        model, head = (engine.frozen(m, part, alone) for m in (model, head))
        with torch.no_grad():
            found.append((states, model(ids, mask, *predictions(made, ids.size(1), False))[0], head(ids, mask)))
    assert any(hasattr(p, "ds_id") for p in model.parameters())
    (plain, logprobs, values), (partitioned, *outputs) = found
    for a, b in zip(plain, partitioned, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    torch.testing.assert_close(outputs, [logprobs, values], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zero", [0, 3])
def test_lora_under_deepspeed_trains_adapters_only_and_exports_the_merged_model(zero, alone, tmp_path):
    config("llama").save_pretrained(tmp_path)
    ds_config = engine_configs(update.configuration(1, zero), "sft")["actor"]
    causal("llama").save_pretrained(tmp_path)
    tokenizer_like = type("Tokens", (), {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 1, "__len__": lambda self: 96})()
    with engine.building(ds_config):
        model = load_causal(str(tmp_path), tokenizer_like, dtype=torch.float32, attention="auto", dropout=0.0, seed=5)
    model = Actor(add_lora(model, Lora(dim=2, alpha=4, dropout=0, targets=["q_proj", "v_proj"], train_rest=False)), "llama", 0)
    trained = trainable(model, zero)
    before = bits(trained)
    train(trained, 2)
    after = bits(trained)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {f"model.layers.{i}.self_attn.{m}_proj.weight" for i in (0, 1) for m in "qv"}
    # What is exported is what the engine computes
    plain = causal("llama")
    plain.load_state_dict(after)
    made = rows([7, 4])
    ids, mask = pad(made, PAD)
    where = predictions(made, ids.size(1), False)
    trained.eval()
    with torch.no_grad():
        torch.testing.assert_close(trained(ids, mask, *where)[0], Actor(plain, "llama", 0)(ids, mask, *where)[0], rtol=1e-4, atol=1e-4)


# --- averaged weights -------------------------------------------------------------------------------------------------


def test_the_average_moves_where_bf16_would_not():
    """From 1 towards the next number of bf16, 1 + 1/128, with decay 0.992: 0.008 of it is 1/16000, which bf16 rounds away."""
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    model.weight.data.fill_(1.0)
    ema = Ema(model, 0.992)
    model.weight.data.fill_(1.0078125)
    ema.update()
    assert ema.shadow[0].item() == pytest.approx(1 + 0.008 * 0.0078125, abs=1e-7)
    assert torch.tensor(1.0, dtype=torch.bfloat16).lerp(model.weight.data, 0.008).item() == 1.0
    for _ in range(199):
        ema.update()
    assert ema.shadow[0].item() == pytest.approx(1.0078125 - 0.0078125 * 0.992**200, abs=1e-5)
    with ema.swapped_in():
        assert model.weight.item() == 1.0078125  # 1.00625 in bf16
    assert ema.shadow[0].dtype == torch.float32


def test_swapping_in_restores_every_bit_also_after_an_error():
    model = actor("llama").bfloat16()
    model.hf.model.embed_tokens.requires_grad_(False)
    ema = Ema(model, 0.5)
    own = {n: p.clone() for n, p in model.named_parameters()}
    ema.shadow = [s + 0.25 for s in ema.shadow]
    with pytest.raises(KeyError), ema.swapped_in():
        inside = {n: p.clone() for n, p in model.named_parameters()}
        raise KeyError
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, own[name])
        moved = 0.0 if "embed_tokens" in name else 0.25  # what does not train is not averaged
        torch.testing.assert_close(inside[name].float(), own[name].float() + moved, rtol=1e-2, atol=1e-2)


def test_the_exported_model_of_a_stage_is_its_engines(folder, on_one_rank):
    """The file that SFT leaves behind, tied matrix once, holds the whole model."""
    on_one_rank(0)
    state = load_file(folder / "sft-1x0" / "model" / "model.safetensors")
    assert "lm_head.weight" not in state and state["model.decoder.embed_tokens.weight"].shape == (320, 32)


@pytest.mark.parametrize("stage, offload", overflow.KINDS)
def test_an_overflow_of_one_engine_stops_both(stage, offload, alone, monkeypatch):
    """A CPU multiplies in fp16, though slowly, and DeepSpeed would have none of it. On GPUs: tests/test_gpu.py."""
    monkeypatch.setattr(CPU_Accelerator, "is_fp16_supported", lambda self: True)
    overflow.check(stage, offload, alone)
