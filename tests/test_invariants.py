"""Invariants: each holds where it should and breaks where it should, by hand-made numbers and on a real iteration of PPO."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import EOS, NAMES, PAD, actor, causal, configured, generate, predictions, record, rows
from trained import train, trainable
from workers import update

from runner import plan
from runner.config.schema import Lora
from runner.data.batches import pad
from runner.engine import parameter_groups
from runner.errors import UserError
from runner.losses import sft_loss
from runner.metrics import RunLog
from runner.models.lora import add_lora
from runner.models.wrappers import Actor
from runner.rollout import collect, graph
from runner.rollout.collect import response_logprobs
from runner.rollout.families import network_of
from runner.rollout.sampling import invert
from runner.stages import invariants, ppo

PROMPTS = rows([5, 2, 9, 6, 3, 7])
every_family = pytest.mark.parametrize("name", NAMES)
every_sampling = pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_k": 12, "top_p": 0.9}], ids=["plain", "warped"])


# --- what a broken one does -------------------------------------------------------------------------------------------


def new_log(folder: Path, mode: str, device: torch.device) -> RunLog:
    folder.mkdir(exist_ok=True)
    return RunLog(replace(configured("wandb.mode=disabled"), invariants=mode), "ppo", folder, {}, device)


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_broken_invariant_stops_with_its_name_and_a_whole_one_does_not(tmp_path, alone):
    log = new_log(tmp_path, "stop", alone)
    invariants.check(log, "iteration 3", {"first": None, "second": None})
    with pytest.raises(UserError, match=r"invariant second is broken in iteration 3: off by 2.*invariants=warn"):
        invariants.check(log, "iteration 3", {"first": None, "second": "off by 2", "third": "off by 3"})


def test_warnings_are_said_once_per_name_and_counted_per_step(tmp_path, alone, capsys):
    log = new_log(tmp_path, "warn", alone)
    for step in (1, 2, 3):
        for _ in range(step % 3):  # once, twice, never
            invariants.check(log, f"iteration {step}", {"second": "off by 2"})
        log.log(step, {"x": 0.5})
    said = [line for line in capsys.readouterr().out.splitlines() if "invariant" in line]
    assert len(said) == 1 and "invariant second is broken in iteration 1: off by 2" in said[0]
    assert [row.get("invariants/second") for row in logged(tmp_path)] == [1, 2, None]


def test_the_key_has_two_values_and_is_in_no_steps_key(cfg):
    with pytest.raises(UserError, match="invariants=never is not one of stop, warn"):
        configured("invariants=never")
    assert cfg.invariants == "stop"
    assert [step.key for step in plan.plan(configured("invariants=warn"))] == [step.key for step in plan.plan(cfg)]


# --- EOS and PAD ------------------------------------------------------------------------------------------------------


def whole_record():
    """Ended in the middle, at the first token and at the limit of 4; cut off; and a PAD and an EOS that stand where they may."""
    return record([[5, 6], [EOS, 7, 9], [8], [9], [4, PAD, 4]], [[10, EOS], [EOS], [10, 11, 12, EOS], [10, 11, 12, 13], [PAD, EOS]])


def put(table: str, row: int, column: int, value: int):
    def corrupt(rollout):
        getattr(rollout, table)[row, column] = value

    return corrupt


def put_row(vector: str, row: int, value):
    def corrupt(rollout):
        getattr(rollout, vector)[row] = value

    return corrupt


def test_eos_and_pad_of_a_whole_rollout_agree():
    rollout = whole_record()
    assert invariants.eos_and_pad(rollout, PAD, EOS, 4) is None
    assert invariants.eos_and_pad(rollout.rows(torch.tensor([0, 1])), PAD, EOS, 4) is None
    # A tokenizer whose BOS is PAD
    assert invariants.eos_and_pad(record([[PAD, 6], [PAD, 7, 9]], [[EOS], [EOS]]), PAD, EOS, 4) is None


@pytest.mark.parametrize(
    ("corrupt", "fault"),
    [
        (put("responses", 0, 1, 11), "ended, but their last token is not EOS"),
        (put("responses", 2, 1, EOS), "ended, but contain more than one EOS"),
        (put("responses", 3, 2, EOS), "did not end, but contain an EOS"),
        (put_row("ended", 0, False), "did not end, but contain an EOS"),
        (put_row("ended", 3, True), "ended, but their last token is not EOS"),
        (put_row("lengths", 0, 3), "ended, but their last token is not EOS"),
        (put_row("lengths", 3, 3), "did not end, but are shorter than the limit of 4"),
        (put_row("lengths", 1, 0), "are not 1 to 4 tokens long"),
        (put("sampled_logprobs", 4, 0, 0), "contain a PAD that was never sampled"),
        (put("responses", 0, 3, 11), "have something other than PAD after their end"),
        (put("prompts", 2, 0, 7), "have a prompt with something other than PAD to its left"),
        (put_row("prompt_lengths", 2, 2), "have a prompt shorter than its length says"),
        (put_row("prompt_lengths", 1, 2), "have a prompt with something other than PAD to its left"),
        (put_row("prompt_lengths", 0, 4), "have a prompt without tokens, or one longer than the row"),
    ],
)
def test_any_disagreement_of_eos_pad_and_lengths_is_named(corrupt, fault):
    rollout = whole_record()
    corrupt(rollout)
    assert f"1 of 5 responses {fault}" in invariants.eos_and_pad(rollout, PAD, EOS, 4)


def test_a_response_longer_than_the_limit_is_named():
    assert "1 of 5 responses are not 1 to 3 tokens long (the first is number 2, of length 4)" in invariants.eos_and_pad(
        whole_record().rows(torch.tensor([0, 1, 2, 0, 1])), PAD, EOS, 3
    )


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(invariants.SUSPECTS))
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_single_nan_or_infinity_is_found_on_padding_too(name, bad):
    rollout = whole_record()
    for other in invariants.SUSPECTS:
        setattr(rollout, other, torch.zeros(5) if other == "scores" else torch.zeros(5, 4))
    assert invariants.finite_rollout(rollout, "") is None
    getattr(rollout, name).view(5, -1)[1, -1] = bad
    assert invariants.finite_rollout(rollout, "").startswith(f"{name} of 1 of 5 responses")


def test_what_is_not_computed_yet_is_no_fault():
    assert invariants.finite_rollout(whole_record(), "") is None


def test_the_advice_names_the_rate_that_trains():
    """Of a run of adapters theirs, not ppo.actor_lr, which has no effect."""
    rollout = whole_record()
    rollout.logprobs = torch.full((5, 4), math.nan)
    adapters = configured("model.actor.lora.dim=4", "ppo.actor_lora_lr=1e-3")
    settings = collect.RolloutSettings(PAD, EOS, 4, 8, 8, torch.device("cpu"))
    rollout.sampled_logprobs = rollout.ref_logprobs = rollout.mismatch = torch.zeros(5, 4)
    rollout.recomputed = torch.ones(5, dtype=torch.bool)
    rollout.scores = torch.arange(5.0)
    found = invariants.of_rollout(adapters, settings, rollout)["finite_rollout"]
    assert "the actor has diverged: lower the learning rate (ppo.actor_lora_lr=0.0001 ppo.critic_lr=" in found


def test_scores_must_differ_where_eight_responses_do():
    eight = torch.arange(16).view(8, 2)
    assert invariants.scores_not_constant(torch.linspace(0, 1, 8), eight) is None
    assert invariants.scores_not_constant(1e-4 * torch.linspace(0, 1, 8), eight) is None  # small, but told apart
    assert "8 different responses the same score, 0.25" in invariants.scores_not_constant(torch.full((8,), 0.25), eight)
    assert invariants.scores_not_constant(torch.zeros(8), eight)
    rounded = 3.0 + 2e-7 * torch.arange(8)  # the last digit of fp32
    assert rounded.std() > 0 and invariants.scores_not_constant(rounded, eight)
    # Seven kinds of responses: an actor that says little is not the reward model's fault
    assert invariants.scores_not_constant(torch.zeros(9), eight[[0, 1, 2, 3, 4, 5, 6, 6, 6]]) is None
    assert invariants.scores_not_constant(torch.zeros(1), eight[:1]) is None


def test_advantages_must_not_vanish():
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    some = torch.tensor([[1.0, -0.5, 0.0], [-0.5, 0.0, 0.0]])
    assert invariants.advantages_not_zero(some, mask, whitened=True) is None
    assert invariants.advantages_not_zero(1e-3 * some, mask, whitened=False) is None
    assert invariants.advantages_not_zero(0 * some, mask, whitened=False)
    assert invariants.advantages_not_zero(1e-3 * some, mask, whitened=True)  # rounding noise, made larger by whitening
    assert invariants.advantages_not_zero(100 * (1 - mask), mask, whitened=False)  # padding does not count
    assert invariants.advantages_not_zero(torch.zeros(1, 1), torch.ones(1, 1), whitened=True) is None  # one token has no spread


def test_the_first_ratio_is_1():
    assert invariants.first_ratio(5e-4, "fp32") is None and invariants.first_ratio(0.05, "bf16") is None
    assert "off by 0.05 on average (bound 0.001 in fp32)" in invariants.first_ratio(0.05, "fp32")
    assert invariants.first_ratio(0.2, "bf16") and invariants.first_ratio(math.nan, "fp32")


# --- KL ---------------------------------------------------------------------------------------------------------------


def drawn(seed: int, responses: int, tokens: int, spread: float, sharper: float = 1.0, top_k: int = 0):
    """Tokens from random P, or secretly from its top k: their log-probabilities under P and under a Q near it. (B, R) each."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(responses * tokens, 12, generator=generator)
    q = sharper * p + spread * torch.randn(p.shape, generator=generator)
    secret = p.masked_fill(p < p.topk(top_k).values[:, -1:], -torch.inf) if top_k else p
    token = invert(secret, torch.rand(len(p), generator=generator, dtype=torch.float64)).unsqueeze(1)
    return [logits.log_softmax(-1).gather(1, token).view(responses, tokens) for logits in (p, q)]


