"""The configuration: every key with its type, its limits, and the door through which composed YAML becomes objects.

Values and their explanations live in conf/ and nowhere else; here a field has a type and no default. `load` is the only
way in, for the launcher and for the workers, so that a wrong key, type or value dies before anything is started.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from runner.errors import UserError

STAGES = ("sft", "reward", "ppo")
FAMILIES = ("opt", "bloom", "llama", "gpt_neox")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


def check(ok: bool, message: str) -> None:
    """Raise ValueError(message) unless ok; `load` turns it into a UserError."""
    if not ok:
        raise ValueError(message)


def check_choice(where: str, value: object, choices: tuple) -> None:
    check(value in choices, f"{where}={value} is not one of {', '.join(map(str, choices))}")


# --- model ------------------------------------------------------------------------------------------------------------


@dataclass
class Lora:
    dim: int
    alpha: float
    dropout: float
    lr: float
    targets: List[str]
    train_rest: bool

    def __post_init__(self):
        check(self.dim >= 0, f"lora.dim={self.dim} must be 0 (off) or more")
        check(0 <= self.dropout < 1, f"lora.dropout={self.dropout} must be in [0, 1)")


@dataclass
class ModelPart:
    """Where the weights of the actor, or of the reward model and critic, come from."""

    path: str
    revision: Optional[str]
    init: str
    shape: Dict[str, Any]
    lora: Lora

    def __post_init__(self):
        check_choice("init", self.init, ("pretrained", "random"))
        check(self.init == "pretrained" or bool(self.shape), "init=random needs a shape: the sizes of the network")


@dataclass
class SizeRecipe:
    """Hyper-parameters that go with the size of a network; conf/stage reads them by interpolation."""

    sft_lr: float
    sft_batch: int
    reward_lr: float
    reward_batch: int
    actor_lr: float
    critic_lr: float
    rollout_batch: int


@dataclass
class Model:
    name: str
    family: str
    actor: ModelPart
    reward: ModelPart
    tokenizer_vocab: int
    end_token: Optional[str]
    chat_template: str
    max_prompt_tokens: int
    max_response_tokens: int
    attention: str
    trust_remote_code: bool
    recipe: SizeRecipe

    def __post_init__(self):
        check_choice("model.family", self.family, FAMILIES)
        check_choice("model.attention", self.attention, ("auto", "eager", "sdpa", "flash_attention_2"))
        check(self.max_prompt_tokens >= 1, f"model.max_prompt_tokens={self.max_prompt_tokens} must be at least 1")
        check(self.max_response_tokens >= 2, f"model.max_response_tokens={self.max_response_tokens} must be at least 2: a token and EOS")
        context = self.actor.shape.get("max_position_embeddings")
        wanted = self.max_prompt_tokens + self.max_response_tokens
        check(
            context is None or wanted <= context,
            f"model.max_prompt_tokens={self.max_prompt_tokens} + model.max_response_tokens={self.max_response_tokens} = {wanted} "
            f"is longer than the {context} positions of {self.actor.path}: lower one of them",
        )


# --- data -------------------------------------------------------------------------------------------------------------


@dataclass
class Source:
    path: str
    adapter: str
    subset: Optional[str]
    revision: Optional[str]
    split: str
    fields: Dict[str, str]
    weight: float
    sft_only: bool

    def __post_init__(self):
        check(self.weight > 0, f"weight={self.weight} of {self.path} must be above 0; leave the source out instead")


@dataclass
class PhaseSplit:
    sft: float
    reward: float
    ppo: float

    def __post_init__(self):
        shares = (self.sft, self.reward, self.ppo)
        check(min(shares) >= 0 and sum(shares) > 0, f"dataset.split={shares}: shares must be 0 or more, and one above 0")


@dataclass
class Dataset:
    name: str
    sources: Dict[str, Source]
    sft_only: List[str]
    pretrain: List[str]
    split: PhaseSplit
    holdout: float
    on_bad_row: str
    max_rows: Optional[int]
    toy_rows: int
    path: Optional[str] = None
    fields: Dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        check_choice("dataset.on_bad_row", self.on_bad_row, ("error", "skip"))
        check(0 < self.holdout < 1, f"dataset.holdout={self.holdout} must be between 0 and 1: it is the share kept for evaluation")
        check(bool(self.sources), "dataset.sources is empty: name at least one source of prompts")
        check(self.max_rows is None or self.max_rows > 0, f"dataset.max_rows={self.max_rows} must be null or above 0")


# --- hardware ---------------------------------------------------------------------------------------------------------


@dataclass
class ZeroStages:
    actor: int
    critic: int
    ref: int
    reward: int

    def __post_init__(self):
        for engine in ("actor", "critic"):
            check_choice(f"hardware.zero.{engine}", getattr(self, engine), (0, 1, 2, 3))
        for engine in ("ref", "reward"):
            stage = getattr(self, engine)
            check(stage in (0, 3), f"hardware.zero.{engine}={stage}: a frozen model is replicated (0) or partitioned (3)")


@dataclass
class Offload:
    optimizer: bool
    params: bool
    ref: bool
    reward: bool


@dataclass
class MicroBatch:
    sft: int
    reward: int
    ppo: int
    rollout: int
    score: int

    def __post_init__(self):
        for f in fields(self):
            check(getattr(self, f.name) >= 1, f"hardware.micro_batch.{f.name}={getattr(self, f.name)} must be at least 1")


@dataclass
class GradientCheckpointing:
    actor: bool
    critic: bool


@dataclass
class Hardware:
    name: str
    accelerator: str
    nodes: int
    gpus: int
    memory_gb: float
    tflops: float
    price_per_hour: float
    launch: str
    hostfile: str
    precision: str
    zero: ZeroStages
    offload: Offload
    micro_batch: MicroBatch
    gradient_checkpointing: GradientCheckpointing
    logits_chunk: int
    deepspeed: Dict[str, Any]

    def __post_init__(self):
        check_choice("hardware.accelerator", self.accelerator, ("cpu", "cuda"))
        check_choice("hardware.precision", self.precision, ("fp32", "bf16", "fp16"))
        check(self.accelerator == "cuda" or self.precision != "fp16", "hardware.precision=fp16 does not run on a CPU: use fp32 or bf16")
        check(self.nodes >= 1 and self.gpus >= 1, f"hardware.nodes={self.nodes} and hardware.gpus={self.gpus} must be at least 1")
        check(
            not self.offload.optimizer or min(self.zero.actor, self.zero.critic) > 0,
            "hardware.offload.optimizer=true needs hardware.zero.actor and hardware.zero.critic of 1 or more: ZeRO does the offloading",
        )
        check(
            not self.offload.params or self.zero.actor == 3,
            f"hardware.offload.params=true needs hardware.zero.actor=3, not {self.zero.actor}: only ZeRO-3 partitions parameters",
        )
        for engine in ("ref", "reward"):
            check(
                not getattr(self.offload, engine) or getattr(self.zero, engine) == 3,
                f"hardware.offload.{engine}=true needs hardware.zero.{engine}=3: only ZeRO-3 moves parameters to the CPU",
            )

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus


# --- stages -----------------------------------------------------------------------------------------------------------


def check_optimizer(stage) -> None:
    """Limits that the optimizer settings of all stages share."""
    where = type(stage).__name__.lower()
    check_choice(f"{where}.lr_schedule", stage.lr_schedule, SCHEDULES)
    check(stage.warmup >= 0, f"{where}.warmup={stage.warmup} must be 0 or more: steps, or below 1 a share of the run")
    check(stage.grad_clip > 0, f"{where}.grad_clip={stage.grad_clip} must be above 0 (1e9 for none)")
    check(stage.epochs > 0, f"{where}.epochs={stage.epochs} must be above 0")
    check(stage.max_steps is None or stage.max_steps > 0, f"{where}.max_steps={stage.max_steps} must be null or above 0")
    check(stage.eval_every >= 0, f"{where}.eval_every={stage.eval_every} must be 0 (start and end only) or more")


@dataclass
class Sft:
    use: Optional[str]
    epochs: float
    max_steps: Optional[int]
    global_batch: int
    lr: float
    lr_schedule: str
    lr_end: float
    warmup: float
    weight_decay: float
    betas: List[float]
    eps: float
    grad_clip: float
    dropout: Optional[float]
    prompt_loss: float
    eval_every: int
    eval_examples: int

    def __post_init__(self):
        check_optimizer(self)
        check(self.global_batch >= 1, f"sft.global_batch={self.global_batch} must be at least 1")
        check(0 <= self.prompt_loss <= 1, f"sft.prompt_loss={self.prompt_loss} must be in [0, 1]")


@dataclass
class Reward:
    use: Optional[str]
    epochs: float
    max_steps: Optional[int]
    global_batch: int
    lr: float
    lr_schedule: str
    lr_end: float
    warmup: float
    weight_decay: float
    betas: List[float]
    eps: float
    grad_clip: float
    dropout: Optional[float]
    center_coef: float
    eval_every: int
    eval_examples: int

    def __post_init__(self):
        check_optimizer(self)
        check(self.global_batch >= 1, f"reward.global_batch={self.global_batch} must be at least 1")
        check(self.center_coef >= 0, f"reward.center_coef={self.center_coef} must be 0 or more")


@dataclass
class Ppo:
    use: Optional[str]
    epochs: float
    max_steps: Optional[int]
    rollout_batch: int
    minibatches: int
    ppo_epochs: int
    actor_lr: float
    critic_lr: float
    lr_schedule: str
    lr_end: float
    warmup: float
    actor_weight_decay: float
    critic_weight_decay: float
    betas: List[float]
    eps: float
    grad_clip: float
    critic_warmup: int
    temperature: float
    top_p: float
    top_k: int
    kl_coef: float
    kl_estimator: str
    kl_target: Optional[float]
    kl_horizon: int
    gamma: float
    lam: float
    cliprange: float
    dual_clip: float
    cliprange_value: float
    log_ratio_clamp: float
    whiten_advantages: bool
    early_stop_kl: Optional[float]
    normalize_scores: bool
    score_clip: float
    missing_eos_penalty: float
    ptx_coef: float
    ema_decay: float
    align_overflow: bool
    eval_every: int
    eval_prompts: int

    def __post_init__(self):
        check_optimizer(self)
        check_choice("ppo.kl_estimator", self.kl_estimator, ("k1", "k2", "k3"))
        check(self.ppo_epochs >= 1, f"ppo.ppo_epochs={self.ppo_epochs} must be at least 1")
        check(self.temperature > 0, f"ppo.temperature={self.temperature} must be above 0: PPO needs samples, not the greedy answer")
        check(0 < self.top_p <= 1, f"ppo.top_p={self.top_p} must be in (0, 1]; 1 is off")
        check(self.top_k >= 0, f"ppo.top_k={self.top_k} must be 0 (off) or more")
        check(0 <= self.gamma <= 1 and 0 <= self.lam <= 1, f"ppo.gamma={self.gamma} and ppo.lam={self.lam} must be in [0, 1]")
        check(self.dual_clip == 0 or self.dual_clip > 1, f"ppo.dual_clip={self.dual_clip} must be 0 (off) or above 1")
        check(0 <= self.ema_decay < 1, f"ppo.ema_decay={self.ema_decay} must be 0 (off) or below 1")
        check(self.kl_target is None or self.kl_target > 0, f"ppo.kl_target={self.kl_target} must be null (fixed kl_coef) or above 0")
        check(self.minibatches >= 1, f"ppo.minibatches={self.minibatches} must be at least 1")
        check(
            self.rollout_batch % self.minibatches == 0,
            f"ppo.rollout_batch={self.rollout_batch} does not divide into ppo.minibatches={self.minibatches}",
        )


# --- the rest ---------------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    engine: str

    def __post_init__(self):
        check_choice("rollout.engine", self.engine, ("hf",))


@dataclass
class Checkpoint:
    every: int
    keep_last: int

    def __post_init__(self):
        check(self.every >= 0, f"checkpoint.every={self.every} must be 0 (only at the end) or more")
        check(self.keep_last >= 1, f"checkpoint.keep_last={self.keep_last} must be at least 1")


@dataclass
class Wandb:
    mode: str
    project: str
    entity: Optional[str]

    def __post_init__(self):
        check_choice("wandb.mode", self.mode, ("auto", "online", "offline", "disabled"))


@dataclass
class Config:
    name: str
    stage: str
    seed: int
    store: str
    dry_run: bool
    debug: bool
    model: Model
    dataset: Dataset
    hardware: Hardware
    rollout: Rollout
    checkpoint: Checkpoint
    wandb: Wandb
    sft: Optional[Sft] = None
    reward: Optional[Reward] = None
    ppo: Optional[Ppo] = None

    def __post_init__(self):
        check_choice("stage", self.stage, STAGES)
        check(self.seed >= 0, f"seed={self.seed} must be 0 or more")
        check("/" not in self.name and self.name not in ("", ".", ".."), f"name={self.name!r} names a folder under runs/: it may not hold a slash")


# --- the door ---------------------------------------------------------------------------------------------------------


def load(composed: DictConfig | str | Path) -> Config:
    """Turn composed YAML (Hydra's DictConfig, or the path of a saved one) into a checked Config.

    Raises:
        UserError: a key that does not exist, a value of the wrong type or out of range, a mandatory value left open.
    """
    if not isinstance(composed, DictConfig):
        composed = OmegaConf.load(composed)
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise UserError(f"{missing[0]} has no value: type {missing[0]}=...")
        values = OmegaConf.to_container(composed, resolve=True)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))
    except ConfigKeyError as error:
        key = error.full_key or str(error.key)
        raise UserError(f"unknown key {key}{did_you_mean(key, known_keys())}") from error
    except (InterpolationResolutionError, MissingMandatoryValue) as error:
        raise UserError(f"{error.full_key}: {error.msg or error}") from error
    except OmegaConfBaseException as error:
        what = str(error).splitlines()[0]
        raise UserError(f"{error.full_key}: {what}") from error
    except ValueError as error:
        raise UserError(str(error)) from error


def known_keys(node: type = Config, prefix: str = "") -> List[str]:
    """All dotted keys of the schema: blocks and leaves. A free-form mapping ends with '.*'."""
    keys: List[str] = []
    for f in fields(node):
        key = prefix + f.name
        kind = _bare(f.type)
        keys.append(key)
        if is_dataclass(kind):
            keys += known_keys(kind, key + ".")
        elif kind == Dict[str, Source]:
            keys += [key + ".*"] + known_keys(Source, key + ".*.")
        elif str(kind).startswith("typing.Dict"):
            keys.append(key + ".*")
    return keys


def did_you_mean(word: str, choices: List[str]) -> str:
    """' (did you mean X?)', or nothing when no choice resembles the word."""
    import difflib

    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def _bare(kind):
    """Optional[X] -> X."""
    inner = [k for k in getattr(kind, "__args__", ()) if k is not type(None)]
    return inner[0] if len(inner) == 1 and type(None) in kind.__args__ else kind
