"""Tiny random models of every family, made from a config in milliseconds, and the configuration of a command line."""

from functools import cache
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from runner.config.loading import load
from runner.config.schema import Config
from runner.data.batches import pad
from runner.families import FAMILIES
from runner.models.wrappers import Actor, Fp32Linear, Scalar
from runner.rollout import hf
from runner.rollout.record import Rollout
from runner.rollout.sampling import uniforms

CONF = Path(__file__).resolve().parents[1] / "conf"

# Ids of the special tokens, and the size of the vocabulary
PAD, BOS, EOS, VOCAB = 0, 1, 2, 96

SHAPES = {
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 32,
    },
    "opt350m": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 16,
        "do_layer_norm_before": False,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    },
    "gpt_neox": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
}
NAMES = list(SHAPES)


def family(name: str) -> str:
    return "opt" if name.startswith("opt") else name


def config(name: str, vocab: int = VOCAB, **more):
    ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    return AutoConfig.for_model(family(name), vocab_size=vocab, **SHAPES[name], **ids, **more)


def no_dropout(name: str) -> dict[str, float]:
    return dict.fromkeys(FAMILIES[family(name)].dropouts, 0.0)


def sharpen(model: PreTrainedModel, seed: int = 0, scale: float = 0.2) -> PreTrainedModel:
    """Weights so large that every token and position matters: fresh ones give almost uniform probabilities."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def causal(name: str, seed: int = 0, scale: float = 0.2, **more) -> PreTrainedModel:
    return _random(AutoModelForCausalLM, name, seed, scale, **more)


def classifier(name: str, seed: int = 0, scale: float = 0.2, **more) -> PreTrainedModel:
    return _random(AutoModelForSequenceClassification, name, seed, scale, num_labels=1, **more)


def _random(auto, name: str, seed: int, scale: float, attention: str = "packed", **more) -> PreTrainedModel:
    torch.manual_seed(seed)
    made = auto.from_config(config(name, **no_dropout(name) | more), attn_implementation=attention)
    return sharpen(made, seed, scale)


def actor(name: str, seed: int = 0, chunk: int = 0, **sampling) -> Actor:
    return Actor(causal(name, seed), family(name), chunk, **sampling)


def scalar(name: str, seed: int = 0) -> Scalar:
    model = classifier(name, seed)
    weight = model.score.weight
    model.score = Fp32Linear(weight.size(1), 1, bias=False)
    model.score.weight = weight
    return Scalar(model, family(name))


def rows(lengths: list[int], seed: int = 0, low: int = 3, vocab: int = VOCAB) -> list[list[int]]:
    """Token lists of these lengths, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(low, vocab, (n,), generator=generator).tolist() for n in lengths]


def predictions(rows: list[list[int]], width: int, left: bool) -> tuple[Tensor, Tensor]:
    """Index and targets of all next-token predictions of rows that are padded to `width`, in the order of the rows."""
    index, targets = [], []
    for i, row in enumerate(rows):
        start = i * width + (width - len(row) if left else 0)
        index += [start + j for j in range(len(row) - 1)]
        targets += row[1:]
    return torch.tensor(index), torch.tensor(targets)


def generate(model, prompts: list[list[int]], episodes: list[int], *, length: int = 10, eos: int = EOS, seed: int = 7) -> Rollout:
    """Sampled responses of at most `length` tokens."""
    ids, mask = pad(prompts, PAD, left=True)
    return hf.generate(model, ids, mask.sum(1), uniforms(seed, episodes, length), pad=PAD, eos=eos)


def record(prompts: list[list[int]], answers: list[list[int]], eos: int = EOS) -> Rollout:
    """A rollout whose responses are given; one has ended when its last token is EOS."""
    ids, mask = pad(prompts, PAD, left=True)
    replies, real = pad(answers, PAD)
    made = Rollout(ids, mask.sum(1), replies, real.sum(1), torch.tensor([a[-1] == eos for a in answers]))
    made.sampled_logprobs = -1.5 * made.mask
    return made


@cache
def configured(*overrides: str) -> Config:
    """The checked configuration of `python run.py <overrides>`."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return load(compose("config", list(overrides)))
