"""The two models that stages work with: the actor, and the scalar model that is reward model and critic.

Both take token ids with an attention mask, padded on either side or not at all, best on the CPU: there they are packed, so that the model
computes no padding (runner/models/packing.py). Positions follow from the mask and are passed explicitly. Outputs are fp32.
"""

from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from runner.device import send
from runner.families import FAMILIES
from runner.losses import bar_unused, chosen_logprobs, entropy, token_logprobs, warp_logits, without_token
from runner.models import attention, packing


class Wrapper(nn.Module):
    """A Hugging Face model whose hidden states we read, with or without peft around it."""

    def __init__(self, model: nn.Module, family: str):
        super().__init__()
        self.model = model
        self.family = FAMILIES[family]
        attention.adopt(self.hf)

    @property
    def hf(self) -> PreTrainedModel:
        """The Hugging Face model itself, adapters included."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    @property
    def packed(self) -> bool:
        """Whether forward passes leave the padding out (runner/models/packing.py)."""
        return attention.is_packed(self.hf)

    @property
    def pads_nothing(self) -> bool:
        """Whether a micro batch costs its tokens; otherwise it is attention that pads, and its rows times the longest count."""
        return attention.pads_nothing(self.hf)

    def hidden_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Hidden states of the N real tokens, row after row, after the last layer norm. (B, T) -> (N, H)."""
        device = self.hf.device
        if self.packed:
            return attention.body(self.hf.base_model, packing.lay_out(ids, mask).to(device))
        real = send(packing.real(mask), device)
        positions = {"position_ids": send(packing.positions_from_mask(mask), device)} if self.family.position_ids else {}
        ids, mask = send(ids, device), send(mask, device)
        hidden = self.hf.base_model(input_ids=ids, attention_mask=mask, use_cache=False, **positions).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, real)

    @contextmanager
    def without_adapter(self):
        """The model as it was before its adapters were trained: a reference without a second copy."""
        with self.model.disable_adapter():
            yield self


class Actor(Wrapper):
    """A causal language model that returns log-probabilities of chosen tokens, never the logits of a whole batch.

    What responses are sampled from, and their log-probabilities belong to: temperature, top_k, top_p;
    min_tokens: tokens of a response before which EOS is impossible;
    vocabulary: tokens of the tokenizer, where the embeddings may have more rows; None if every row is a token.
    chunk: tokens whose logits exist at a time; 0 for all at once, which ZeRO-3 needs: every rank must gather the head the same
    number of times.
    """

    def __init__(
        self,
        model: nn.Module,
        family: str,
        chunk: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_tokens: int = 0,
        vocabulary: int | None = None,
    ):
        super().__init__(model, family)
        self.chunk, self.min_tokens = chunk, min_tokens
        self.sampling, self.vocabulary = (temperature, top_k, top_p), vocabulary

    def forward(
        self, ids: Tensor, mask: Tensor, index: Tensor, targets: Tensor, with_entropy: bool = False, steps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of given next tokens.

        Args:
            ids, mask (B, T).
            index (N,): positions in the flattened (B * T) whose next token is predicted; targets (N,): those next tokens.
            steps (N,): their positions in the response, from 0, which decide where EOS is impossible. None for text that was not
                sampled: temperature and the like have no part in its log-probabilities.
        Returns: logprobs (N,), entropies (N,) without gradient, zeros unless asked for.
        """
        hidden = self.hidden_states(ids, mask)
        index, targets = send(packing.among_real(mask, index), hidden.device), send(targets, hidden.device)
        hidden = hidden.index_select(0, index)
        given = [hidden, targets]
        if self.min_tokens > 1 and steps is not None:
            given.append(send(steps + 1 < self.min_tokens, hidden.device))
        score = partial(self._score, with_entropy, steps is not None)
        if not self.chunk or len(index) <= self.chunk:
            return score(*given)
        # Recomputing the logits of a chunk in the backward pass keeps one chunk in memory instead of N x V
        run = partial(checkpoint, score, use_reentrant=False) if torch.is_grad_enabled() else score
        parts = [run(*chunk) for chunk in zip(*(x.split(self.chunk) for x in given), strict=True)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _score(
        self, with_entropy: bool, sampled: bool, hidden: Tensor, targets: Tensor, early: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (N,) from hidden states (N, H). early (N,) bool: where EOS is impossible."""
        logits = self.hf.get_output_embeddings()(hidden)
        if sampled:
            bar_unused(logits, self.vocabulary)
        if not sampled or (self.sampling == (1.0, 0, 1.0) and early is None):
            return chosen_logprobs(logits, targets, with_entropy)
        logits = logits.float()
        if early is not None:
            logits = without_token(logits, self.hf.config.eos_token_id, early)
        logits = warp_logits(logits, *self.sampling, keep=targets)
        with torch.no_grad():
            entropies = entropy(logits) if with_entropy else torch.zeros_like(targets, dtype=torch.float32)
        return token_logprobs(logits, targets), entropies


class Scalar(Wrapper):
    """A sequence classifier with one label, read at every position: reward model and critic."""

    mean, std = 0.0, 1.0

    def normalise(self, mean: float, std: float) -> None:
        """Output standard deviations from a mean: a critic that starts as the reward model then starts in the units of the rewards
        that it must predict."""
        self.mean, self.std = mean, std

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, T) -> (B, T) fp32, 0 on padding."""
        values = self.hf.score(self.hidden_states(ids, mask)).squeeze(-1)
        return packing.spread((values - self.mean) / self.std, mask)


class Fp32Linear(nn.Linear):
    """The scalar head: weights as stored, arithmetic in fp32, because values differ by less than bf16 can resolve."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float())
