"""Models: the actor and the scalar model (reward model, critic), LoRA, loading and saving.

Both wrappers take token ids with an attention mask, padded on either side or not at all, best on the CPU: there they are packed, so that
the model computes no padding (runner/packing.py). Positions follow from the mask and are passed explicitly. Outputs are fp32. Saved
folders are plain Hugging Face checkpoints in safetensors.
"""

from collections.abc import Iterator, Set
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig, PreTrainedModel

from runner import attention, packing, ranks
from runner.checks.trust import has_weights, refuse_code, refused_pickle
from runner.config import Lora
from runner.data.batches import send
from runner.errors import UserError, did_you_mean
from runner.families import FAMILIES, Family, check_family
from runner.files import whole_folder
from runner.losses import bar_unused, chosen_logprobs, entropy, token_logprobs, warp_logits, without_token

# --- the two wrappers -------------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """A Hugging Face model whose hidden states we read, with or without peft around it."""

    def __init__(self, model: nn.Module, family: str):
        super().__init__()
        self.model = model
        self.family = FAMILIES[family]
        attention.adopt(self.hf)

    @property
    def hf(self) -> PreTrainedModel:
        """The Hugging Face model itself, adapters included."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    @property
    def packed(self) -> bool:
        """Whether forward passes leave the padding out (runner/packing.py)."""
        return attention.is_packed(self.hf)

    def hidden_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Hidden states of the N real tokens, row after row, after the last layer norm. (B, T) -> (N, H)."""
        device = self.hf.device
        if self.packed:
            return attention.body(self.hf.base_model, packing.lay_out(ids, mask).to(device))
        real = send(packing.real(mask), device)
        positions = {"position_ids": send(packing.positions_from_mask(mask), device)} if self.family.position_ids else {}
        ids, mask = send(ids, device), send(mask, device)
        hidden = self.hf.base_model(input_ids=ids, attention_mask=mask, use_cache=False, **positions).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, real)

    @contextmanager
    def without_adapter(self):
        """The model as it was before its adapters were trained: a reference without a second copy."""
        with self.model.disable_adapter():
            yield self


class Actor(Wrapper):
    """A causal language model that returns log-probabilities of chosen tokens, never the logits of a whole batch.

    What responses are sampled from, and their log-probabilities belong to: temperature, top_k, top_p;
    least: tokens of a response before which EOS is impossible;
    vocabulary: tokens of the tokenizer, where the embeddings may have more rows; None if every row is a token.
    chunk: tokens whose logits exist at a time; 0 for all at once, which ZeRO-3 needs: every rank must gather the head the same
    number of times.
    """

    def __init__(
        self,
        model: nn.Module,
        family: str,
        chunk: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        least: int = 0,
        vocabulary: int | None = None,
    ):
        super().__init__(model, family)
        self.chunk, self.least = chunk, least
        self.sampling, self.vocabulary = (temperature, top_k, top_p), vocabulary

    def forward(
        self, ids: Tensor, mask: Tensor, index: Tensor, targets: Tensor, with_entropy: bool = False, steps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of given next tokens.

        Args:
            ids, mask (B, T).
            index (N,): positions in the flattened (B * T) whose next token is predicted; targets (N,): those next tokens.
            steps (N,): their positions in the response, from 0, which decide where EOS is impossible. None for text that was not
                sampled: temperature and the like have no part in its log-probabilities.
        Returns: logprobs (N,), entropies (N,) without gradient, zeros unless asked for.
        """
        hidden = self.hidden_states(ids, mask)
        index, targets = send(packing.among_real(mask, index), hidden.device), send(targets, hidden.device)
        hidden = hidden.index_select(0, index)
        given = [hidden, targets]
        if self.least > 1 and steps is not None:
            given.append(send(steps + 1 < self.least, hidden.device))
        score = partial(self._score, with_entropy, steps is not None)
        if not self.chunk or len(index) <= self.chunk:
            return score(*given)
        # Recomputing the logits of a chunk in the backward pass keeps one chunk in memory instead of N x V
        run = partial(checkpoint, score, use_reentrant=False) if torch.is_grad_enabled() else score
        parts = [run(*chunk) for chunk in zip(*(x.split(self.chunk) for x in given), strict=True)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _score(
        self, with_entropy: bool, sampled: bool, hidden: Tensor, targets: Tensor, early: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (N,) from hidden states (N, H). early (N,) bool: where EOS is impossible."""
        logits = self.hf.get_output_embeddings()(hidden)
        if sampled:
            bar_unused(logits, self.vocabulary)
        if not sampled or (self.sampling == (1.0, 0, 1.0) and early is None):
            return chosen_logprobs(logits, targets, with_entropy)
        logits = logits.float()
        if early is not None:
            logits = without_token(logits, self.hf.config.eos_token_id, early)
        logits = warp_logits(logits, *self.sampling, keep=targets)
        with torch.no_grad():
            entropies = entropy(logits) if with_entropy else torch.zeros_like(targets, dtype=torch.float32)
        return token_logprobs(logits, targets), entropies


class Scalar(Wrapper):
    """A sequence classifier with one label, read at every position: reward model and critic."""

    mean, std = 0.0, 1.0

    def normalise(self, mean: float, std: float) -> None:
        """Output standard deviations from a mean: a critic that starts as the reward model then starts in the units of the rewards
        that it must predict."""
        self.mean, self.std = mean, std

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, T) -> (B, T) fp32, 0 on padding."""
        values = self.hf.score(self.hidden_states(ids, mask)).squeeze(-1)
        return packing.spread((values - self.mean) / self.std, mask)


class Fp32Linear(nn.Linear):
    """The scalar head: weights as stored, arithmetic in fp32, because values differ by less than bf16 can resolve."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float())


