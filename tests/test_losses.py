"""The mathematics, against numbers worked by hand (the arithmetic stands beside them) and against properties that must always hold."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runner import losses

fuzz = settings(deadline=None, max_examples=60, derandomize=True)


def close(actual, expected, tolerance: float = 1e-6) -> None:
    actual = actual if isinstance(actual, Tensor) else torch.tensor(actual)
    torch.testing.assert_close(actual.float(), torch.as_tensor(expected, dtype=torch.float32), rtol=tolerance, atol=tolerance)


def mask_of(lengths: list[int], width: int) -> Tensor:
    return (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).float()


@st.composite
def tables(draw, count: int):
    """(lengths, `count` tables (B, R) of moderate numbers)"""
    rows, width = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(1, width), min_size=rows, max_size=rows))
    number = st.floats(-3, 3, width=32)
    table = st.lists(st.lists(number, min_size=width, max_size=width), min_size=rows, max_size=rows)
    return lengths, [torch.tensor(draw(table)) for _ in range(count)]


# --- token probabilities ----------------------------------------------------------------------------------------------

FOUR = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()


@pytest.mark.parametrize(
    "temperature, top_k, top_p, keep, expected",
    [
        (1.0, 0, 1.0, None, [0.4, 0.3, 0.2, 0.1]),
        # Square roots 0.632456, 0.547723, 0.447214, 0.316228 have the sum 1.943620
        (2.0, 0, 1.0, None, [0.325401, 0.281805, 0.230093, 0.162701]),
        (1.0, 2, 1.0, None, [4 / 7, 3 / 7, 0, 0]),
        (1.0, 9, 1.0, None, [0.4, 0.3, 0.2, 0.1]),
        # Mass before each token: 0, 0.4, 0.7, 0.9
        (1.0, 0, 0.35, None, [1, 0, 0, 0]),
        (1.0, 0, 0.6, None, [4 / 7, 3 / 7, 0, 0]),
        (1.0, 0, 0.75, None, [4 / 9, 3 / 9, 2 / 9, 0]),
        # Of what top-k leaves, 4/7 and 3/7, the second has 0.571 before it; without top-k it has 0.4
        (1.0, 2, 0.5, None, [1, 0, 0, 0]),
        (1.0, 0, 0.5, None, [4 / 7, 3 / 7, 0, 0]),
        # The sampled token stays, and shares the mass: 0.4 + 0.3 + 0.1
        (1.0, 2, 1.0, 3, [4 / 8, 3 / 8, 0, 1 / 8]),
        (1.0, 0, 0.35, 2, [4 / 6, 0, 2 / 6, 0]),
    ],
)
def test_warp_logits(temperature, top_k, top_p, keep, expected):
    kept = None if keep is None else torch.tensor([keep])
    close(losses.warp_logits(FOUR, temperature, top_k, top_p, keep=kept).softmax(-1), [expected])


def test_warp_logits_does_not_depend_on_the_order_of_the_tokens():
    shuffled = FOUR[:, [3, 1, 0, 2]]
    close(losses.warp_logits(shuffled, 1.0, 3, 0.75).softmax(-1), [[0, 3 / 7, 4 / 7, 0]])  # 4/9, 3/9, 2/9: before the third 7/9


@fuzz
@given(st.integers(0, 10**6), st.floats(0.1, 3), st.integers(0, 8), st.floats(0.01, 1))
def test_warp_never_drops_the_sampled_token_and_leaves_the_others_as_they_were(seed, temperature, top_k, top_p):
    generator = torch.Generator().manual_seed(seed)
    logits, keep = 3 * torch.randn(5, 8, generator=generator), torch.randint(0, 8, (5,), generator=generator)
    warped = losses.warp_logits(logits, temperature, top_k, top_p, keep=keep)
    assert losses.token_logprobs(warped, keep).isfinite().all()
    finite = warped.isfinite()
    close(warped[finite], (logits / temperature)[finite])
    # The likeliest token always stays, and beside the sampled one no more than top-k
    assert finite.gather(1, logits.argmax(-1, keepdim=True)).all()
    assert top_k == 0 or (finite.sum(-1) <= top_k + 1).all()


def test_token_logprobs_are_those_of_log_softmax_in_any_precision():
    logits, tokens = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)), torch.arange(7)
    close(losses.token_logprobs(logits, tokens), logits.log_softmax(-1)[torch.arange(7), tokens])
    half = losses.token_logprobs(logits.bfloat16(), tokens)
    assert half.dtype == torch.float32
    close(half, logits.bfloat16().float().log_softmax(-1)[torch.arange(7), tokens])


def test_entropy():
    inf = torch.inf
    # log 4; log 2 where two tokens are left; 0 where one is; -0.4 log 0.4 - 0.3 log 0.3 - 0.2 log 0.2 - 0.1 log 0.1 = 1.279854
    logits = torch.stack([torch.zeros(4), torch.tensor([1.0, 1.0, -inf, -inf]), torch.tensor([5.0, -inf, -inf, -inf]), FOUR[0]])
    close(losses.entropy(logits), [math.log(4), math.log(2), 0.0, 1.279854])


@pytest.mark.parametrize("room", [1, 2 * 11, 2**25])
def test_chosen_logprobs_equal_the_plain_formula_in_value_and_gradient(room, monkeypatch):
    """However few rows are in fp32 at one time."""
    monkeypatch.setattr(losses, "FP32_LOGITS", room)
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(7, 11, generator=generator)).requires_grad_()
    tokens, weights = torch.arange(7), torch.randn(7, generator=generator)
    plain = losses.token_logprobs(logits, tokens)
    (expected,) = torch.autograd.grad((plain * weights).sum(), logits)
    found, entropies = losses.chosen_logprobs(logits, tokens, True)
    (gradient,) = torch.autograd.grad((found * weights).sum(), logits)
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(entropies, losses.entropy(logits.detach()), rtol=1e-6, atol=1e-6)
    assert not entropies.requires_grad and losses.chosen_logprobs(logits, tokens, False)[1].eq(0).all()


def test_chosen_logprobs_of_half_precision_are_computed_in_fp32():
    logits = (5 * torch.randn(7, 11, generator=torch.Generator().manual_seed(0))).bfloat16().requires_grad_()
    tokens, whole = torch.arange(7), logits.detach().float().requires_grad_()
    found, _ = losses.chosen_logprobs(logits, tokens, False)
    expected = losses.token_logprobs(whole, tokens)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    (gradient,), (exact,) = torch.autograd.grad(found.sum(), logits), torch.autograd.grad(expected.sum(), whole)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.float(), exact, rtol=2**-8, atol=1e-6)


# --- supervised and reward losses -------------------------------------------------------------------------------------


def test_sft_loss():
    # 1 * 1 + 2 * 0 + 3 * 0.5
    close(losses.sft_loss(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([1.0, 0.0, 0.5])), 2.5)


def test_pairwise_loss():
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    # log(1 + e^-1) = 0.313262 and log(1 + e^2) = 2.126928
    close(losses.pairwise_loss(chosen, rejected, 0.0), 0.313262 + 2.126928)
    # Centering: 0.1 * (1 + 0)^2 + 0.1 * (0 + 2)^2
    close(losses.pairwise_loss(chosen, rejected, 0.1), 0.313262 + 2.126928 + 0.1 + 0.4)
    # The gradient for the chosen score is -sigmoid(rejected - chosen): -sigmoid(-1) = -0.268941
    chosen.requires_grad_()
    close(torch.autograd.grad(losses.pairwise_loss(chosen, rejected, 0.0), chosen)[0], [-0.268941, -0.880797])


def test_pairwise_loss_of_extreme_scores_is_finite():
    close(losses.pairwise_loss(torch.tensor([0.0]), torch.tensor([1000.0]), 0.0), 1000.0)


# --- DPO --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chosen, rejected, smoothing, expected",
    [
        ([0.0], [0.0], 0.0, 0.6931472),  # log 2
        ([0.0], [0.0], 0.3, 0.6931472),  # whatever the smoothing
        ([0.5], [-0.5], 0.0, 0.3132617),  # log(1 + e^-1)
        ([-2.0], [-1.0], 0.0, 1.3132617),  # log(1 + e)
        ([0.5], [-0.5], 0.1, 0.4132617),  # 0.9 * 0.3132617 + 0.1 * 1.3132617
        ([0.0, 0.5], [0.0, -0.5], 0.0, 1.0064089),  # a sum
    ],
)
def test_dpo_loss(chosen, rejected, smoothing, expected):
    loss = losses.dpo_loss(torch.tensor(chosen), torch.tensor(rejected), smoothing)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_the_gradient_of_dpo_is_how_sure_it_is_of_the_wrong_order_less_the_share_of_wrong_labels():
    """d loss / d margin = smoothing - sigmoid(-margin); it ends at the margin that such labels deserve: log(0.8 / 0.2)."""
    chosen, rejected = torch.tensor([1.0, math.log(4.0)], requires_grad=True), torch.zeros(2, requires_grad=True)
    losses.dpo_loss(chosen, rejected, 0.2).backward()
    assert chosen.grad.tolist() == pytest.approx([0.2 - 0.2689414, 0.0], abs=1e-6)
    assert torch.equal(chosen.grad, -rejected.grad)


# --- PPO --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator, expected", [("k1", 0.5), ("k2", 0.125), ("k3", 0.1065307)])  # k3: e^-0.5 - 1 + 0.5
def test_kl_estimate(estimator, expected):
    close(losses.kl_estimate(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]), estimator), [[expected]])


def test_all_kl_estimators_mean_the_kl():
    """Their mean over the actor's tokens is the KL of the two distributions; k2 is the one that is biased."""
    actor, ref = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    kl = (actor * (actor / ref).log()).sum()  # 0.5 log 1.25 + 0.3 log 0.75 = 0.025267
    close(kl, 0.025267)
    for estimator, bias in (("k1", 0.0), ("k2", 0.001), ("k3", 0.0)):
        mean = (actor * losses.kl_estimate(actor.log()[None], ref.log()[None], estimator)[0]).sum()
        assert abs(mean - kl) <= bias + 1e-6


