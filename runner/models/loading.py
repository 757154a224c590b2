"""Hugging Face checkpoints, and random weights of a given shape, as models whose embeddings hold the tokenizer's tokens."""

from collections.abc import Set
from pathlib import Path
from pickle import UnpicklingError

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig, PreTrainedModel

from runner.checks.trust import has_weights, refuse_code, refused_pickle
from runner.errors import UserError
from runner.families import FAMILIES, Family, check_family
from runner.models.wrappers import Fp32Linear
from runner.models.zero3 import gathered


def load_causal(path: str, tokenizer, **options) -> PreTrainedModel:
    """A causal language model from a checkpoint, or with random weights where the folder holds only a config."""
    model = _load(AutoModelForCausalLM, path, **options)
    _fit_tokenizer(model, tokenizer)
    # A checkpoint's own sampling settings must not leak into rollouts
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    return model


def load_scalar(path: str, tokenizer, *, fresh_head: bool, seed: int, **options) -> PreTrainedModel:
    """A one-label classifier. fresh_head: a language model, which has no head, gets one; a reward model keeps its own."""
    model = _load(AutoModelForSequenceClassification, path, fresh_head=fresh_head, num_labels=1, seed=seed, **options)
    _fit_tokenizer(model, tokenizer)
    score = model.score
    model.score = Fp32Linear(score.in_features, 1, bias=False, device="meta")
    model.score.weight = score.weight
    if fresh_head and not _is_classifier(model.config):
        generator = torch.Generator(device=score.weight.device).manual_seed(seed)
        with gathered([score.weight], modify=True) as rank0:
            if rank0:
                score.weight.data.normal_(0.0, (score.in_features + 1) ** -0.5, generator=generator)  # arXiv 2403.17031, detail 11
    return model


def _is_classifier(config) -> bool:
    """Whether the checkpoint was one: transformers leaves its architectures in the config until it is saved again."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def _load(
    auto,
    path: str,
    *,
    dtype,
    attention: str,
    dropout: float | None,
    fresh_head: bool = False,
    seed: int = 0,
    revision=None,
    trust_remote_code=False,
    **more,
):
    """fresh_head: a checkpoint that is no classifier need not have a head."""
    if not trust_remote_code:
        refuse_code(path, revision)
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code, **more)
    family = family_of(config, path)
    if dropout is not None:
        for name in family.dropouts:
            setattr(config, name, dropout)
    # OPT can skip layers at random, different ones on each rank: the reduction of gradients would hang
    config.layerdrop = 0.0
    if config.model_type == "bloom":
        config.slow_but_exact = False  # that path of transformers leaves biases out
    if attention == "auto":
        attention = family.attention[0]
    elif attention not in family.attention:
        raise UserError(f"model.attention={attention} does not exist for {config.model_type}: type one of {', '.join(family.attention)}")
    options = {"dtype": dtype, "attn_implementation": attention, "trust_remote_code": trust_remote_code}
    if Path(path).is_dir() and not has_weights(Path(path)):
        dropouts = torch.initial_seed()  # of this rank; the weights are the same on all
        torch.manual_seed(seed)
        model = auto.from_config(config, **options)
        torch.manual_seed(dropouts)
        return model
    made_up = {"score.weight"} if fresh_head and not _is_classifier(config) else set()
    return load_weights(auto, path, revision, made_up, config=config, **options)


def load_weights(auto, path: str, revision: str | None = None, made_up: Set[str] = frozenset(), **options):
    """The model of a checkpoint, by the transformers class `auto`. made_up: weights that the checkpoint need not have.

    Raises UserError for pickles that hold code, and for weights that are missing or have other sizes: transformers makes those up, with a
    warning that nobody reads.
    """
    try:
        model, report = auto.from_pretrained(path, revision=revision, output_loading_info=True, **options)
    except UnpicklingError as error:
        raise refused_pickle(path, revision) from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise UserError(
            f"the weights in {path} do not have the sizes that its config.json says: the files belong to different models"
        ) from error
    if missing := sorted(set(report["missing_keys"]) - made_up):
        raise UserError(f"{path} lacks {len(missing)} of the weights that its config.json asks for, such as {missing[0]}: copy it again")
    return model


def family_of(config, path: str) -> Family:
    check_family(path, config.model_type)
    return FAMILIES[config.model_type]


def _fit_tokenizer(model: PreTrainedModel, tokenizer) -> None:
    """Make the embeddings large enough for all tokens, and take PAD, EOS and BOS from the tokenizer."""
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
        # New rows are the mean of the old ones, not random: actor and reference stay identical, and new tokens unlikely
        for table in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
            with gathered([table.weight], modify=True) as writes, torch.no_grad():
                if writes:
                    table.weight[known:] = table.weight[:known].float().mean(dim=0).to(table.weight.dtype)
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))
