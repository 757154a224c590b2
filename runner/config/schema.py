"""The configuration: every key with its type. Values and their explanations live in conf/, except those of Source, whose names are the
user's.

runner/config/limits.py says which values a block refuses; runner/config/loading.py turns composed YAML into these objects, for the launcher
and for the workers.
"""

from dataclasses import dataclass, field
from typing import Any

from runner.config import limits

STAGES = ("sft", "reward", "dpo", "ppo")
# Stages whose models a stage starts from
PARENTS = {"sft": (), "reward": (), "dpo": ("sft",), "ppo": ("sft", "reward")}
# Whose share of the prompts a stage learns from: DPO takes the reward model's pairs, since no run trains both
SHARES = {"sft": "sft", "reward": "reward", "dpo": "reward", "ppo": "ppo"}
# Engines that a stage trains, by their names in the hardware block: the reward model trains under the critic's settings
ENGINES = {"sft": ("actor",), "reward": ("critic",), "dpo": ("actor",), "ppo": ("actor", "critic")}
# The part of the model block that an engine trains
PARTS = {"actor": "actor", "critic": "reward"}


def frozen_models(cfg: "Config", stage: str) -> tuple[str, ...]:
    """Models that a stage only reads, by their names in the hardware block. No ref where the actor without its adapters serves as one."""
    ref = () if cfg.model.actor.adapters_only else ("ref",)
    return {"dpo": ref, "ppo": (*ref, "reward")}.get(stage, ())


# --- model ------------------------------------------------------------------------------------------------------------


@dataclass
class Lora:
    dim: int
    alpha: float
    dropout: float
    targets: list[str]
    train_rest: bool


@dataclass
class ModelPart:
    """Where the weights of the actor, or of the reward model and critic, come from."""

    path: str | None
    revision: str | None
    shape: dict[str, Any]
    lora: Lora

    @property
    def random(self) -> bool:
        """The first weights are made up, from `shape`, and the tokenizer is trained on the data."""
        return self.path is None

    @property
    def adapters_only(self) -> bool:
        """The other weights stay as they are, so that the reference of PPO and DPO is the actor with its adapters off."""
        return self.lora.dim > 0 and not self.lora.train_rest


@dataclass
class SizeRecipe:
    """Hyper-parameters that depend on the size of the network; conf/stage reads them by interpolation."""

    sft_lr: float
    sft_batch: int
    reward_lr: float
    reward_batch: int
    dpo_lr: float
    dpo_batch: int
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
    end_token: str | None
    chat_template: str | None
    max_prompt_tokens: int
    max_response_tokens: int
    attention: str
    trust_remote_code: bool
    recipe: SizeRecipe

    __post_init__ = limits.check_model


# --- data -------------------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """A path is enough. The defaults are here, and not in conf/: the name of a source is the user's, so no preset can provide them."""

    path: str
    adapter: str = "fields"
    subset: str | None = None
    revision: str | None = None
    split: str = "train"
    fields: dict[str, str] = field(default_factory=dict)
    weight: float = 1.0
    only: str | None = None

    def __post_init__(self) -> None:
        if self.only == "ppo" and self.adapter == "fields":
            self.adapter = "prompts"  # finds the prompt as `fields` does, and needs no answer


@dataclass
class PhaseSplit:
    sft: float
    reward: float
    ppo: float

    __post_init__ = limits.check_split


@dataclass
class Dataset:
    name: str
    sources: dict[str, Source]
    sft_only: list[str]
    ppo_only: list[str]
    eval_only: list[str]
    pretrain: list[str]
    every_answer: bool
    split: PhaseSplit
    holdout: float
    on_bad_row: str
    max_rows: int | None
    toy_rows: int
    path: str | None = None
    fields: dict[str, str] = field(default_factory=dict)

    __post_init__ = limits.check_dataset

    @property
    def has_own_tests(self) -> bool:
        """Whether there are rows to evaluate on; then no share of the others is held out."""
        return bool(self.eval_only) or any(source.only == "eval" for source in self.sources.values())


# --- hardware ---------------------------------------------------------------------------------------------------------


