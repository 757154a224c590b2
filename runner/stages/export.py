"""What a stage leaves in its folder: the model in Hugging Face format."""

from collections.abc import Callable
from pathlib import Path

from runner import engine
from runner.config.schema import Config, Lora
from runner.models.saving import save_adapter, save_model
from runner.models.wrappers import Wrapper


def export(cfg: Config, folder: Path, wrapper: Wrapper, tokenizer, lora: Lora, best: Callable[[], bool]) -> None:
    """Save the model, its adapters merged, to model/; the adapters alone to adapter/; and, last, the best checkpoint's to model_best/.

    best: loads the best checkpoint into the engine if it beats the final weights, and returns whether it did. Collective.
    """
    options = export_options(cfg)
    save_model(wrapper, folder / "model", tokenizer, **options)
    if lora.dim:
        save_adapter(wrapper, folder / "adapter", tokenizer)
    if best():
        save_model(wrapper, folder / "model_best", tokenizer, **options)


def export_options(cfg: Config) -> dict:
    """What save_model needs from the configuration."""
    return {"dtype": engine.DTYPES[cfg.hardware.precision], "max_new_tokens": cfg.model.max_response_tokens}
