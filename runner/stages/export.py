"""What SFT, reward model and DPO leave in their folder: the model in Hugging Face format."""

from collections.abc import Callable
from pathlib import Path

from runner import engine
from runner.config import Config, Lora
from runner.models import Wrapper, save_adapter, save_model


def export(cfg: Config, folder: Path, wrapper: Wrapper, tokenizer, lora: Lora, best: Callable[[], bool]) -> None:
    """Save the model, its adapters merged, to model/; the adapters alone to adapter/; and, last, the best checkpoint's to model_best/.

    best: gives the engine the weights of the best checkpoint, if that beats the end; says whether it did. Collective.
    """
    options = {"dtype": engine.DTYPES[cfg.hardware.precision], "max_new_tokens": cfg.model.max_response_tokens}
    save_model(wrapper, folder / "model", tokenizer, **options)
    if lora.dim:
        save_adapter(wrapper, folder / "adapter")
    if best():
        save_model(wrapper, folder / "model_best", tokenizer, **options)