# --- loading ----------------------------------------------------------------------------------------------------------


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


def add_lora(model: PreTrainedModel, lora: Lora) -> nn.Module:
    """Adapters through peft. A scalar head stays trainable, in full."""
    from peft import LoraConfig, get_peft_model

    targets = list(lora.targets) or list(FAMILIES[model.config.model_type].lora_targets)
    tokens = model.get_input_embeddings()
    layers = [name for name, m in model.named_modules() if (isinstance(m, nn.Linear) or m is tokens) and name != "score"]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            known = sorted({name.rsplit(".", 1)[-1] for name in layers})
            near = did_you_mean(target, known)
            raise UserError(f"lora.targets: {target} is no layer of {model.config.model_type}{near}. Take some of {', '.join(known)}")
    heads = ["score"] if hasattr(model, "score") else None
    config = LoraConfig(r=lora.dim, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, modules_to_save=heads)
    # Adapters in the model's precision, not in fp32: the optimizer keeps an fp32 copy, and ZeRO-3 refuses mixed precisions
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
    if lora.train_rest:
        for name, parameter in peft_model.named_parameters():
            # The matrices under the adapters stay frozen; so does the original that peft keeps of a fully trained head
            parameter.requires_grad_(not name.endswith(".base_layer.weight") and "original_module" not in name)
    return peft_model


def parameter_groups(model: nn.Module, lr: float, lora_lr: float, weight_decay: float) -> list[dict]:
    """AdamW groups: weight decay on matrices, none on vectors; adapters have their own learning rate. The schedule scales `peak_lr`."""
    groups: dict[tuple[bool, bool], list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Under ZeRO-3 the local piece is flat; ds_shape is the true shape
            decays = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
            groups.setdefault(("lora_" in name, decays), []).append(parameter)
    options = []
    for (adapter, decays), parameters in groups.items():
        rate = lora_lr if adapter else lr
        options.append({"params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": weight_decay if decays else 0.0})
    return options


# --- saving -----------------------------------------------------------------------------------------------------------


@contextmanager
def gathered(parameters: list, modify: bool = False) -> Iterator[bool]:
    """Whole parameters inside the block, also under ZeRO-3; there it yields True on rank 0 only, which alone may write (modify)."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        yield True
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if modify else None):
        yield ranks.rank() == 0


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
            tokenizer.save_pretrained(work)
    ranks.barrier()


def save_adapter(wrapper: Wrapper, folder: Path, tokenizer) -> None:
    """Write the adapters alone, in peft's format, and the tokenizer. Collective."""
    wanted = {n: p for n, p in wrapper.model.named_parameters() if "lora_" in n or "modules_to_save" in n}
    with gathered(list(wanted.values())):
        if ranks.rank() == 0:
            config = wrapper.model.peft_config["default"]
            # Only now: peft would otherwise wrap the model in a class for that task
            config.task_type = "CAUSAL_LM" if isinstance(wrapper, Actor) else "SEQ_CLS"
            # Where peft finds it from any folder
            if Path(config.base_model_name_or_path).is_dir():
                config.base_model_name_or_path = str(Path(config.base_model_name_or_path).absolute())
            with whole_folder(folder) as work:
                tokenizer.save_pretrained(work)
                wrapper.model.save_pretrained(work, state_dict={n: p.detach().clone() for n, p in wanted.items()})