def test_token_rewards_put_the_score_on_the_last_real_token():
    kl = torch.tensor([[0.1, 0.2, 0.3], [0.4, 9.0, 9.0]])
    lengths = torch.tensor([3, 1])
    found = losses.token_rewards(torch.tensor([2.0, -1.0]), kl, lengths, mask_of([3, 1], 3), kl_coef=0.5)
    # EOS is the last real token, and -0.5 * 0.3 + 2 = 1.85 lands on it; second row -0.5 * 0.4 - 1, and nothing on the padding
    close(found, [[-0.05, -0.1, 1.85], [-1.2, 0.0, 0.0]])


def test_gae():
    rewards = torch.tensor([[1.0, 0.0, 2.0], [3.0, 7.0, 7.0]])
    values = torch.tensor([[0.5, 1.0, 1.5], [1.0, 8.0, 8.0]])
    advantages, returns = losses.gae(rewards, values, mask_of([3, 1], 3), gamma=0.9, lam=0.5)
    # t=2: 2 - 1.5 = 0.5;  t=1: 0 + 0.9 * 1.5 - 1 + 0.45 * 0.5 = 0.575;  t=0: 1 + 0.9 * 1 - 0.5 + 0.45 * 0.575 = 1.65875
    # The second response is one token long: 3 - 1, whatever stands on the padding
    close(advantages, [[1.65875, 0.575, 0.5], [2.0, 0.0, 0.0]])
    close(returns, [[2.15875, 1.575, 2.0], [3.0, 0.0, 0.0]])