def kl_fault(pair, precision="fp32", top_p=1.0):
    return invariants.kl_not_negative(*pair, torch.ones_like(pair[0]), precision, top_p)


@pytest.mark.parametrize(("responses", "tokens", "spread"), [(1, 1, 3.0), (2, 50, 0.1), (8, 8, 0.3), (64, 200, 0.02)])
def test_a_true_kl_passes_for_any_batch(responses, tokens, spread):
    kls = []
    for seed in range(50):
        pair = drawn(seed, responses, tokens, spread)
        assert kl_fault(pair) is None
        kls.append((pair[0] - pair[1]).sum().item())
    assert min(kls) < 0  # chance did go below zero


def test_the_first_iteration_passes_where_the_actor_is_the_reference():
    same = drawn(0, 64, 200, 1.0)[0]
    assert kl_fault((same, same)) is None
    assert kl_fault((same, same + 1e-6)) is None


def test_a_sampler_that_truncates_in_secret_makes_the_kl_negative():
    """The actor spreads its probabilities more than the reference, and what it says less often is never drawn."""
    assert kl_fault(drawn(0, 64, 50, 0.0, sharper=1.5)) is None
    assert "chance explains nothing below -0.47" in kl_fault(drawn(0, 64, 50, 0.0, sharper=1.5, top_k=3))


