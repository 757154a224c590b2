"""Responses: what is sampled, how reproducible it is, and that scoring reads what was sampled. Every family, fp32, on the CPU."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tiny import EOS, NAMES, PAD, actor, generate, record, rows, scalar
from workers import gather

from runner.data.batches import pad
from runner.rollout.collect import Models, RolloutSettings, final_scores, join, response_logprobs, response_values, sample, score
from runner.rollout.record import Rollout
from runner.rollout.sampling import invert, uniforms
from runner.stages.heldout import paired, prompt_of
from runner.stages.ppo import State, fill_rewards

every_family = pytest.mark.parametrize("name", NAMES)
# Scoring asks all ranks whether sampler and trainer agree
pytestmark = pytest.mark.usefixtures("alone")

PROMPTS = rows([5, 2, 9, 6, 3, 7])
PROMPTS[0][2] = PROMPTS[3][5] = EOS  # one inside a prompt, one at the end of a prompt
LENGTH = 10
# An id that no response ever gets: nothing ends
NEVER = 10_000


def responses(rollout: Rollout) -> list[list[int]]:
    return [ids[:n] for ids, n in zip(rollout.responses.tolist(), rollout.lengths.tolist(), strict=True)]


# --- random numbers ---------------------------------------------------------------------------------------------------


def test_uniforms_are_a_function_of_seed_episode_and_token():
    some = uniforms(7, [3, 0, 3, 10**6, 2**40], 5)
    assert some.dtype == torch.float64 and some.shape == (5, 5) and some.min() >= 0 and some.max() < 1
    assert torch.equal(some[0], some[2])
    assert torch.equal(some, uniforms(7, [3, 0, 3, 10**6, 2**40], 9)[:, :5])  # more tokens begin alike
    others = torch.cat([some[[0, 1, 3, 4]], uniforms(8, [3], 5)])
    assert others.unique().numel() == others.numel()


def test_uniforms_are_uniform_within_and_across_episodes():
    for sample_of in (uniforms(1, [5], 20_000)[0], uniforms(1, list(range(20_000)), 1)[:, 0]):
        counts = torch.histc(sample_of, 20, 0, 1)
        assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-square of 19 degrees: 0.1 % lie above


def test_invert_samples_from_softmax():
    logits = torch.tensor([1.0, -torch.inf, 0.0, 2.0, -1.0, 0.5, -2.0, -torch.inf])
    count = 40_000
    found = invert(logits.expand(count, -1), uniforms(1, list(range(count)), 1)[:, 0]).bincount(minlength=8)
    expected = count * logits.softmax(-1)
    real = expected > 0
    assert found[~real].eq(0).all()
    assert ((found - expected)[real] ** 2 / expected[real]).sum() < 20.5  # chi-square of 5 degrees: 0.1 % lie above


def test_invert_at_the_ends():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    point = torch.tensor([0.0, 0.25, 0.499999, 0.5, 0.999999999999, 1.0], dtype=torch.float64)
    # Half of the mass each: 0 belongs to the first token that has any, 1 to the last, although its sum rounds
    assert invert(logits.expand(6, -1), point).tolist() == [1, 1, 1, 2, 2, 2]


def test_invert_reaches_a_tail_token_of_a_large_vocabulary():
    """1e-9 of the mass behind 250k tokens is lost in fp32."""
    logits = torch.zeros(1, 250_001)
    logits[0, -1] = math.log(250_000 * 1e-9)
    assert invert(logits, torch.tensor([1 - 0.5e-9], dtype=torch.float64)).item() == 250_000
    assert invert(logits, torch.tensor([1 - 2e-9], dtype=torch.float64)).item() == 249_999


# --- generate ---------------------------------------------------------------------------------------------------------


@every_family
def test_almost_no_temperature_is_transformers_greedy_decoding(name):
    """On ragged, left-padded prompts; the greedy answers are made one by one, without padding."""
    found = generate(actor(name, temperature=1e-5), PROMPTS, list(range(6)))
    model = actor(name).hf
    for row, response in zip(PROMPTS, responses(found), strict=True):
        expected = model.generate(torch.tensor([row]), max_new_tokens=LENGTH, do_sample=False, pad_token_id=PAD, eos_token_id=EOS)
        assert response == expected[0, len(row) :].tolist()
    assert len({tuple(r) for r in responses(found)}) > 1


@every_family
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_k": 12, "top_p": 0.9}], ids=["plain", "warped"])
def test_logprobs_of_sampled_tokens_are_those_of_decoding_step_by_step(name, sampling):
    model = actor(name, **sampling)
    rollout = generate(model, PROMPTS, list(range(6)))
    with torch.no_grad():
        found = response_logprobs(model, rollout)[0]
    for i, (prompt, response) in enumerate(zip(PROMPTS, responses(rollout), strict=True)):
        cache, ids = None, torch.tensor([prompt])
        for t, token in enumerate(response):
            with torch.no_grad():
                out = model.hf(input_ids=ids, past_key_values=cache, use_cache=True)
            logits = out.logits[0, -1] / sampling.get("temperature", 1.0)
            if sampling:  # written once more, naively: the top-k, then of these the smallest set with 0.9 of the mass
                order = logits.argsort(descending=True)[:12]
                mass = logits[order].softmax(-1).cumsum(-1)
                kept = order[: int((mass < 0.9).sum()) + 1]
                assert token in kept
                logits = torch.full_like(logits, -torch.inf).scatter(0, kept, logits[kept])
            assert found[i, t] == pytest.approx(logits.log_softmax(-1)[token].item(), abs=1e-4)
            cache, ids = out.past_key_values, torch.tensor([[token]])
        assert found[i, len(response) :].eq(0).all()


@every_family
def test_a_response_depends_on_seed_and_episode_alone(name):
    """Not on its neighbours, their lengths, the padding, the place in the batch, or the size of the batch."""
    model, episodes = actor(name), [4, 9, 2, 7, 11, 3]
    whole = responses(generate(model, PROMPTS, episodes))
    assert len({tuple(r) for r in whole}) == 6
    order = [5, 0, 3, 2, 4, 1]
    shuffled = responses(generate(model, [PROMPTS[i] for i in order], [episodes[i] for i in order]))
    assert [shuffled[order.index(i)] for i in range(6)] == whole
    alone = [responses(generate(model, [p], [e]))[0] for p, e in zip(PROMPTS, episodes, strict=True)]
    assert alone == whole
    assert responses(generate(model, PROMPTS, [e + 1 for e in episodes])) != whole
    assert responses(generate(model, PROMPTS, episodes, seed=8)) != whole


def test_samples_follow_the_models_probabilities():
    """First tokens of many responses to one prompt against the softmax of the model's logits."""
    model, prompt, count = actor("llama"), PROMPTS[0], 4000
    found = generate(model, [prompt] * count, list(range(count)), length=1, eos=NEVER).responses[:, 0].bincount(minlength=96)
    with torch.no_grad():
        expected = count * model.hf(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    common = expected >= 5  # the rest go together
    found, expected = (torch.cat([x[common], x[~common].sum().reshape(1)]) for x in (found, expected))
    degrees = len(found) - 1
    assert degrees > 15
    assert ((found - expected) ** 2 / expected).sum() < degrees + 4 * (2 * degrees) ** 0.5


# --- EOS --------------------------------------------------------------------------------------------------------------


def scripted(scripts: list[list[int]]):
    """An actor whose responses are given: all probability is on the next token of each row's script."""
    model, steps = actor("opt"), iter(range(1000))

    def speak(head, inputs, logits):
        step = next(steps)
        wanted = torch.tensor([script[step] if step < len(script) else 50 for script in scripts])
        return torch.full_like(logits, -100.0).scatter(2, wanted[:, None, None].expand(-1, logits.size(1), 1), 100.0)

    model.hf.lm_head.register_forward_hook(speak)
    return model


def test_lengths_and_ended():
    """EOS counts in the response only: in the middle, first, last, never; what follows it is padding; PAD may be an action."""
    scripts = [[10, 11, EOS], [EOS], [20, 21, 22, 23, EOS], [30, 31, 32, 33, 34, 35], [PAD, 40, EOS], [50, EOS]]
    found = generate(scripted(scripts), PROMPTS, list(range(6)), length=5)
    assert found.lengths.tolist() == [3, 1, 5, 5, 3, 2]
    assert found.ended.tolist() == [True, True, True, False, True, True]
    assert found.responses.tolist() == [
        [10, 11, EOS, PAD, PAD],
        [EOS, PAD, PAD, PAD, PAD],
        [20, 21, 22, 23, EOS],
        [30, 31, 32, 33, 34],
        [PAD, 40, EOS, PAD, PAD],
        [50, EOS, PAD, PAD, PAD],
    ]
    assert found.mask.sum(1).tolist() == [3, 1, 5, 5, 3, 2]
    # The prompts, EOS in them included, are what was asked
    ids, mask = pad(PROMPTS, PAD, left=True)
    assert torch.equal(found.prompts, ids) and found.prompt_lengths.tolist() == [5, 2, 9, 6, 3, 7]
    assert torch.equal(found.sequences()[1], torch.cat([mask, found.mask.long()], dim=1))


def test_generation_stops_when_every_response_has_ended():
    found = generate(scripted([[10, EOS], [EOS]]), PROMPTS[:2], [0, 1], length=9)
    assert found.responses.tolist() == [[10, EOS], [EOS, PAD]]


@every_family
def test_masks_come_from_lengths_where_real_tokens_look_like_padding(name):
    """A PAD in prompt and response, an EOS in the prompt: the log-probabilities are those of the unpadded rows."""
    model = actor(name)
    prompts, answers = [[5, PAD, 7], [8, EOS, 9, 10, PAD]], [[PAD, 12, EOS], [13]]
    part = record(prompts, answers)
    with torch.no_grad():
        found = response_logprobs(model, part)[0]
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            logits = model.hf(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            expected = [logits[len(prompt) + t - 1, token].item() for t, token in enumerate(answer)]
            assert found[i].tolist() == pytest.approx(expected + [0.0] * (3 - len(answer)), abs=1e-5)


# --- the record -------------------------------------------------------------------------------------------------------


ANSWERS = [*rows([4, 1, 6, 3, 2], seed=1), [EOS]]
for answer in ANSWERS[:3]:
    answer[-1] = EOS


def scored(name: str) -> tuple[Rollout, Models]:
    rollout = record(PROMPTS, ANSWERS)
    models = Models(actor(name), scalar(name), actor(name, seed=1), scalar(name, seed=2))
    score(models, RolloutSettings(PAD, EOS, LENGTH, 2, 2, torch.device("cpu")), rollout, with_values=True)
    return rollout, models


@every_family
def test_score_equals_reading_each_row_alone(name):
    """Micro batches, trimming and padding change nothing. Values are read one position earlier, scores at EOS."""
    with torch.no_grad():
        rollout, models = scored(name)
        for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
            ids, n = torch.tensor([prompt + answer]), len(answer)
            mask, first = torch.ones_like(ids), len(prompt) - 1
            assert rollout.lengths[i] == n
            # The state before the first token is the prompt: its last token's position
            expected = models.critic(ids, mask)[0, first : first + n]
            torch.testing.assert_close(rollout.values[i, :n], expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(rollout.scores[i], models.reward(ids, mask)[0, -1], rtol=1e-5, atol=1e-5)
            for model, logprobs in ((models.actor, rollout.logprobs), (models.ref, rollout.ref_logprobs)):
                logits = model.hf(input_ids=ids).logits[0, first:-1].log_softmax(-1)
                expected = logits.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
                torch.testing.assert_close(logprobs[i, :n], expected, rtol=1e-5, atol=1e-5)
            for table in (rollout.values, rollout.logprobs, rollout.ref_logprobs):
                assert table[i, n:].eq(0).all()


def test_a_value_does_not_see_the_token_that_it_judges():
    critic = scalar("llama")
    with torch.no_grad():
        first, other = (response_values(critic, record([[5, 6, 7]], [[token, 9, EOS]])) for token in (20, 21))
    assert first[0, 0] == other[0, 0]
    assert (first - other)[0, 1:].abs().min() > 1e-3


def test_the_score_stands_at_eos_and_not_at_the_padding_behind_it():
    reward = scalar("llama")
    with torch.no_grad():
        alone = final_scores(reward, record([[5, 6]], [[8, EOS]]))
        beside = final_scores(reward, record([[5, 6], [7]], [[8, EOS], [8] * 9]))
        without_eos = final_scores(reward, record([[5, 6]], [[8]]))
    torch.testing.assert_close(beside[:1], alone, rtol=1e-5, atol=1e-5)
    assert (without_eos - alone).abs().item() > 1e-3


@every_family
def test_rows_trims_without_changing_anything(name):
    with torch.no_grad():
        rollout, models = scored(name)
        chosen = torch.tensor([4, 1])
        part = rollout.rows(chosen)
        assert part.prompts.shape == (2, 3) and part.responses.shape == (2, 2) == part.logprobs.shape == part.values.shape
        assert torch.equal(part.sampled_logprobs, rollout.sampled_logprobs[chosen, :2])
        assert part.prompts.tolist() == [PROMPTS[4], [PAD, *PROMPTS[1]]]
        torch.testing.assert_close(response_logprobs(models.actor, part)[0], rollout.logprobs[chosen, :2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(response_values(models.critic, part), rollout.values[chosen, :2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(final_scores(models.reward, part), rollout.scores[chosen], rtol=1e-5, atol=1e-5)
    assert torch.equal(part.mask, rollout.mask[chosen, :2])


def test_rewards_of_a_rollout(cfg):
    """Scores in standard deviations above the SFT model's, clipped, less the penalty where there is no EOS; then KL, GAE, metrics."""
    rollout = record([[5, 6], [7], [8]], [[9, EOS], [10, 11], [EOS]])
    rollout.scores = torch.tensor([3.0, 2.0, 100.0])
    rollout.logprobs = torch.tensor([[-1.0, -2.0], [-1.0, -1.0], [-3.0, 0.0]])
    rollout.ref_logprobs = torch.tensor([[-1.5, -1.0], [-1.0, -1.2], [-2.0, 0.0]])
    rollout.values = torch.tensor([[0.5, 1.0], [0.0, 0.5], [2.0, 0.0]])
    rollout.mismatch = torch.tensor([[0.5, 0.5], [0.5, 1.5], [0.0, 0.0]])
    rollout.recomputed = torch.tensor([True, True, False])
    ppo = replace(cfg.ppo, score_clip=5.0, missing_eos_penalty=1.0, kl_estimator="k1", gamma=1.0, lam=0.5, whiten_advantages=False)
    found = fill_rewards(replace(cfg, ppo=ppo), rollout, State(kl_coef=0.1, score_mean=1.0, score_std=2.0))
    # Scores (3 - 1) / 2 = 1; (2 - 1) / 2 - 1 = -0.5 as it does not end; 49.5 clipped to 5
    # KL 0.5, -1; 0, 0.2; -1, times -0.1, and the score on the last token
    torch.testing.assert_close(rollout.rewards, torch.tensor([[-0.05, 1.1], [0.0, -0.52], [5.1, 0.0]]))
    # First row: 1.1 - 1 = 0.1, and -0.05 + 1 - 0.5 + 0.5 * 0.1 = 0.5; second: -0.52 - 0.5 = -1.02, and 0.5 - 0 - 0.51 = -0.01
    torch.testing.assert_close(rollout.advantages, torch.tensor([[0.5, 0.1], [-0.01, -1.02], [3.1, 0.0]]))
    torch.testing.assert_close(rollout.returns, torch.tensor([[1.0, 1.1], [-0.01, -0.52], [5.1, 0.0]]))
    expected = {
        "objective/scores": (1 - 0.5 + 5) / 3,
        "objective/kl": (-0.5 + 0.2 - 1) / 3,
        "objective/non_score_reward": 0.13 / 3,
        "objective/rlhf_reward": (5.5 + 0.13) / 3,
        "objective/entropy": (1 + 2 + 1 + 1 + 3) / 5,
        "rollout/response_length_mean": 5 / 3,
        "rollout/truncated_rate": 1 / 3,
        "rollout/score_mean": 35.0,
        "rollout/logprob_mismatch": (0.5 + 0.5 + 0.5 + 1.5) / 4,
        "rollout/logprob_mismatch_max": 1.5,
        "rollout/recomputed": 2 / 3,
        "val/num_eos_tokens": 2,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    # Switches
    ppo = replace(ppo, score_clip=0.0, missing_eos_penalty=0.0)
    assert fill_rewards(replace(cfg, ppo=ppo), rollout, State(0.1))["objective/scores"] == pytest.approx(35.0)
    fill_rewards(replace(cfg, ppo=replace(ppo, whiten_advantages=True)), rollout, State(0.1))
    real = rollout.advantages[rollout.mask.bool()]
    assert abs(real.mean()) < 1e-6 and real.std(unbiased=False) == pytest.approx(1.0, abs=1e-5)


def test_response_index_and_spread_are_inverse():
    part = record([[5, 6], [7]], [[8, EOS], [9]])
    index, targets = part.response_index()
    # Rows of width 4: prompt columns 0-1, response columns 2-3. A token is predicted one column before it
    assert index.tolist() == [1, 2, 5] and targets.tolist() == [8, EOS, 9]
    assert part.spread(torch.tensor([1.0, 2.0, 3.0])).tolist() == [[1.0, 2.0], [3.0, 0.0]]


def test_join_aligns_rollouts_of_different_widths():
    parts = [record([[5, 6, 7]], [[8]]), record([[9]], [[10, 11, EOS]])]
    both = join(parts, PAD)
    assert both.prompts.tolist() == [[5, 6, 7], [PAD, PAD, 9]]
    assert both.responses.tolist() == [[8, PAD, PAD], [10, 11, EOS]]
    assert both.lengths.tolist() == [1, 3] and both.ended.tolist() == [False, True]
    assert both.sampled_logprobs.tolist() == [[-1.5, 0.0, 0.0], [-1.5, -1.5, -1.5]]


def test_sample_does_not_depend_on_the_micro_batch(alone):
    class Engine(torch.nn.Module):
        """What `whole_weights` asks of an engine."""

        def __init__(self, module):
            super().__init__()
            self.module, self.zero_optimization_stage = module, lambda: 0

    models = Models(Engine(actor("opt")), None, None, None)
    found = [sample(models, RolloutSettings(PAD, EOS, LENGTH, micro, 2, alone), PROMPTS, 7, list(range(6))) for micro in (6, 4, 1)]
    for other in found[1:]:
        assert all(torch.equal(getattr(found[0], n), getattr(other, n)) for n in ("prompts", "responses", "lengths", "ended"))
        torch.testing.assert_close(found[0].sampled_logprobs, other.sampled_logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine_name", ["graph", "hf"])
def test_both_engines_sample_the_same(alone, engine_name):
    class Engine(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.zero_optimization_stage = module, lambda: 0

    models = Models(Engine(actor("llama")), None, None, None)
    settings = RolloutSettings(PAD, EOS, LENGTH, 2, 2, alone, engine=engine_name)
    found = sample(models, settings, PROMPTS, 7, list(range(6)))
    assert responses(found) == responses(generate(models.actor.module, PROMPTS, list(range(6))))
    assert (settings.stats.rows > 0) == (engine_name == "graph")


@pytest.mark.parametrize("offset, read", [(0.0, 1), (0.01, 1), (0.03, 6)])
def test_old_log_probabilities_are_the_samplers_where_the_trainer_agrees(offset, read):
    """One of six rows is read by the trainer; all of them, where it differs by more than the bound of 0.02 nats."""
    model = actor("opt").eval()
    rollout = generate(model, PROMPTS, list(range(6)))
    exact = rollout.sampled_logprobs.clone()
    rollout.sampled_logprobs += offset * rollout.mask
    models = Models(model, scalar("opt"), actor("opt", seed=1), scalar("opt", seed=2))
    with torch.no_grad():
        score(models, RolloutSettings(PAD, EOS, LENGTH, 2, 2, torch.device("cpu"), max_mismatch=0.02), rollout, with_values=False)
    assert int(rollout.recomputed.sum()) == read
    torch.testing.assert_close(rollout.logprobs, exact if read == 6 else rollout.sampled_logprobs, rtol=1e-5, atol=1e-5)
    seen = rollout.mismatch[rollout.recomputed][rollout.mask[rollout.recomputed].bool()]
    torch.testing.assert_close(seen, torch.full_like(seen, offset), rtol=1e-3, atol=1e-5)


def test_the_trainer_looks_at_rows_from_all_over_the_rollout():
    """A sampler that is wrong only in rows which came late, in the place of others, must not teach."""
    model = actor("opt").eval()
    rollout = generate(model, 2 * PROMPTS, list(range(12)))
    exact = rollout.sampled_logprobs.clone()
    rollout.sampled_logprobs[6:] += rollout.mask[6:]
    models = Models(model, scalar("opt"), actor("opt", seed=1), scalar("opt", seed=2))
    with torch.no_grad():
        score(models, RolloutSettings(PAD, EOS, LENGTH, 2, 2, torch.device("cpu"), max_mismatch=0.02), rollout, with_values=False)
    assert rollout.recomputed.all()
    torch.testing.assert_close(rollout.logprobs, exact, rtol=1e-5, atol=1e-5)


def test_the_reward_model_reads_eos_behind_a_stop_string():
    """As behind a response that ended by itself; not behind one that the limit cut, nor past the limit."""
    rollout = record([[5, 6], [7], [5], [6]], [[8, 9], [8, EOS], [8, 9, 10], [8, 9, 10, 11]])
    assert rollout.as_judged(EOS, 4) is rollout
    rollout.stopped = torch.tensor([True, False, False, True])
    judged = rollout.as_judged(EOS, 4)
    assert judged.lengths.tolist() == [3, 2, 3, 4] and judged.ended.tolist() == [True, True, False, False]
    assert judged.responses[0, :3].tolist() == [8, 9, EOS] and judged.responses[3, :4].tolist() == [8, 9, 10, 11]
    assert rollout.lengths.tolist() == [2, 2, 3, 4]
    reward = scalar("opt")
    with torch.no_grad():
        by_itself = final_scores(reward, record([[5, 6]], [[8, 9, EOS]]))
        torch.testing.assert_close(final_scores(reward, judged)[:1], by_itself, rtol=1e-5, atol=1e-6)


def test_gather_on_one_rank_is_the_rollout_itself(alone):
    rollout = record(PROMPTS, ANSWERS)
    same = rollout.gather(PAD, alone)
    assert all(torch.equal(value, getattr(same, name)) for name, value in vars(rollout).items() if value is not None)


@pytest.mark.slow
def test_gather_brings_rows_back_in_the_order_of_the_prompts(tmp_path):
    """Rank r holds every second row, with widths of its own; afterwards both hold all rows in order."""
    command = [sys.executable, gather.__file__, str(tmp_path)]
    processes = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    for process in processes:
        assert process.wait(timeout=120) == 0, process.stderr.read()
    expected = {name: value for name, value in vars(gather.numbered(list(range(6)))).items() if value is not None}
    assert expected["prompts"].shape == (6, 5) and expected["responses"].shape == (6, 6)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"gathered_{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert torch.equal(value, expected[name]) and value.dtype == expected[name].dtype, name


def test_only_answers_to_the_same_prompt_stand_side_by_side():
    """resume=force may go on with other data: with other held-out prompts, and another number of them."""

    def rows(*prompts: str) -> list[dict]:
        return [{"prompt": p[-1], "earlier": p[:-1], "response": p * 2, "score": 0.0, "judge": None} for p in prompts]

    assert [pair["prompt"] for pair in paired(rows("a", "b"), rows("a", "b"))] == ["a", "b"]
    assert [pair["prompt"] for pair in paired(rows("a", "b", "c"), rows("a", "x"))] == ["a"]
    # The same last turn of two dialogues
    assert [(pair["earlier"], pair["prompt"]) for pair in paired(rows("1a", "2b"), rows("1a", "3b"))] == [("1", "a")]


def test_a_sample_keeps_the_turns_before_its_prompt_as_text():
    turns = [{"role": "user", "content": "Hé"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Why?"}]
    found = prompt_of(json.dumps(turns))
    assert found["prompt"] == "Why?" and "Hé" in found["earlier"] and json.loads(found["earlier"]) == turns[:-1]
    assert prompt_of(json.dumps(turns[:1])) == {"prompt": "Hé", "earlier": "[]"}