def lambda_return(rewards: list[float], values: list[float], gamma: float, lam: float) -> float:
    """(1 - lam) * sum over n of lam^(n-1) * G_n, the rest of the weight on the full return: the definition, term by term."""
    n_step = [
        sum(gamma**k * rewards[k] for k in range(n)) + (gamma**n * values[n] if n < len(rewards) else 0.0)
        for n in range(1, len(rewards) + 1)
    ]
    return sum((1 - lam) * lam**n * g for n, g in enumerate(n_step[:-1])) + lam ** (len(rewards) - 1) * n_step[-1]


@fuzz
@given(tables(2), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_direct_sum_of_lambda_returns(data, gamma, lam):
    lengths, (rewards, values) = data
    advantages, returns = losses.gae(rewards, values, mask_of(lengths, rewards.size(1)), gamma, lam)
    for i, n in enumerate(lengths):
        r, v = rewards[i, :n].tolist(), values[i, :n].tolist()
        expected = [lambda_return(r[t:], v[t:], gamma, lam) for t in range(n)]
        close(returns[i, :n], expected, 1e-4)
        close(advantages[i, :n], [g - x for g, x in zip(expected, v, strict=True)], 1e-4)


def test_whiten():
    # Real ones are 1, 2, 3: mean 2, variance 2/3, so 1 / sqrt(2/3) = 1.224745
    found = losses.whiten(torch.tensor([[1.0, 3.0], [2.0, 99.0]]), mask_of([2, 1], 2))
    close(found, [[-1.224745, 1.224745], [0.0, 0.0]])


@fuzz
@given(tables(1))
def test_whitened_have_mean_0_and_standard_deviation_1(data):
    lengths, (x,) = data
    mask = mask_of(lengths, x.size(1))
    real = losses.whiten(x, mask)[mask.bool()]
    if x[mask.bool()].std(unbiased=False) > 0.01:
        assert abs(real.mean()) < 1e-3
        assert abs(real.std(unbiased=False) - 1) < 1e-3
    else:  # (almost) constant: nothing is blown up
        assert (real.abs() < 10).all()


# Ratio, advantage, loss. Clip 0.2, dual clip 3, log-ratio within +-2: e^2 = 7.389056
SURROGATE = [
    (1.0, 1.0, -1.0),
    (1.5, 1.0, -1.2),  # clipped above: max(-1.5, -1.2)
    (0.5, 1.0, -0.5),  # max(-0.5, -0.8): a good token that lost probability is not clipped
    (1.5, -1.0, 1.5),  # max(1.5, 1.2)
    (0.5, -1.0, 0.8),  # clipped below: max(0.5, 0.8)
    (5.0, -1.0, 3.0),  # dual clip: min(5, 3 * 1)
    (5.0, -2.0, 6.0),  # min(10, 3 * 2)
    (100.0, 1.0, -1.2),
]


@pytest.mark.parametrize("ratio, advantage, expected", SURROGATE)
def test_policy_loss(ratio, advantage, expected):
    old = torch.tensor([[-2.0]])
    loss, _ = losses.policy_loss(
        old + math.log(ratio), old, torch.tensor([[advantage]]), torch.ones(1, 1), cliprange=0.2, dual_clip=3.0, log_ratio_clamp=20.0
    )
    close(loss, expected, 1e-5)


def surrogate(log_ratio: float, advantage: float, **limits) -> tuple[float, float]:
    """(loss, gradient for the log-probability) of one token."""
    new = torch.tensor([[log_ratio]], requires_grad=True)
    limits = {"cliprange": 0.2, "dual_clip": 3.0, "log_ratio_clamp": 20.0} | limits
    loss, _ = losses.policy_loss(new, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1), **limits)
    return loss.item(), torch.autograd.grad(loss, new)[0].item()


