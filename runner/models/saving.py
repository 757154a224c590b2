"""Models as plain Hugging Face checkpoints in safetensors, adapters merged; adapters alone in peft's format."""

from copy import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from runner import ranks
from runner.checks.trust import has_weights
from runner.files import whole_folder
from runner.models.wrappers import Actor, Wrapper
from runner.models.zero3 import gathered


def full_state_dict(wrapper: Wrapper, dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights of the Hugging Face model on the CPU of rank 0, adapters merged; empty on other ranks. Collective."""
    rank = ranks.rank()
    state, copies = {}, {}
    for name, module in wrapper.hf.named_modules():
        own = dict(module.named_parameters(recurse=False)) | dict(_persistent_buffers(module))
        adapter = list(module.parameters()) if _is_lora_layer(module) else []
        if not (own or adapter) or _inside_adapter(name):
            continue
        with gathered(adapter or list(own.values())), torch.no_grad():
            if rank == 0 and adapter:
                state |= _merged(name, module, dtype)
            elif rank == 0:
                for key, tensor in own.items():
                    # Tied weights stay one tensor, so that they are written once
                    if id(tensor) not in copies:
                        copies[id(tensor)] = tensor.detach().to("cpu", dtype, copy=True)
                    state[_plain_name(f"{name}.{key}" if name else key)] = copies[id(tensor)]
    return state


def _persistent_buffers(module: nn.Module):
    return [(n, b) for n, b in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set and b.is_floating_point()]


def _is_lora_layer(module: nn.Module) -> bool:
    return hasattr(module, "get_delta_weight") and hasattr(module, "base_layer")


def _inside_adapter(name: str) -> bool:
    return ".base_layer" in name or ".lora_" in name or ".original_module" in name


def _plain_name(name: str) -> str:
    return name.replace(".modules_to_save.default", "").replace(".base_layer", "")


def _merged(name: str, module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """W + scale * B A as a new tensor: merging in place could not be undone exactly in bf16."""
    base = module.base_layer
    weight = base.weight.float() + module.get_delta_weight("default").float()
    state = {f"{name}.weight": weight.to("cpu", dtype)}
    if getattr(base, "bias", None) is not None:  # an embedding has none
        state[f"{name}.bias"] = base.bias.detach().to("cpu", dtype, copy=True)
    return state


def save_model(wrapper: Wrapper, folder: Path, tokenizer, *, dtype: torch.dtype, max_new_tokens: int, extra: dict | None = None) -> None:
    """Write a Hugging Face checkpoint: safetensors, config, tokenizer with chat template, generation config. Collective.

    The folder is complete or absent.

    extra: facts for config.json, such as the units of a critic's values.
    """
    state = full_state_dict(wrapper, dtype)
    if ranks.rank() == 0:
        hf = wrapper.hf
        for key, value in (extra or {}).items():
            setattr(hf.config, key, value)
        hf.config.dtype = dtype
        if any(map(_is_lora_layer, filter(None, (hf.get_input_embeddings(), hf.get_output_embeddings())))):
            hf.config.tie_word_embeddings = False  # merged, the two matrices are no longer one
        if isinstance(wrapper, Actor):
            ids = {k: getattr(tokenizer, k) for k in ("pad_token_id", "eos_token_id", "bos_token_id")}
            hf.generation_config = GenerationConfig(**ids, max_new_tokens=max_new_tokens)
        with whole_folder(folder) as work:
            # Under ZeRO-3 transformers would save the empty local pieces: it must use the state dict
            hf.save_pretrained(work, state_dict=state)
            _save_tokenizer(tokenizer, wrapper, work)
    ranks.barrier()


def _save_tokenizer(tokenizer, wrapper: Wrapper, folder: Path) -> None:
    """Actors generate, so their prompts are padded on the left."""
    saved = copy(tokenizer)
    saved.padding_side = "left" if isinstance(wrapper, Actor) else "right"
    # transformers saves only what is named here
    saved.init_kwargs = tokenizer.init_kwargs | {"padding_side": saved.padding_side}
    saved.save_pretrained(folder)


# Task of an adapter -> what loads its base
AUTO = {"CAUSAL_LM": ("AutoModelForCausalLM", ""), "SEQ_CLS": ("AutoModelForSequenceClassification", ", num_labels=1")}
# The README.md of an adapter/: peft's own is a form to fill in
HOW_TO_LOAD = """\
Adapters for `{base}`. `../model` holds both in one, and is all that can be used after training with `lora.train_rest=true`.

```python
from peft import PeftModel
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({folder!r})
model = {auto}.from_pretrained({base!r}{more})
model.config.pad_token_id = tokenizer.pad_token_id
if len(tokenizer) > model.get_input_embeddings().num_embeddings:
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
model = PeftModel.from_pretrained(model, {folder!r})
```
"""
# The same where there is no base to load
NO_BASE = "Adapters on random weights, which are kept nowhere else: only `../model`, which holds both in one, can be used.\n"


def save_adapter(wrapper: Wrapper, folder: Path, tokenizer) -> None:
    """Write the adapters alone, in peft's format, the tokenizer, and how to load them. Collective."""
    wanted = {n: p for n, p in wrapper.model.named_parameters() if "lora_" in n or "modules_to_save" in n}
    with gathered(list(wanted.values())):
        if ranks.rank() == 0:
            config = wrapper.model.peft_config["default"]
            # Only now: peft would otherwise wrap the model in a class for that task
            config.task_type = "CAUSAL_LM" if isinstance(wrapper, Actor) else "SEQ_CLS"
            # Where peft finds it from any folder
            base = Path(config.base_model_name_or_path)
            if base.is_dir():
                config.base_model_name_or_path = str(base.absolute())
            with whole_folder(folder) as work:
                _save_tokenizer(tokenizer, wrapper, work)
                wrapper.model.save_pretrained(work, state_dict={n: p.detach().clone() for n, p in wanted.items()})
                auto, more = AUTO[config.task_type]
                text = HOW_TO_LOAD.format(auto=auto, more=more, base=config.base_model_name_or_path, folder=str(folder.absolute()))
                (work / "README.md").write_text(NO_BASE if base.is_dir() and not has_weights(base) else text, encoding="utf-8")
