"""The configuration: every key with its type and its limits. Values and their explanations live in conf/ and nowhere else.

runner/door.py makes objects of composed YAML, for the launcher and for the workers.
"""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Dict, List, Optional

from runner.families import FAMILIES

STAGES = ("sft", "reward", "dpo", "ppo")
# Stages whose models a stage starts from
PARENTS = {"sft": (), "reward": (), "dpo": ("sft",), "ppo": ("sft", "reward")}
# Whose share of the prompts a stage learns from: DPO and reward model take the same pairs, and nothing is trained on both
SHARES = {"sft": "sft", "reward": "reward", "dpo": "reward", "ppo": "ppo"}
# Engines that a stage trains, by the names under which hardware configures them: the reward model's is the critic's
ENGINES = {"sft": ("actor",), "reward": ("critic",), "dpo": ("actor",), "ppo": ("actor", "critic")}
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


def check(ok: bool, message: str) -> None:
    """Raise ValueError(message) unless ok; `load` turns it into a UserError."""
    if not ok:
        raise ValueError(message)


def check_choice(where: str, value: object, choices: tuple) -> None:
    check(value in choices, f"{where}={value} is not one of {', '.join(map(str, choices))}")


def check_name(name: str) -> None:
    """A name that is a folder of its own under runs/, on every file system, and no way out of it."""
    plain = re.fullmatch(r"\w[\w .,=+@-]{0,99}", name)
    check(bool(plain), f"name={name!r} names a folder under runs/: type letters, digits, '-', '_' and '.', at most 100, and no slash")


def check_least(block: object, least: float, *names: str, where: str = "") -> None:
    """Fields of a block, which stands at `where` or at the name of its class, that must be `least` or more; null passes."""
    for name in names:
        value = getattr(block, name)
        check(value is None or value >= least, f"{where or type(block).__name__.lower()}.{name}={value} must be {least:g} or more")


def check_above(block: object, bound: float, *names: str) -> None:
    """Fields of a block that must lie above `bound`; null passes."""
    for name in names:
        value = getattr(block, name)
        check(value is None or value > bound, f"{type(block).__name__.lower()}.{name}={value} must be above {bound:g}")


def check_share(block: object, *names: str, where: str = "") -> None:
    """The same for fields that must lie in [0, 1)."""
    for name in names:
        value = getattr(block, name)
        check(value is None or 0 <= value < 1, f"{where or type(block).__name__.lower()}.{name}={value} must be 0 or more, and below 1")


# --- model ------------------------------------------------------------------------------------------------------------


@dataclass
class Lora:
    dim: int
    alpha: float
    dropout: float
    lr: float
    targets: List[str]
    train_rest: bool


