"""The DeepSpeed config of every engine: the only place where DeepSpeed's JSON is made. No torch, so the plan can print it."""

import difflib

from runner.batch_sizes import accumulation, micro_batch
from runner.config.schema import ENGINES, Config, frozen_models
from runner.errors import UserError

# DeepSpeed silently ignores unknown keys at the top level, so we check the user's block against those that it reads
TOP_LEVEL_KEYS = frozenset(
    """activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comms_logger communication_data_type
    csv_monitor data_types disable_allgather dump_state flops_profiler fp16 gradient_accumulation_steps
    gradient_clipping gradient_predivide_factor memory_breakdown optimizer prescale_gradients scheduler
    seq_parallel_communication_data_type sparse_gradients steps_per_print tensorboard tensor_parallel
    train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism wall_clock_breakdown wandb
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization""".split()
)

# Keys that would change what is learned, which is no matter of hardware: a finished step would be reused as if they were not there
CHANGES_LEARNING = frozenset(
    """amp compression_training curriculum_learning data_efficiency eigenvalue elasticity progressive_layer_drop quantize_training
    sparse_attention torch_autocast weight_quantization""".split()
)

# Keys that the runner decides: set by hand they would contradict the plan. -> what to set instead
SET_BY_RUNNER = {
    "train_batch_size": "sft.global_batch, reward.global_batch, dpo.global_batch, ppo.rollout_batch",
    "train_micro_batch_size_per_gpu": "hardware.micro_batch",
    "gradient_accumulation_steps": "hardware.micro_batch (it is derived)",
    "optimizer": "the stage's lr, betas, eps and weight_decay",
    "scheduler": "the stage's lr_schedule and warmup",
    "gradient_clipping": "the stage's grad_clip",
    "hybrid_engine": "rollout.engine: DeepSpeed's hybrid engine accelerates no model family under transformers 5",
}

# The same inside a block
SET_INSIDE_BLOCKS = {
    ("zero_optimization", "stage"): "hardware.zero",
    ("fp16", "enabled"): "hardware.precision",
    ("bf16", "enabled"): "hardware.precision",
    ("bfloat16", "enabled"): "hardware.precision",
    ("fp16", "fp16_master_weights_and_grads"): "hardware.precision (the optimizer's weights are fp32)",
    ("bf16", "bf16_master_weights_and_grads"): "hardware.precision (the optimizer's weights are fp32)",
    ("bf16", "bf16_optimizer_states"): "hardware.precision (the optimizer's moments are fp32)",
}
BLOCKS = frozenset(block for block, _ in SET_INSIDE_BLOCKS)


def check_raw(raw: dict) -> None:
    """Refuse keys of hardware.deepspeed that DeepSpeed would ignore, or that the runner decides."""
    for key in raw:
        if key in SET_BY_RUNNER:
            raise UserError(f"hardware.deepspeed.{key} is decided by the runner: set {SET_BY_RUNNER[key]} instead")
        if key in CHANGES_LEARNING:
            raise UserError(f"hardware.deepspeed.{key} changes what is learned, but hardware does not count as such: leave it out")
        if key not in TOP_LEVEL_KEYS:
            near = difflib.get_close_matches(key, TOP_LEVEL_KEYS, n=1)
            raise UserError(f"hardware.deepspeed.{key} is not a DeepSpeed setting" + (f" (did you mean {near[0]}?)" if near else ""))
        if key in BLOCKS and not isinstance(raw[key], dict):
            raise UserError(f"hardware.deepspeed.{key}={raw[key]} is a block of settings: type hardware.deepspeed.{key}.NAME=VALUE")
    for (block, key), ours in SET_INSIDE_BLOCKS.items():
        if key in raw.get(block, {}):
            raise UserError(f"hardware.deepspeed.{block}.{key} is decided by the runner: set {ours} instead")


def training_config(cfg: Config, engine: str, micro_batch: int, accumulation: int, grad_clip: float) -> dict:
    """Config of an engine that trains. engine: actor or critic, the two whose ZeRO stages conf/hardware names."""
    hardware, stage = cfg.hardware, getattr(cfg.hardware.zero, engine)
    zero = {"stage": stage}
    if stage:
        zero["overlap_comm"] = hardware.accelerator == "cuda"
        if hardware.offload.optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": hardware.accelerator == "cuda"}
    if stage == 3:
        zero |= _zero3(hardware.offload.params and engine == "actor", hardware.accelerator)
    config = _common(cfg, micro_batch) | {
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Otherwise DeepSpeed insists on compiling its own optimizer for offloaded states
        "zero_force_ds_cpu_optimizer": False,
    }
    return _merge(config, hardware.deepspeed)


def frozen_config(cfg: Config, engine: str) -> dict:
    """Config of a frozen model (ref or reward) that is partitioned with ZeRO-3."""
    offload = getattr(cfg.hardware.offload, engine)
    zero = {"stage": 3} | _zero3(offload, cfg.hardware.accelerator)
    config = _common(cfg, cfg.hardware.micro_batch.score) | {"gradient_accumulation_steps": 1, "zero_optimization": zero}
    return _merge(config, cfg.hardware.deepspeed)


def _common(cfg: Config, micro_batch: int) -> dict:
    config = {"train_micro_batch_size_per_gpu": micro_batch, "steps_per_print": 10**9, "wall_clock_breakdown": False}
    if cfg.hardware.precision == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale_window": 100}
    elif cfg.hardware.precision == "bf16":
        config["bf16"] = {"enabled": True}
    return config


def _zero3(offload_params: bool, accelerator: str) -> dict:
    zero = {
        "stage3_param_persistence_threshold": 10_000,
        "stage3_max_live_parameters": 30_000_000,
        "stage3_prefetch_bucket_size": 30_000_000,
    }
    if offload_params:
        zero["offload_param"] = {"device": "cpu", "pin_memory": accelerator == "cuda"}
    return zero


def _merge(config: dict, raw: dict) -> dict:
    """config with the keys of raw on top, block by block."""
    merged = dict(config)
    for key, value in raw.items():
        merged[key] = _merge(merged.get(key) or {}, value) if isinstance(value, dict) else value
    return merged


def engine_configs(cfg: Config, stage: str) -> dict[str, dict]:
    """The DeepSpeed config of every engine of a stage. Replicated frozen models need none."""
    micro, gas, block = micro_batch(cfg, stage), accumulation(cfg, stage), getattr(cfg, stage)
    configs = {}
    for engine in ENGINES[stage]:
        # The ptx mixture adds as many micro batches of text again to every step of the actor
        doubled = stage == "ppo" and engine == "actor" and block.ptx_coef
        name = "reward" if stage == "reward" else engine  # as its checkpoints call it
        configs[name] = training_config(cfg, engine, micro, gas * (2 if doubled else 1), block.grad_clip)
    return configs | {name: frozen_config(cfg, name) for name in frozen_models(cfg, stage) if getattr(cfg.hardware.zero, name) == 3}
