"""The keys of the learning rates: which of them an engine of a stage trains at, and what they say."""

from collections.abc import Iterable
from operator import attrgetter

from runner.config.schema import ENGINES, PARTS, Config


def rate_key(stage: str, engine: str) -> str:
    """The key of an engine's learning rate."""
    return f"{stage}.{engine}_lr" if stage == "ppo" else f"{stage}.lr"


def lora_rate_key(stage: str, engine: str) -> str:
    """The key of the learning rate of an engine's adapters."""
    return f"{stage}.{engine}_lora_lr" if stage == "ppo" else f"{stage}.lora_lr"


def typed_rates(cfg: Config, keys: Iterable[str], share: float = 1.0) -> list[str]:
    """Overrides that set these learning rates to a share of what they are."""
    return [f"{key}={share * attrgetter(key)(cfg):g}" for key in keys]


def lower_rate(cfg: Config, stage: str) -> str:
    """Overrides for a tenth of the learning rate; the adapters' where only they train."""
    keys = []
    for engine in ENGINES[stage]:
        if getattr(cfg.model, PARTS[engine]).lora.dim:
            keys.append(lora_rate_key(stage, engine))
        if engine == "critic" or not cfg.model.actor.adapters_only:  # a scalar head always trains in full
            keys.append(rate_key(stage, engine))
    return " ".join(typed_rates(cfg, keys, 0.1))