def test_the_padding_has_no_kl():
    sampled, ref, mask = torch.full((64, 50), -9.0), torch.full((64, 50), -1.0), torch.zeros(64, 50)
    mask[:, 0], sampled[:, 0] = 1, -1.0
    assert invariants.kl_not_negative(sampled, ref, mask, "fp32", 1.0) is None


def test_a_nucleus_that_the_sampled_token_widens_is_allowed_for():
    pair = torch.full((64, 50), -1.05), torch.full((64, 50), -1.0)
    assert kl_fault(pair, top_p=0.9) is None  # log(0.9) is -0.105 per token
    assert kl_fault(pair, top_p=0.99)


# --- what sampled is what is trained ----------------------------------------------------------------------------------


@every_family
@every_sampling
def test_sampling_sees_the_log_probabilities_that_scoring_reads(name, sampling):
    model = actor(name, **sampling)
    rollout = generate(model, PROMPTS, list(range(6)))
    with torch.no_grad():
        scored = response_logprobs(model, rollout)[0]
    assert rollout.sampled_logprobs.dtype == torch.float32 and rollout.sampled_logprobs[rollout.mask.bool()].lt(0).any()
    torch.testing.assert_close(rollout.sampled_logprobs, scored, rtol=1e-5, atol=1e-5)  # 0 on padding in both
    assert invariants.rollout_weights((rollout.sampled_logprobs - scored).abs(), rollout.mask, "fp32") is None