@dataclass
class ZeroStages:
    actor: int
    critic: int
    ref: int
    reward: int

    __post_init__ = limits.check_zero


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
    dpo: int
    ppo: int
    rollout: int
    score: int

    __post_init__ = limits.check_micro_batch


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
    bandwidth_gb_s: float
    link_gb_s: float
    price_per_hour: float
    launch: str
    hostfile: str
    precision: str
    zero: ZeroStages
    offload: Offload
    micro_batch: MicroBatch
    gradient_checkpointing: GradientCheckpointing
    logits_chunk: int
    deterministic: bool
    timeout_minutes: float
    deepspeed: dict[str, Any]

    __post_init__ = limits.check_hardware

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus


# --- stages -----------------------------------------------------------------------------------------------------------


@dataclass
class Training:
    """What all stages have."""

    use: str | None
    epochs: float
    max_steps: int | None
    lr_schedule: str
    lr_end: float
    warmup: float
    betas: list[float]
    eps: float
    grad_clip: float
    eval_every: int

    __post_init__ = limits.check_training


@dataclass
class Supervised(Training):
    """What SFT, reward model and DPO have in addition."""

    global_batch: int
    lr: float
    lora_lr: float
    weight_decay: float
    eval_examples: int

    __post_init__ = limits.check_supervised


@dataclass
class Sft(Supervised):
    dropout: float | None
    prompt_loss: float

    __post_init__ = limits.check_sft


@dataclass
class Reward(Supervised):
    dropout: float | None
    center_coef: float

    __post_init__ = limits.check_reward


@dataclass
class Dpo(Supervised):
    beta: float
    label_smoothing: float

    __post_init__ = limits.check_dpo


@dataclass
class Ppo(Training):
    rollout_batch: int
    minibatches: int
    ppo_epochs: int
    actor_lr: float
    critic_lr: float
    actor_lora_lr: float
    critic_lora_lr: float
    actor_weight_decay: float
    critic_weight_decay: float
    critic_warmup: int
    temperature: float
    top_p: float
    top_k: int
    min_response_tokens: int
    stop: list[str]
    kl_coef: float
    kl_estimator: str
    kl_target: float | None
    kl_horizon: int
    gamma: float
    lam: float
    cliprange: float
    dual_clip: float
    cliprange_value: float
    log_ratio_clamp: float
    whiten_advantages: bool
    early_stop_kl: float | None
    calibration_prompts: int
    normalize_scores: bool
    score_clip: float
    missing_eos_penalty: float
    ptx_coef: float
    ema_decay: float
    align_overflow: bool
    eval_prompts: int

    __post_init__ = limits.check_ppo


# --- the rest ---------------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    engine: str
    max_mismatch: float

    __post_init__ = limits.check_rollout


@dataclass
class Checkpoint:
    every: int
    minutes: float
    keep_last: int
    keep_best: int
    background: bool

    __post_init__ = limits.check_checkpoint


@dataclass
class Wandb:
    mode: str
    project: str
    entity: str | None

    __post_init__ = limits.check_wandb


@dataclass
class Config:
    name: str
    stage: str
    seed: int
    store: str
    resume: str
    time_limit: str | None
    max_restarts: int
    dry_run: bool
    debug: bool
    invariants: str
    model: Model
    dataset: Dataset
    hardware: Hardware
    rollout: Rollout
    checkpoint: Checkpoint
    wandb: Wandb
    sft: Sft | None = None
    reward: Reward | None = None
    dpo: Dpo | None = None
    ppo: Ppo | None = None

    def __post_init__(self):
        limits.check_choice("stage", self.stage, STAGES)
        limits.check_config(self)

    def makes_tokenizer(self, stage: str) -> bool:
        """Whether the tokenizer of a stage is trained on the data: its network began, here or in SFT, with random weights."""
        first, part = ("reward", self.model.reward) if stage == "reward" else ("sft", self.model.actor)
        return part.random and not getattr(self, first).use

    @property
    def time_limit_seconds(self) -> float | None:
        return None if self.time_limit is None else limits.seconds_of(self.time_limit)
