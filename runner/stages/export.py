"""What a stage leaves in its folder: models in Hugging Face format."""

from collections.abc import Callable
from pathlib import Path

from runner import engine
from runner.config import Config, Lora
from runner.models import Wrapper, save_adapter, save_model


def export(cfg: Config, folder: Path, wrapper: Wrapper, tokenizer, lora: Lora, best: Callable[[], bool]) -> None:
    """Save the model, its adapters merged, to model/; the adapters alone to adapter/; and, last, the best checkpoint's to model_best/.

    best: gives the engine the weights of the best checkpoint, if that beats the end; says whether it did. Collective.
    """
    export_model(cfg, folder / "model", wrapper, tokenizer)
    if lora.dim:
        save_adapter(wrapper, folder / "adapter")
    if best():
        export_model(cfg, folder / "model_best", wrapper, tokenizer)


def export_model(cfg: Config, folder: Path, wrapper: Wrapper, tokenizer) -> None:
    """Save one model, with its tokenizer. Collective."""
    options = {"dtype": engine.DTYPES[cfg.hardware.precision], "max_new_tokens": cfg.model.max_response_tokens}
    save_model(wrapper, folder, tokenizer, **options)