@every_family
@pytest.mark.parametrize("other", [{"seed": 1}, {"temperature": 1.1}, {"top_k": 12}], ids=["weights", "temperature", "top_k"])
def test_a_rollout_of_another_actor_is_noticed(name, other):
    rollout = generate(actor(name), PROMPTS, list(range(6)))
    with torch.no_grad():
        scored = response_logprobs(actor(name, **other), rollout)[0]
    assert "bound 0.001 in fp32" in invariants.rollout_weights((rollout.sampled_logprobs - scored).abs(), rollout.mask, "fp32")
    if "seed" in other:
        assert invariants.rollout_weights((rollout.sampled_logprobs - scored).abs(), rollout.mask, "bf16")


@every_family
def test_half_precision_stays_within_its_bound(name):
    model = actor(name).to(torch.bfloat16)
    rollout = generate(model, PROMPTS, list(range(6)))
    with torch.no_grad():
        scored = response_logprobs(model, rollout)[0]
    assert invariants.rollout_weights((rollout.sampled_logprobs - scored).abs(), rollout.mask, "bf16") is None


# --- the weights ------------------------------------------------------------------------------------------------------


def prints(*pieces: tuple[str, int, torch.Tensor]) -> dict:
    return invariants.fingerprint(pieces)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fingerprint_sees_one_digit_of_one_element_and_a_change_of_order(dtype, monkeypatch):
    monkeypatch.setattr(invariants, "CHUNK", 100)  # several chunks, the last one not full
    x = torch.randn(25, 41, generator=torch.Generator().manual_seed(0)).to(dtype)
    one = prints(("x", 0, x))
    assert one == prints(("x", 0, x.clone()))
    for place in (0, 513, 1024):
        y = x.clone().flatten()
        y[place] = torch.nextafter(y[place], torch.tensor(9.0, dtype=dtype)) if dtype == torch.float32 else y[place] * 1.01
        assert prints(("x", 0, y)) != one
    assert prints(("x", 0, x.flatten().flip(0))) != one
    assert len(one["x", 0]) == 18 and len(prints(("x", 0, x[:1, :3]))["x", 0]) == 5


def test_a_parameter_has_moved_when_any_piece_of_it_has(alone):
    """Rows of an embedding that no batch reaches stay; a fused or split tensor counts as one."""
    table = torch.zeros(10, 2)
    before = prints(("table", 0, table[:5]), ("table", 10, table[5:]), ("base", 0, torch.ones(3)))
    table[7] += 1e-9
    after = prints(("table", 0, table[:5]), ("table", 10, table[5:]), ("base", 0, torch.ones(3)))
    moved = invariants.changes(before, after)
    assert invariants.of_weights(moved, {"table"}) == {"parameters_moved": None, "frozen_unchanged": None}
    found = invariants.of_weights(moved, {"base"})
    assert found["parameters_moved"].startswith("1 of 1 (base) trainable parameters never moved")
    assert found["frozen_unchanged"].startswith("1 of 1 (table) frozen parameters moved")


