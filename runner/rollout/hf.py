"""Sampling through transformers' generate: slow, but it works for every model everywhere. The reference for the decode engine."""

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from runner.losses import bar_unused, token_logprobs, warp_logits, without_token
from runner.models.wrappers import Actor
from runner.rollout.record import Rollout
from runner.rollout.sampling import invert
from runner.rollout.stops import Stops


class InverseSampling(LogitsProcessor):
    """Picks the token of each row by its uniform number and leaves generate no other choice.

    logprobs: (B, R) fp32, of the picked tokens under the distribution they were drawn from; noise after a row's end.
    """

    def __init__(self, uniform: Tensor, actor: Actor, prompt_width: int, eos: int, stops: Stops | None):
        self.uniform, self.actor, self.prompt_width, self.eos, self.stops = uniform, actor, prompt_width, eos, stops
        self.logprobs = torch.zeros_like(uniform, dtype=torch.float32)
        self.states = torch.zeros(len(uniform), dtype=torch.long, device=uniform.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step, logits = input_ids.size(1) - self.prompt_width, bar_unused(scores.float(), self.actor.vocabulary)
        if step + 1 < self.actor.min_tokens:
            logits = without_token(logits, self.eos, torch.ones(len(logits), dtype=torch.bool, device=logits.device))
        logits = warp_logits(logits, *self.actor.sampling)
        token = invert(logits, self.uniform[:, step])
        self.logprobs[:, step] = token_logprobs(logits, token)
        if self.stops:  # EOS behind a stop string, so that generate goes no further with this row
            token = token.masked_fill(self.stops.reached(self.states), self.eos)
            self.states = self.stops.next(self.states, token)
        return torch.full_like(scores, -torch.inf).scatter(1, token.unsqueeze(1), 0.0)


@torch.no_grad()
def generate(
    actor: Actor,
    prompts: Tensor,
    prompt_lengths: Tensor,
    uniform: Tensor,
    *,
    pad: int,
    eos: int,
    stops: Stops | None = None,
    together: bool = False,
) -> Rollout:
    """Sample one response per prompt.

    Args:
        prompts (B, P) left-padded; prompt_lengths (B,); uniform (B, R): one number per token, R tokens at most, EOS included.
        stops: strings at which a response ends.
        together: all ranks take the same number of steps, because they gather the weights of each layer together (ZeRO-3).
    """
    width, length = prompts.size(1), uniform.size(1)
    mask = (torch.arange(width, device=prompts.device) >= (width - prompt_lengths).unsqueeze(1)).long()
    pick = InverseSampling(uniform.to(prompts.device), actor, width, eos, stops)
    # A config of our own: generate would otherwise mix in the checkpoint's (and top_k=50)
    config = GenerationConfig(max_new_tokens=length, do_sample=False, pad_token_id=pad, eos_token_id=eos)
    options = {"generation_config": config, "logits_processor": LogitsProcessorList([pick]), "synced_gpus": together}
    rows = actor.hf.generate(input_ids=prompts, attention_mask=mask, **options)
    responses = rows[:, width:]
    is_eos = responses == eos
    ended = is_eos.any(dim=1)
    lengths = torch.where(ended, is_eos.int().argmax(dim=1) + 1, responses.size(1))
    rollout = Rollout(prompts, prompt_lengths, responses, lengths, ended)
    if stops:
        stops.cut(rollout, pad)
    rollout.sampled_logprobs = pick.logprobs[:, : responses.size(1)] * rollout.mask
    return rollout
