"""What the code must know about each family of models, in one table. No torch: the launcher reads it too."""

from collections.abc import Collection
from dataclasses import dataclass

from runner.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Family:
    """One row of the table."""

    attention: tuple[str, ...]  # implementations: ours (runner/models/attention.py) first, then those of transformers
    position_ids: bool  # False: takes none (ALiBi)
    lora_targets: tuple[str, ...]  # linear layers that get adapters
    other_layers: tuple[str, ...]  # what else can get them, if it is named
    dropouts: tuple[str, ...]  # config fields that hold a dropout probability
    kept: tuple[float, float]  # activations a layer keeps per token for its backward pass: vectors of the hidden size, and of the MLP's
    pads: tuple[str, ...]  # padding tokens of its checkpoints, used where PAD is missing or is EOS
    tied: bool  # the head is the embedding table, unless config.json says otherwise


FAMILIES = {
    "opt": Family(
        ("packed", "sdpa", "eager", "flash_attention_2"),
        True,
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        ("embed_tokens", "project_in", "project_out", "lm_head"),
        ("dropout", "attention_dropout", "activation_dropout"),
        (8, 1),
        ("<pad>",),
        True,
    ),
    "bloom": Family(
        ("packed", "eager"),
        False,
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        ("word_embeddings", "lm_head"),
        ("hidden_dropout", "attention_dropout"),
        (8, 2),
        ("<pad>",),
        True,
    ),
    "llama": Family(
        ("packed", "sdpa", "eager", "flash_attention_2"),
        True,
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        ("embed_tokens", "lm_head"),
        ("attention_dropout",),
        (12, 4),
        ("<pad>", "<|finetune_right_pad_id|>"),
        False,
    ),
    "gpt_neox": Family(
        ("packed", "sdpa", "eager", "flash_attention_2"),
        True,
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        ("embed_in", "lm_head"),
        ("attention_dropout", "hidden_dropout"),
        (10, 2),
        ("<|padding|>",),
        False,
    ),
}


def no_layer(target: str, family: str, layers: Collection[str]) -> str:
    """The message for a layer that is to get adapters and that a model does not have."""
    known = sorted(layers)
    return f"lora.targets: {target} is no layer of {family}{did_you_mean(target, known)}. Take some of {', '.join(known)}"


def check_family(where: str, found: str | None) -> None:
    """Raise UserError for the `model_type` of a checkpoint, named by `where`, that is not in the table."""
    if found not in FAMILIES:
        raise UserError(f"{where} is a model of the family {found or '(none)'}, which is not supported: families are {', '.join(FAMILIES)}")


def check_same_family(where: str, found: str, preset: str, family: str) -> None:
    """Raise UserError for the `model_type` of a checkpoint, named by `where`, that is not the preset's family."""
    if found != family:
        raise UserError(
            f"{where} is a model of the family {found}, but model={preset} is of {family}: pick a preset of the family {found}, or "
            f"a checkpoint of {family}"
        )