def test_a_parameter_of_which_no_rank_holds_a_piece_has_not_moved():
    assert "1 of 2 (b)" in invariants.parameters_moved({"a": True}, {"a", "b"})


def adamw_steps(model, count: int, lr: float = 1e-6) -> list[dict]:
    """Fingerprints before and after each step of AdamW on a few rows."""
    made = rows([9, 7, 12, 5])
    ids, mask = pad(made, PAD)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr, lr, 0.0), lr=lr, eps=1e-5)
    found = [invariants.fingerprint(invariants.local_pieces(model))]
    for _ in range(count):
        optimizer.zero_grad()
        logprobs = model(ids, mask, *predictions(made, ids.size(1), False))[0]
        (sft_loss(logprobs, torch.ones_like(logprobs)) / len(logprobs)).backward()
        optimizer.step()
        found.append(invariants.fingerprint(invariants.local_pieces(model)))
    return found


@every_family
def test_every_parameter_of_every_family_moves(name, alone):
    """At the learning rate of a large model. OPT's key biases need not: softmax cancels them."""
    model = actor(name)
    before, after = adamw_steps(model, 1)
    everything = {n for n, _ in model.named_parameters()}
    assert invariants.of_weights(invariants.changes(before, after), everything) == {"parameters_moved": None, "frozen_unchanged": None}
    assert "never moved" in invariants.parameters_moved(invariants.changes(before, before), everything, invariants.module_of)


def test_the_first_matrix_of_an_adapter_moves_from_the_second_step_on(alone):
    lora = Lora(dim=2, alpha=4, dropout=0.0, targets=[], train_rest=False)
    model = Actor(add_lora(causal("llama"), lora), "llama", 0)
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    start, first, second = adamw_steps(model, 2, lr=1e-3)
    after_one = invariants.changes(start, first)
    still = invariants.parameters_moved(after_one, learning)
    assert f"{len(learning) // 2} of {len(learning)}" in still and "lora_A" in still
    assert invariants.parameters_moved(after_one, learning, invariants.module_of) is None
    assert invariants.of_weights(invariants.changes(start, second), learning) == {"parameters_moved": None, "frozen_unchanged": None}
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n not in learning)[3, 1] *= 1.001
    end = invariants.fingerprint(invariants.local_pieces(model))
    stray = invariants.frozen_unchanged(invariants.changes(start, end), learning)
    assert "embed_tokens.weight" in stray


# --- a whole run of PPO -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    """Models and 16 prompts; some held out."""
    made = tmp_path_factory.mktemp("invariants")
    update.prepare(made, tokenizer)
    return made


def iterate(folder: Path, work: Path, mode: str, device: torch.device) -> list[dict]:
    """Two iterations of PPO with 8 responses each, one of them critic's alone. Returns the rows of metrics.jsonl."""
    cfg = update.configuration(1, 0)
    small = {"rollout_batch": 8, "minibatches": 1, "max_steps": 2, "eval_prompts": 8, "eval_every": 0, "ptx_coef": 0.0}
    small |= {"kl_target": 0.1, "kl_horizon": 20}
    cfg = replace(cfg, invariants=mode, ppo=replace(cfg.ppo, eps=1e-5, actor_lr=1e-3, critic_lr=1e-3, critic_warmup=1, **small))
    work.mkdir(exist_ok=True)
    ppo.train(cfg, update.inputs(folder, "ppo", work), RunLog(cfg, "ppo", work, {}, device), device)
    return logged(work)


def test_a_healthy_run_breaks_none_and_logs_the_mismatch(folder, tmp_path, alone):
    found = [row for row in iterate(folder, tmp_path, "stop", alone) if "objective/kl" in row]
    assert len(found) == 2
    for row in found:
        assert 0 < row["rollout/logprob_mismatch"] <= row["rollout/logprob_mismatch_max"] < 1e-5
        assert not any(name.startswith("invariants/") for name in row)
    # The controller waits for the actor to be trained
    assert found[0]["objective/kl_coef"] == found[1]["objective/kl_coef"]