@pytest.mark.parametrize(
    "log_ratio, advantage, limits, expected",
    [
        (0.0, 2.0, {}, (-2.0, -2.0)),  # at ratio 1 the gradient is that of the policy gradient
        (0.1, 2.0, {}, (-2 * math.exp(0.1), -2 * math.exp(0.1))),
        (0.5, 2.0, {}, (-2.4, 0.0)),  # clipped: no gradient
        (-0.5, -2.0, {}, (1.6, 0.0)),
        (0.5, -2.0, {}, (2 * math.exp(0.5), 2 * math.exp(0.5))),
        (2.0, -2.0, {}, (6.0, 0.0)),  # dual clip
        (2.0, -2.0, {"dual_clip": 0.0}, (2 * math.exp(2), 2 * math.exp(2))),
        (30.0, -2.0, {"dual_clip": 0.0, "log_ratio_clamp": 1.0}, (2 * math.e, 0.0)),
        (-30.0, 2.0, {"log_ratio_clamp": 1.0}, (-2 / math.e, 0.0)),
    ],
)
def test_policy_loss_and_its_gradient_at_the_clips(log_ratio, advantage, limits, expected):
    assert surrogate(log_ratio, advantage, **limits) == pytest.approx(expected, rel=1e-5)


def test_policy_loss_sums():
    log_ratio = torch.tensor([[math.log(1.5), math.log(0.5), 5.0]])
    advantages = torch.tensor([[1.0, 1.0, 1.0]])
    limits = {"cliprange": 0.2, "dual_clip": 3.0, "log_ratio_clamp": 20.0}
    loss, sums = losses.policy_loss(log_ratio, torch.zeros(1, 3), advantages, mask_of([2], 3), **limits)
    close(loss, -1.2 - 0.5)
    close(sums["ratio"], 2.0)
    close(sums["clipfrac"], 1.0)  # only the first is clipped
    close(sums["approxkl"], (1.5 - 1 - math.log(1.5)) + (0.5 - 1 - math.log(0.5)))  # 0.094535 + 0.193147


