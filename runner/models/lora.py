"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft."""

from torch import nn
from transformers import PreTrainedModel

from runner.config.schema import Lora
from runner.errors import UserError
from runner.families import FAMILIES, no_layer


def add_lora(model: PreTrainedModel, lora: Lora) -> nn.Module:
    """Adapters through peft. A scalar head stays trainable, in full."""
    from peft import LoraConfig, get_peft_model

    targets = list(lora.targets) or list(FAMILIES[model.config.model_type].lora_targets)
    tokens = model.get_input_embeddings()
    layers = [name for name, m in model.named_modules() if (isinstance(m, nn.Linear) or m is tokens) and name != "score"]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            raise UserError(no_layer(target, model.config.model_type, {name.rsplit(".", 1)[-1] for name in layers}))
    heads = ["score"] if hasattr(model, "score") else None
    config = LoraConfig(r=lora.dim, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, modules_to_save=heads)
    # Adapters in the model's precision, not in fp32: the optimizer keeps an fp32 copy, and ZeRO-3 refuses mixed precisions
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
    if lora.train_rest:
        for name, parameter in peft_model.named_parameters():
            # The matrices under the adapters stay frozen; so does the original that peft keeps of a fully trained head
            parameter.requires_grad_(not name.endswith(".base_layer.weight") and "original_module" not in name)
    return peft_model