def a_constant_reward_model(monkeypatch):
    monkeypatch.setattr(collect, "final_scores", lambda reward, part: torch.full((len(part),), 0.25))


def an_engine_that_counts_one_pad(monkeypatch):
    """Lengths are one too long."""

    def run(decoder, real=graph.Decoder.run):
        rollout = real(decoder)
        rollout.lengths = torch.where(rollout.ended, rollout.lengths + 1, rollout.lengths).clamp(max=rollout.responses.size(1))
        return rollout

    monkeypatch.setattr(graph.Decoder, "run", run)


def an_engine_that_loses_tokens(monkeypatch):
    """A PAD in the middle of each response."""

    def run(decoder, real=graph.Decoder.run):
        rollout = real(decoder)
        rollout.responses[:, 1:2], rollout.sampled_logprobs[:, 1:2] = PAD, 0.0
        return rollout

    monkeypatch.setattr(graph.Decoder, "run", run)


def an_engine_with_old_weights(monkeypatch):
    old = network_of(actor("opt", seed=5).hf)
    monkeypatch.setattr(collect, "network_of", lambda hf: old)


def old_log_probabilities(monkeypatch):
    def changed(cfg, models, rollout, *rest, real=ppo.update):
        rollout.logprobs = rollout.logprobs + 0.01
        return real(cfg, models, rollout, *rest)

    monkeypatch.setattr(ppo, "update", changed)


def a_critic_that_diverged(monkeypatch):
    monkeypatch.setattr(collect, "response_values", lambda critic, part: torch.full_like(part.mask, torch.nan))


@pytest.mark.parametrize(
    ("name", "corrupt"),
    [
        ("scores_not_constant", a_constant_reward_model),
        ("eos_and_pad", an_engine_that_counts_one_pad),
        ("eos_and_pad", an_engine_that_loses_tokens),
        ("rollout_weights", an_engine_with_old_weights),
        ("finite_rollout", a_critic_that_diverged),
        ("first_ratio", old_log_probabilities),
    ],
)
def test_a_corrupted_run_stops_by_name(name, corrupt, folder, tmp_path, alone, monkeypatch):
    corrupt(monkeypatch)
    with pytest.raises(UserError, match=f"invariant {name} is broken in"):
        iterate(folder, tmp_path, "stop", alone)
    assert not (tmp_path / "checkpoints").exists()


def test_with_warn_a_corrupted_run_goes_on(folder, tmp_path, alone, monkeypatch, capsys):
    a_constant_reward_model(monkeypatch)
    found = iterate(folder, tmp_path, "warn", alone)
    assert capsys.readouterr().out.count("invariant scores_not_constant is broken") == 1
    # At the start, in both iterations, and at the end
    assert [row.get("invariants/scores_not_constant") for row in found] == [1, 1, 1, 1]
    assert (tmp_path / "result.json").exists() and (tmp_path / "model").exists()


# --- the weights of real engines --------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero, adapters", [(0, False), (2, False), (3, False), (0, True), (3, True)])
def test_weights_are_watched_through_the_engines(zero, adapters, alone, tmp_path):
    """A run in which all is well passes; a frozen parameter that is written to is named."""
    lora = Lora(dim=2, alpha=4, dropout=0.0, targets=[], train_rest=False)
    model = add_lora(causal("llama"), lora) if adapters else causal("llama")
    trained = trainable(Actor(model, "llama", 0), zero, lr=0.1)
    reward = causal("opt")
    log = new_log(tmp_path, "stop", alone)
    watch = invariants.WeightWatch(log, {"actor": trained}, {"reward": reward}, not_before=2)
    train(trained, 1)
    watch(1)  # too early
    train(trained, 1)
    watch(2)
    watch(3)  # once

    watch = invariants.WeightWatch(log, {"actor": trained}, {"reward": reward}, not_before=2)
    train(trained, 2)
    reward.lm_head.weight.data[0, 0] += 1
    with pytest.raises(UserError, match=r"frozen_unchanged is broken in reward at step 2: 1 of .* \(model.decoder.embed_tokens.weight\)"):
        watch(2)


