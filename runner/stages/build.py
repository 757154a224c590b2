"""From the config to loaded models: what all stages build in the same way."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from runner import engine as engines
from runner import ranks
from runner.batch_sizes import micro_positions, step_batch
from runner.checks.paths import is_local
from runner.config.schema import Config, Lora, ModelPart
from runner.data.batches import Batches
from runner.models.loading import load_causal, load_scalar
from runner.models.lora import add_lora
from runner.models.tokenizer import load_tokenizer
from runner.models.wrappers import Actor, Scalar


@dataclass(frozen=True)
class Inputs:
    """What a stage gets to read, from step.json."""

    folder: Path
    stage: str
    key: str
    parents: dict[str, str]  # stage -> model folder or hub id
    tokenizer: str
    base: str | None  # initial weights of SFT and reward model
    data: str  # cache folder of the tokenised data
    ptx: str | None  # cache folder of the ptx mixture


def batches_for(cfg: Config, stage: str, lengths: np.ndarray, packed: bool) -> Batches:
    """This rank's micro batches of every optimizer step. lengths: of the rows; packed: see Wrapper.pads_nothing."""
    ranked = {"world": ranks.world(), "rank": ranks.rank(), "seed": cfg.seed}
    return Batches(lengths, step_batch(cfg, stage), micro_positions(cfg, stage), packed=packed, **ranked)


def tokenizer_for(cfg: Config, part: ModelPart, path: str):
    """The tokenizer of `part`, actor or reward model, as the launcher has found it at `path`."""
    return load_tokenizer(
        path,
        revision=_revision(part, path),
        end_token=cfg.model.end_token,
        chat_template=cfg.model.chat_template,
        trust_remote_code=cfg.model.trust_remote_code,
    )


def load_actor(
    cfg: Config,
    path: str,
    tokenizer,
    ds_config: dict,
    *,
    dropout: float | None,
    lora: Lora | None,
    checkpointing: bool = False,
    sampling: dict | None = None,
) -> Actor:
    """A causal language model in its wrapper. sampling: PPO's temperature, top_k and so on (see Actor); None for the plain softmax."""
    with engines.building(ds_config):
        model = load_causal(path, tokenizer, **_options(cfg, cfg.model.actor, path, dropout))
    # Under ZeRO-3 all ranks gather the head together, so each must call it the same number of times
    chunk = 0 if ds_config.get("zero_optimization", {}).get("stage") == 3 else cfg.hardware.logits_chunk
    return Actor(_finish(model, lora, checkpointing), model.config.model_type, chunk, **(sampling or {}))


def load_reference(
    cfg: Config, path: str, tokenizer, ds_config: dict, device: torch.device, sampling: dict | None = None
) -> torch.nn.Module | None:
    """A frozen copy of the actor as it starts. None where the actor with its adapters off serves as one; see engine.reference."""
    if cfg.model.actor.adapters_only:
        return None
    ref = load_actor(cfg, path, tokenizer, ds_config, dropout=0.0, lora=None, sampling=sampling)
    return engines.frozen(ref, ds_config, device)


def load_reward(
    cfg: Config,
    path: str,
    tokenizer,
    ds_config: dict,
    *,
    dropout: float | None,
    lora: Lora | None,
    fresh_head: bool,
    checkpointing: bool = False,
) -> Scalar:
    """A one-label classifier in its wrapper: reward model or critic."""
    with engines.building(ds_config):
        model = load_scalar(path, tokenizer, fresh_head=fresh_head, **_options(cfg, cfg.model.reward, path, dropout))
    return Scalar(_finish(model, lora, checkpointing), model.config.model_type)


def _options(cfg: Config, part: ModelPart, path: str, dropout: float | None) -> dict:
    revision = _revision(part, path)
    if not is_local(path):
        _download_once(path, revision)
    return {
        "revision": revision,
        "dtype": engines.DTYPES[cfg.hardware.precision],
        "attention": cfg.model.attention,
        "dropout": dropout,
        "seed": cfg.seed,
        "trust_remote_code": cfg.model.trust_remote_code,
    }


def _revision(part: ModelPart, path: str) -> str | None:
    """The configured revision belongs to the configured path; a checkpoint that was given instead has none."""
    return part.revision if path == part.path else None


def _download_once(path: str, revision: str | None) -> None:
    """One process per machine downloads a hub model; the others find it in the cache. Pickles only if there is nothing else."""
    if os.environ["LOCAL_RANK"] == "0":
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(path, revision=revision, allow_patterns=["*.safetensors", "*.json"]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(path, revision=revision, allow_patterns=["*.bin"])
    ranks.barrier()


def _finish(model, lora: Lora | None, checkpointing: bool):
    if lora and lora.dim:
        model = add_lora(model, lora)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model