# Keys of a shape that are sizes, in all families
SIZES = {"vocab_size", "hidden_size", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head", "num_key_value_heads", "head_dim"}
SIZES |= {"ffn_dim", "intermediate_size", "max_position_embeddings", "word_embed_proj_dim"}


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
        check(
            self.init == "pretrained" or not self.path.startswith(("/", "./", "../", "~")),
            f"init=random makes weights up and does not read {self.path}: type model.actor.init=pretrained (model.reward.init) beside it",
        )


@dataclass
class SizeRecipe:
    """Hyper-parameters that go with the size of a network; conf/stage reads them by interpolation."""

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
    end_token: Optional[str]
    chat_template: str
    max_prompt_tokens: int
    max_response_tokens: int
    attention: str
    trust_remote_code: bool
    recipe: SizeRecipe

    def __post_init__(self):
        check_choice("model.family", self.family, tuple(FAMILIES))
        check_choice("model.attention", self.attention, ("auto", *FAMILIES[self.family].attention))
        check(
            self.tokenizer_vocab >= 259,
            f"model.tokenizer_vocab={self.tokenizer_vocab} must be 259 or more: 256 bytes and three special tokens",
        )
        check(self.max_prompt_tokens >= 1, f"model.max_prompt_tokens={self.max_prompt_tokens} must be at least 1")
        check(self.max_response_tokens >= 2, f"model.max_response_tokens={self.max_response_tokens} must be at least 2: a token and EOS")
        for part in ("actor", "reward"):
            lora, where = getattr(self, part).lora, f"model.{part}.lora"
            check_least(lora, 0, "dim", "alpha", "lr", where=where)
            check_share(lora, "dropout", where=where)
            scaled = not lora.dim or lora.alpha > 0
            check(scaled, f"{where}.alpha=0 gives its adapters (dim={lora.dim}) no weight: type {where}.alpha=16, or {where}.dim=0")
            for name, size in getattr(self, part).shape.items():
                whole = size is None or (type(size) is int and size > 0)
                check(name not in SIZES or whole, f"model.{part}.shape.{name}={size} must be a whole number of 1 or more")
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
    """The only block with values here: its name is the user's, so that no preset can give it any. A path is enough."""

    path: str
    adapter: str = "fields"
    subset: Optional[str] = None
    revision: Optional[str] = None
    split: str = "train"
    fields: Dict[str, str] = field(default_factory=dict)
    weight: float = 1.0
    sft_only: bool = False


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
        for name, source in self.sources.items():
            where = f"dataset.sources.{name}.weight={source.weight}"
            check(source.weight > 0, f"{where} must be above 0: type ~dataset.sources.{name} to leave the source out")
            check(source.weight <= 1000, f"{where} repeats its rows as often: type 1000 or less")
        check(self.path is None or bool(self.path.strip()), "dataset.path is empty: type dataset.path=/data/pairs.jsonl")
        check_least(self, 0, "toy_rows")
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
    dpo: int
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
    deepspeed: Dict[str, Any]

    def __post_init__(self):
        check_choice("hardware.accelerator", self.accelerator, ("cpu", "cuda"))
        check_choice("hardware.precision", self.precision, ("fp32", "bf16", "fp16"))
        check(self.accelerator == "cuda" or self.precision != "fp16", "hardware.precision=fp16 does not run on a CPU: use fp32 or bf16")
        check_above(self, 0, "timeout_minutes", "memory_gb")
        check_least(self, 0, "tflops", "bandwidth_gb_s", "link_gb_s", "price_per_hour", "logits_chunk")
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


@dataclass
class Training:
    """What all stages have."""

    use: Optional[str]
    epochs: float
    max_steps: Optional[int]
    lr_schedule: str
    lr_end: float
    warmup: float
    betas: List[float]
    eps: float
    grad_clip: float
    eval_every: int

    def __post_init__(self):
        where = type(self).__name__.lower()
        check_choice(f"{where}.lr_schedule", self.lr_schedule, SCHEDULES)
        check(
            self.use is None or bool(self.use.strip()),
            f"{where}.use is empty: type the folder of a checkpoint, or {where}.use=null for none",
        )
        check(self.warmup >= 0, f"{where}.warmup={self.warmup} must be 0 or more: steps, or below 1 a share of the run")
        check(self.grad_clip > 0, f"{where}.grad_clip={self.grad_clip} must be above 0 (1e9 for none)")
        check(len(self.betas) == 2, f"{where}.betas={self.betas} must be two numbers")
        check(all(0 <= beta < 1 for beta in self.betas), f"{where}.betas={self.betas} must be 0 or more, and below 1")
        check_above(self, 0, "epochs", "max_steps", "eps")
        check_least(self, 0, "eval_every", "lr_end")


@dataclass
class Supervised(Training):
    """What SFT, reward model and DPO have beside it."""

    global_batch: int
    lr: float
    weight_decay: float
    eval_examples: int

    def __post_init__(self):
        super().__post_init__()
        check_least(self, 0, "lr", "weight_decay")
        check_least(self, 1, "global_batch", "eval_examples")


@dataclass
class Sft(Supervised):
    dropout: Optional[float]
    prompt_loss: float

    def __post_init__(self):
        super().__post_init__()
        check_share(self, "dropout")
        check(0 <= self.prompt_loss <= 1, f"sft.prompt_loss={self.prompt_loss} must be in [0, 1]")


@dataclass
class Reward(Supervised):
    dropout: Optional[float]
    center_coef: float

    def __post_init__(self):
        super().__post_init__()
        check_share(self, "dropout")
        check_least(self, 0, "center_coef")


@dataclass
class Dpo(Supervised):
    beta: float
    label_smoothing: float

    def __post_init__(self):
        super().__post_init__()
        check_above(self, 0, "beta")
        smoothing = self.label_smoothing
        check(0 <= smoothing < 0.5, f"dpo.label_smoothing={smoothing} must be 0 (off) or more, and below 0.5, where pairs say nothing")


@dataclass
class Ppo(Training):
    rollout_batch: int
    minibatches: int
    ppo_epochs: int
    actor_lr: float
    critic_lr: float
    actor_weight_decay: float
    critic_weight_decay: float
    critic_warmup: int
    temperature: float
    top_p: float
    top_k: int
    min_response_tokens: int
    stop: List[str]
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
    calibration_prompts: int
    normalize_scores: bool
    score_clip: float
    missing_eos_penalty: float
    ptx_coef: float
    ema_decay: float
    align_overflow: bool
    eval_prompts: int

    def __post_init__(self):
        super().__post_init__()
        check_choice("ppo.kl_estimator", self.kl_estimator, ("k1", "k2", "k3"))
        check_least(self, 1, "rollout_batch", "minibatches", "ppo_epochs", "kl_horizon", "calibration_prompts", "eval_prompts")
        check_least(self, 0, "actor_lr", "critic_lr", "actor_weight_decay", "critic_weight_decay", "critic_warmup")
        check_least(self, 0, "kl_coef", "score_clip", "missing_eos_penalty", "ptx_coef", "min_response_tokens")
        check(all(self.stop), f"ppo.stop={self.stop} holds an empty string, which every response begins with: leave it out")
        check_above(self, 0, "kl_target", "cliprange", "cliprange_value", "log_ratio_clamp", "early_stop_kl")
        check_share(self, "ema_decay")
        check(
            self.kl_target is None or self.kl_coef > 0,
            f"ppo.kl_target={self.kl_target} multiplies ppo.kl_coef, which begins at 0 and would stay there: type ppo.kl_coef=0.05",
        )
        check(self.temperature > 0, f"ppo.temperature={self.temperature} must be above 0: PPO needs samples, not the greedy answer")
        check(0 < self.top_p <= 1, f"ppo.top_p={self.top_p} must be in (0, 1]; 1 is off")
        choice = self.top_k == 0 or self.top_k > 1
        check(choice, f"ppo.top_k={self.top_k} must be 0 (off) or above 1: PPO needs samples, not the greedy answer")
        check(0 <= self.gamma <= 1 and 0 <= self.lam <= 1, f"ppo.gamma={self.gamma} and ppo.lam={self.lam} must be in [0, 1]")
        check(self.dual_clip == 0 or self.dual_clip > 1, f"ppo.dual_clip={self.dual_clip} must be 0 (off) or above 1")
        fits = max(n for n in range(1, min(self.minibatches, self.rollout_batch) + 1) if self.rollout_batch % n == 0)
        check(
            self.rollout_batch % self.minibatches == 0,
            f"ppo.rollout_batch={self.rollout_batch} does not divide into ppo.minibatches={self.minibatches}: type ppo.minibatches={fits}",
        )


# --- the rest ---------------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    engine: str
    max_mismatch: float

    def __post_init__(self):
        check_choice("rollout.engine", self.engine, ("auto", "graph", "hf"))
        check_least(self, 0, "max_mismatch")


@dataclass
class Checkpoint:
    every: int
    minutes: float
    keep_last: int
    keep_best: int
    background: bool

    def __post_init__(self):
        check(self.every >= 0, f"checkpoint.every={self.every} must be 0 (only at the end) or more")
        check_least(self, 1, "keep_last")
        check_least(self, 0, "keep_best", "minutes")


@dataclass
class Wandb:
    mode: str
    project: str
    entity: Optional[str]

    def __post_init__(self):
        check_choice("wandb.mode", self.mode, ("auto", "online", "offline", "disabled"))
        check(bool(self.project.strip()), "wandb.project is empty: type a name, or wandb.mode=disabled for no W&B")


@dataclass
class Config:
    name: str
    stage: str
    seed: int
    store: str
    resume: str
    time_limit: Optional[str]
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
    sft: Optional[Sft] = None
    reward: Optional[Reward] = None
    dpo: Optional[Dpo] = None
    ppo: Optional[Ppo] = None

    def __post_init__(self):
        check_choice("stage", self.stage, STAGES)
        check_choice("resume", self.resume, ("auto", "force", "new"))
        check_choice("invariants", self.invariants, ("stop", "warn"))
        check(0 <= self.seed < 2**32, f"seed={self.seed} must be 0 or more, and below {2**32}")
        check(bool(self.store.strip()), "store is empty: type store=/a/folder/of/yours")
        most = self.model.max_response_tokens
        check(
            self.ppo is None or self.ppo.min_response_tokens <= most,
            f"ppo.min_response_tokens={self.ppo and self.ppo.min_response_tokens} is more than model.max_response_tokens={most}",
        )
        check(self.max_restarts >= 0, f"max_restarts={self.max_restarts} must be 0 or more")
        limit = self.time_limit_seconds
        check(limit is None or 0 < limit < 1e9, f"time_limit={self.time_limit} must be above 0, or null for none")
        check_name(self.name)
        check(
            Path(self.store).absolute() != Path("runs", self.name).absolute(),
            f"name={self.name} would put the folders of commands among the trained steps of store={self.store}: type another name",
        )

    @property
    def time_limit_seconds(self) -> Optional[float]:
        return None if self.time_limit is None else seconds_of(self.time_limit)


DURATION = re.compile(r"(?:(?P<days>\d+)-(?P<h>\d+)(?::(?P<m>\d+))?(?::(?P<s>\d+))?|(?:(?P<hours>\d+):)?(?P<minutes>\d+):(?P<seconds>\d+))")


def seconds_of(text: str) -> float:
    """Seconds of a duration: minutes ("90", "0.5"), or in SLURM's notation "MM:SS", "HH:MM:SS", "D-HH", "D-HH:MM", "D-HH:MM:SS"."""
    try:
        return 60 * float(text)
    except ValueError:
        found = DURATION.fullmatch(text)
    check(found is not None, f"time_limit={text} is no duration: type minutes (90), HH:MM:SS (01:30:00) or D-HH:MM:SS (1-12:00:00)")
    part = {name: int(value or 0) for name, value in found.groupdict().items()}
    least = [("seconds", part["s"] + part["seconds"], 60), ("hours", part["h"], 24)]
    least += [("minutes", part["m"] + part["minutes"], 60)] if found["hours"] or found["days"] else []
    for name, value, whole in least:
        check(value < whole, f"time_limit={text} has {value} {name}, which is {whole} or more: write it out, or type plain minutes")
    hours = 24 * part["days"] + part["h"] + part["hours"]
    return 3600 * hours + 60 * (part["m"] + part["minutes"]) + part["s"] + part["seconds"]