@pytest.mark.parametrize(
    ("parameter", "module"),
    [
        ("model.lm_head.weight", "model.lm_head"),
        ("model.layers.1.q_proj.bias", "model.layers.1.q_proj"),
        ("model.base_model.model.model.layers.1.q_proj.lora_A.default.weight", "model.base_model.model.model.layers.1.q_proj"),
        ("model.base_model.model.model.layers.1.q_proj.base_layer.bias", "model.base_model.model.model.layers.1.q_proj"),
        ("model.base_model.model.score.modules_to_save.default.weight", "model.base_model.model.score.modules_to_save.default"),
    ],
)
def test_the_matrices_of_an_adapter_belong_to_the_layer_that_it_adapts(parameter, module):
    assert invariants.module_of(parameter) == module


def test_half_an_adapter_without_gradient_is_named_only_when_it_is_no_accident(alone, tmp_path):
    """As in fp16, where the gradient of A may be zero in the second step too; a run of two steps must not stop for it."""
    lora = Lora(dim=2, alpha=4, dropout=0.0, targets=[], train_rest=False)
    trained = trainable(Actor(add_lora(causal("llama"), lora), "llama", 0), 0, lr=1e-3, weight_decay=0.0)
    watch = invariants.WeightWatch(new_log(tmp_path, "stop", alone), {"actor": trained}, {}, not_before=0)
    dead = next(p for n, p in trained.module.named_parameters() if "layers.1.self_attn.k_proj.lora_A" in n)
    dead.register_hook(torch.zeros_like)
    for step in range(1, invariants.SURE):
        train(trained, 1)
        watch(step)
    train(trained, 1)
    with pytest.raises(UserError, match=r"parameters_moved is broken in actor at step 20: 1 of .* \(.*layers.1.self_attn.k_proj.lora_A"):
        watch(invariants.SURE)


def test_an_adapter_without_any_gradient_is_named_at_once(alone, tmp_path):
    lora = Lora(dim=2, alpha=4, dropout=0.0, targets=[], train_rest=False)
    trained = trainable(Actor(add_lora(causal("llama"), lora), "llama", 0), 0, lr=1e-3, weight_decay=0.0)
    watch = invariants.WeightWatch(new_log(tmp_path, "stop", alone), {"actor": trained}, {}, not_before=0)
    for name, parameter in trained.module.named_parameters():
        if "layers.1.self_attn.k_proj.lora" in name:
            parameter.register_hook(torch.zeros_like)
    train(trained, 2)
    with pytest.raises(UserError, match=r"parameters_moved is broken in actor at step 2: 2 of .*k_proj.lora_A.*k_proj.lora_B"):
        watch(2)


def test_a_trainable_parameter_that_stands_still_is_named(alone, tmp_path):
    trained = trainable(actor("llama"), 0, lr=0.1, weight_decay=0.0)
    watch = invariants.WeightWatch(new_log(tmp_path, "stop", alone), {"actor": trained}, {}, not_before=0)
    dead = trained.module.hf.model.layers[0].mlp.up_proj.weight
    dead.register_hook(torch.zeros_like)
    train(trained, 2)
    with pytest.raises(UserError, match=r"parameters_moved is broken in actor at step 2: 1 of .* \(.*layers.0.mlp.up_proj.weight\)"):
        watch(2)


def test_what_has_no_learning_rate_is_not_watched(alone, tmp_path):
    trained = trainable(actor("llama"), 0, lr=0.0)
    watch = invariants.WeightWatch(new_log(tmp_path, "stop", alone), {"actor": trained}, {}, not_before=0)
    train(trained, 2)
    watch(2)