@pytest.mark.parametrize(
    "value, ret, expected, clipfrac",
    [
        (0.1, 1.0, 0.405, 0.0),  # inside the clip: 0.5 * 0.9^2
        (0.5, 1.0, 0.32, 1.0),  # ran ahead: the clipped 0.2 is worse, 0.5 * 0.8^2
        (-0.5, 1.0, 1.125, 0.0),  # ran the wrong way: 0.5 * 1.5^2 stays
        (-0.5, -0.3, 0.02, 0.0),  # overshot: 0.5 * 0.2^2 beats 0.5 * 0.1^2
    ],
)
def test_value_loss(value, ret, expected, clipfrac):
    loss, sums = losses.value_loss(torch.tensor([[value]]), torch.zeros(1, 1), torch.tensor([[ret]]), torch.ones(1, 1), cliprange_value=0.2)
    close(loss, expected)
    close(sums["value_clipfrac"], clipfrac)


def test_explained_variance():
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 50.0]]), mask_of([3], 4)
    for values, expected in (([1.0, 2.0, 3.0, 0.0], 1.0), ([2.0, 2.0, 2.0, 0.0], 0.0), ([3.0, 2.0, 1.0, 0.0], -3.0)):
        # The last: returns - values is -2, 0, 2 with variance 8/3, and 1 - (8/3) / (2/3) = -3
        close(losses.explained_variance(torch.tensor([values]), returns, mask), expected)


@fuzz
@given(tables(4), st.floats(-1e6, 1e6, width=32))
def test_padding_never_changes_anything(data, junk):
    """Whatever finite numbers stand where the mask is 0, every result is the same, bit for bit."""
    lengths, (a, b, c, d) = data
    mask = mask_of(lengths, a.size(1))
    scores, limits = a[:, 0], {"cliprange": 0.2, "dual_clip": 3.0, "log_ratio_clamp": 20.0}

    def results(a, b, c, d):
        rewards = losses.token_rewards(scores, b, torch.tensor(lengths), mask, 0.1)
        return [
            losses.masked_mean(a, mask),
            rewards,
            *losses.gae(c, d, mask, 0.9, 0.95),
            losses.whiten(a, mask),
            losses.policy_loss(a, b, c, mask, **limits)[0],
            *losses.policy_loss(a, b, c, mask, **limits)[1].values(),
            losses.value_loss(a, b, c, mask, cliprange_value=0.2)[0],
            *losses.value_loss(a, b, c, mask, cliprange_value=0.2)[1].values(),
            losses.explained_variance(a, b, mask),
        ]

    dirty = [torch.where(mask.bool(), x, torch.tensor(junk)) for x in (a, b, c, d)]
    for clean, other in zip(results(a, b, c, d), results(*dirty), strict=True):
        assert torch.equal(clean, other)


@fuzz
@given(tables(2))
def test_k2_and_k3_are_never_negative_and_0_only_at_equality(data):
    _, (logprobs, ref) = data
    for estimator in ("k2", "k3"):
        kl = losses.kl_estimate(logprobs, ref, estimator)
        assert (kl >= -1e-6).all()
        assert (kl[(logprobs - ref).abs() > 0.1] > 0.004).all()
        close(losses.kl_estimate(ref, ref, estimator), torch.zeros_like(ref))


@pytest.mark.parametrize(
    "kl, expected",
    [
        (12.0, 0.1 * (1 + 0.2 * 64 / 10_000)),  # error 1, clipped to 0.2
        (6.6, 0.1 * (1 + 0.1 * 64 / 10_000)),
        (6.0, 0.1),
        (5.4, 0.1 * (1 - 0.1 * 64 / 10_000)),
        (-3.0, 0.1 * (1 - 0.2 * 64 / 10_000)),
    ],
)
def test_adapt_kl_coef(kl, expected):
    assert losses.adapt_kl_coef(0.1, kl, target=6.0, responses=64, horizon=10_000) == pytest.approx(expected, rel=1e-12)
