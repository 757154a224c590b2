"""The mathematics of SFT, reward modelling, DPO and PPO: pure functions of tensors.

Shapes: B sequences, R response tokens, N tokens or pairs in a flat list. Everything is fp32. `mask` is 1 on real response
tokens, EOS included, and 0 on padding; it comes from lengths, never from token ids.

Losses are returned as sums. The caller divides by the number of tokens (or pairs) of the whole optimizer step over all
ranks, so that the result depends neither on the number of GPUs nor on the micro batch.

Sources: InstructGPT (arXiv 2203.02155), PPO (1707.06347), GAE (1506.02438), Bradley-Terry reward models (2009.01325),
DPO (2305.18290), the N implementation details of RLHF with PPO (2403.17031), dual clip (1912.09729), k1/k2/k3 (Schulman,
"Approximating KL").
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from runner.schedules import KL_STEP
from runner.triton_support import why_no_triton

# Logits that exist in fp32 at one time: 128 MB
FP32_LOGITS = 2**25


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


# --- token probabilities ----------------------------------------------------------------------------------------------


def warp_logits(logits: Tensor, temperature: float, top_k: int, top_p: float, keep: Tensor | None = None) -> Tensor:
    """The logits of the distribution that is sampled from: temperature, then top-k, then nucleus.

    Training uses the same function as sampling, with keep = the sampled token (N,): a token that has dropped out of the truncated
    set since it was sampled keeps a finite log-probability.

    Args: logits (N, V). Returns: (N, V) with -inf outside the kept set.
    """
    if temperature != 1.0:
        logits = logits / temperature
    if top_k <= 0 and top_p >= 1.0:
        return logits
    dropped = torch.zeros_like(logits, dtype=torch.bool)
    if 0 < top_k < logits.size(-1):
        dropped |= logits < logits.topk(top_k, dim=-1).values[..., -1:]
    if top_p < 1.0:
        # Nucleus of what top-k left over: a token stays while the mass before it is below top_p
        ordered, order = logits.masked_fill(dropped, -torch.inf).sort(dim=-1, descending=True)
        probability = ordered.softmax(dim=-1)
        mass_before = probability.cumsum(dim=-1) - probability
        dropped |= torch.zeros_like(dropped).scatter(-1, order, mass_before >= top_p)
    if keep is not None:
        dropped = dropped.scatter(-1, keep.unsqueeze(-1), False)
    return logits.masked_fill(dropped, -torch.inf)


def without_token(logits: Tensor, token: int, rows: Tensor) -> Tensor:
    """logits (N, V) with minus infinity at `token` in the rows (N,) bool that must not choose it."""
    barred = torch.zeros_like(logits, dtype=torch.bool)
    barred[:, token] = rows
    return logits.masked_fill(barred, -torch.inf)


def bar_unused(logits: Tensor, vocabulary: int | None) -> Tensor:
    """logits (N, V) with the columns from `vocabulary` on barred, in place and without a gradient: no token has them.

    Checkpoints fill their embeddings up to a round number. A model with fewer rows, such as a small reward model, could not read such a
    token. The value is finite because 0 * -inf would make an entropy NaN. None: every column is a token.
    """
    if vocabulary is not None and vocabulary < logits.size(-1):
        logits.detach()[:, vocabulary:] = -1e4
    return logits


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each token. logits (N, V) in any precision, tokens (N,) -> (N,) fp32."""
    logits = logits.float()
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)


def chosen_logprobs(logits: Tensor, tokens: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor]:
    """Log-probability of each token, and the entropy of its distribution without gradient (zeros unless asked for).

    As `token_logprobs` and `entropy`, but no fp32 copy of the logits is ever kept, and their gradient has their own precision. On CUDA
    in one pass over the logits and one for their gradient (loss_kernels.py), else in blocks.
    logits (N, V), tokens (N,) -> (N,), (N,) fp32.
    """
    return _ChosenLogprobs.apply(logits, tokens, with_entropy)


class _ChosenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, tokens: Tensor, with_entropy: bool):
        logits = logits.contiguous()
        if _in_one_pass(logits):
            from runner import loss_kernels

            tokens = tokens.contiguous()
            logprobs, entropies, normalisers = loss_kernels.chosen(logits, tokens)
            entropies = entropies if with_entropy else torch.zeros_like(entropies)
        else:
            logprobs, entropies, normalisers = _chosen_in_blocks(logits, tokens, with_entropy)
        ctx.save_for_backward(logits, tokens, normalisers)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, gradient: Tensor, _):
        logits, tokens, normalisers = ctx.saved_tensors  # read only once: under checkpointing a second read raises
        if _in_one_pass(logits):
            from runner import loss_kernels

            return loss_kernels.gradient(logits, tokens, normalisers, gradient), None, None
        return _gradient_in_blocks(logits, tokens, normalisers, gradient), None, None


def _in_one_pass(logits: Tensor) -> bool:
    return logits.is_cuda and len(logits) > 0 and why_no_triton() is None


def _chosen_in_blocks(logits: Tensor, tokens: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and logsumexps (N,)."""
    logprobs, entropies, normalisers = torch.zeros(3, len(tokens), device=logits.device).unbind()
    for rows in _blocks(logits):
        logp, chosen = logits[rows].log_softmax(dim=-1, dtype=torch.float32), tokens[rows].unsqueeze(-1)
        logprobs[rows] = logp.gather(-1, chosen).squeeze(-1)
        normalisers[rows] = logits[rows].gather(-1, chosen).squeeze(-1).float() - logprobs[rows]
        if with_entropy:
            entropies[rows] = -logp.exp().mul_(logp).sum(dim=-1)
    return logprobs, entropies, normalisers


def _gradient_in_blocks(logits: Tensor, tokens: Tensor, normalisers: Tensor, of_logprobs: Tensor) -> Tensor:
    """gradient * (one at the token - softmax)."""
    out, tokens, slope = torch.empty_like(logits), tokens.unsqueeze(-1), of_logprobs.unsqueeze(-1)
    for rows in _blocks(logits):
        block = (logits[rows] - normalisers[rows].unsqueeze(-1)).exp_().mul_(-slope[rows])
        out[rows] = block.scatter_add_(-1, tokens[rows], slope[rows])
    return out


def _blocks(logits: Tensor) -> list[slice]:
    """Groups of rows that fit into the memory for fp32 logits."""
    step = max(1, FP32_LOGITS // logits.size(-1))
    return [slice(start, start + step) for start in range(0, len(logits), step)]


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the next-token distribution in nats. (N, V) -> (N,)."""
    logp = logits.float().log_softmax(dim=-1)
    # 0 * -inf is nan for tokens outside a truncated set
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(dim=-1)


# --- supervised and reward losses -------------------------------------------------------------------------------------


def sft_loss(logprobs: Tensor, weights: Tensor) -> Tensor:
    """Weighted negative log-likelihood, summed. logprobs (N,), weights (N,): 1 on responses, prompt_loss on prompts."""
    return -(logprobs * weights).sum()


def pairwise_loss(chosen: Tensor, rejected: Tensor, center_coef: float) -> Tensor:
    """Bradley-Terry: -log sigmoid(chosen - rejected), summed over pairs (N,).

    A pair only fixes a difference; center_coef * (chosen + rejected)^2 fixes the mean (arXiv 2312.09244).
    """
    return (-F.logsigmoid(chosen - rejected) + center_coef * (chosen + rejected).square()).sum()


# --- DPO --------------------------------------------------------------------------------------------------------------


def dpo_loss(chosen: Tensor, rejected: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid(chosen - rejected), summed over pairs (N,) of implicit rewards: beta * (log actor - log reference) of the responses.

    label_smoothing: the probability that a label is wrong; the loss is the expectation over that (conservative DPO).
    """
    margin = chosen - rejected
    return -((1 - label_smoothing) * F.logsigmoid(margin) + label_smoothing * F.logsigmoid(-margin)).sum()


# --- PPO --------------------------------------------------------------------------------------------------------------


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(actor || reference) from tokens sampled by the actor. (B, R) -> (B, R)."""
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    return torch.exp(-log_ratio) - 1 + log_ratio  # k3


def token_rewards(scores: Tensor, kl: Tensor, lengths: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Per-token reward: -kl_coef * kl everywhere, and the score on the last action, which is EOS where there is one.

    Args: scores (B,), kl (B, R), lengths (B,) tokens of each response, EOS included, at least 1. Returns: (B, R).
    """
    rewards = -kl_coef * kl * mask
    last = (lengths - 1).unsqueeze(-1)
    return rewards.scatter_add(-1, last, scores.unsqueeze(-1))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the response tokens; the state after the last action has value 0.

    Args: rewards, values, mask (B, R). Returns: advantages and returns (advantages + values), both (B, R), 0 where masked.
    """
    values, rewards = values * mask, rewards * mask
    advantage, next_value = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * lam * advantage) * mask[:, t]
        advantages[:, t], next_value = advantage, values[:, t]
    return advantages, (advantages + values) * mask


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over all real tokens of the rollout; padding stays 0."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, cliprange: float, dual_clip: float, log_ratio_clamp: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate, summed over tokens, with dual clip for negative advantages.

    Args: all (B, R). Returns: the loss, and sums over tokens for the log: `ratio`, `clipfrac`, `approxkl` (k3).
    """
    log_ratio = (logprobs - old_logprobs).clamp(-log_ratio_clamp, log_ratio_clamp) * mask
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    loss = torch.maximum(unclipped, clipped)
    if dual_clip:
        # Without a ceiling, a large ratio times a negative advantage gives an unbounded gradient
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    with torch.no_grad():
        sums = {
            "ratio": masked_sum(ratio, mask),
            "clipfrac": masked_sum((clipped > unclipped).float(), mask),
            "approxkl": masked_sum(ratio - 1 - log_ratio, mask),
        }
    return masked_sum(loss, mask), sums


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, cliprange_value: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half squared error with the update of the value clipped, summed over tokens. All (B, R); sums as in policy_loss."""
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    unclipped_error, clipped_error = (values - returns).square(), (clipped - returns).square()
    with torch.no_grad():
        sums = {"value_clipfrac": masked_sum((clipped_error > unclipped_error).float(), mask)}
    return 0.5 * masked_sum(torch.maximum(unclipped_error, clipped_error), mask), sums


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 one that knows only the mean."""

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)).square(), mask)

    return 1 - variance(returns - values) / variance(returns).clamp(min=1e-8)


def adapt_kl_coef(kl_coef: float, kl: float, target: float, responses: int, horizon: int) -> float:
    """Proportional controller (arXiv 1909.08593): raise the coefficient when the KL per response exceeds the target."""
    error = min(max(kl / target - 1, -KL_STEP), KL_STEP)
    return kl_coef * (1 + error * responses / horizon)
