"""The limits of every key: which values a block of the configuration refuses, and the words that say what to type instead.

One function per block, in the order of runner/config/schema.py, whose dataclasses call them when they are made. Each raises ValueError;
`load` in runner/config/loading.py turns it into a UserError. Parameters have no types because schema.py imports
this module. No torch.
"""

import re
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from runner.families import FAMILIES, no_layer
from runner.schedules import KL_STEP, SCHEDULES

# Keys of a shape that are sizes, in all families
SIZES = {"vocab_size", "hidden_size", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head", "num_key_value_heads", "head_dim"}
SIZES |= {"ffn_dim", "intermediate_size", "max_position_embeddings", "word_embed_proj_dim"}


# --- kinds of limits; each skips a null -------------------------------------------------------------------------------


def check(ok: bool, message: str) -> None:
    """Raise ValueError(message) unless ok."""
    if not ok:
        raise ValueError(message)


def check_choice(where: str, value: object, choices: tuple) -> None:
    check(value in choices, f"{where}={value} is not one of {', '.join(map(str, choices))}")


def check_least(block: object, least: float, *names: str, where: str = "") -> None:
    """Fields that must be `least` or more. where: the key of the block, if it is not the name of its class."""
    for name in names:
        value = getattr(block, name)
        check(value is None or value >= least, f"{where or _key(block)}.{name}={value} must be {least:g} or more")


def check_positive(block: object, *names: str, where: str = "") -> None:
    """Fields that must be above 0."""
    for name in names:
        value = getattr(block, name)
        check(value is None or value > 0, f"{where or _key(block)}.{name}={value} must be above 0")


def check_share(block: object, *names: str, where: str = "") -> None:
    """Fields that must lie in [0, 1)."""
    for name in names:
        value = getattr(block, name)
        check(value is None or 0 <= value < 1, f"{where or _key(block)}.{name}={value} must be 0 or more, and below 1")


def _key(block: object) -> str:
    return type(block).__name__.lower()


# --- model ------------------------------------------------------------------------------------------------------------


def _check_part(part, where: str) -> None:
    check(part.path is None or bool(part.path.strip()), f"{where}.path is empty: type a folder or a hub id, or null for random weights")
    sizes = bool(part.shape) or not part.random
    check(sizes, f"{where}.path=null means random weights, which need {where}.shape: the sizes of the network")


def check_model(model) -> None:
    check_choice("model.family", model.family, tuple(FAMILIES))
    check_choice("model.attention", model.attention, ("auto", *FAMILIES[model.family].attention))
    check(
        model.tokenizer_vocab >= 259,
        f"model.tokenizer_vocab={model.tokenizer_vocab} must be 259 or more: 256 bytes and three special tokens",
    )
    check(model.max_prompt_tokens >= 1, f"model.max_prompt_tokens={model.max_prompt_tokens} must be at least 1")
    check(model.max_response_tokens >= 2, f"model.max_response_tokens={model.max_response_tokens} must be at least 2: a token and EOS")
    for name in ("actor", "reward"):
        _check_part(getattr(model, name), f"model.{name}")
        _check_lora(getattr(model, name).lora, f"model.{name}.lora")
        layers = (*FAMILIES[model.family].lora_targets, *FAMILIES[model.family].other_layers)
        for target in getattr(model, name).lora.targets:
            check(target.rpartition(".")[2] in layers, f"model.{name}.{no_layer(target, model.family, layers)}")
        for size, value in getattr(model, name).shape.items():
            whole = value is None or (type(value) is int and value > 0)
            check(size not in SIZES or whole, f"model.{name}.shape.{size}={value} must be a whole number of 1 or more")
    random = model.actor.random
    if random or not Path(model.actor.path).exists():  # of a folder the plan reads config.json: the preset's shape may not be its own
        message = too_long(model, model.actor.path or "model.actor.shape", model.actor.shape.get("max_position_embeddings"))
        check(message is None, message)


def too_long(model, of: str, positions: int | None) -> str | None:
    """What to type if prompts and responses do not fit into the positions of the checkpoint or shape `of`; None positions: no limit."""
    wanted = model.max_prompt_tokens + model.max_response_tokens
    if not isinstance(positions, int) or wanted <= positions:
        return None
    return (
        f"model.max_prompt_tokens={model.max_prompt_tokens} + model.max_response_tokens={model.max_response_tokens} = {wanted} "
        f"is longer than the {positions} positions of {of}: lower one of them"
    )


def _check_lora(lora, where: str) -> None:
    check_least(lora, 0, "dim", "alpha", where=where)
    check_share(lora, "dropout", where=where)
    check("all-linear" not in lora.targets, f"{where}.targets=[all-linear] is the default: leave it out")
    scaled = not lora.dim or lora.alpha > 0
    check(scaled, f"{where}.alpha=0 gives its adapters (dim={lora.dim}) no weight: type {where}.alpha=16, or {where}.dim=0")


# --- data -------------------------------------------------------------------------------------------------------------


def check_split(split) -> None:
    shares = (split.sft, split.reward, split.ppo)
    check(min(shares) >= 0 and sum(shares) > 0, f"dataset.split={shares}: shares must be 0 or more, and one above 0")


def check_dataset(data) -> None:
    check_choice("dataset.on_bad_row", data.on_bad_row, ("error", "skip"))
    held_out = 0 < data.holdout < 1 or (data.holdout == 0 and data.has_own_tests)
    check(held_out, f"dataset.holdout={data.holdout} must be above 0, and below 1: it is the share kept for evaluation")
    check(bool(data.sources), "dataset.sources is empty: name at least one source of prompts")
    for name, source in data.sources.items():
        key, where = f"dataset.sources.{name}", f"dataset.sources.{name}.weight={source.weight}"
        check(source.weight > 0, f"{where} must be above 0: type ~{key} to leave the source out")
        check(source.weight <= 1000, f"{where} would repeat its rows that often: type 1000 or less")
        if source.only is not None:
            check_choice(f"{key}.only", source.only, ("sft", "ppo", "eval"))
        answers = source.only != "sft" or source.adapter != "prompts"
        check(answers, f"{key}.only=sft needs answers, which adapter=prompts does not read: type {key}.adapter=fields")
        check(
            not source.fields or source.adapter in ("fields", "prompts"),
            f"{key}.fields has no effect: adapter={source.adapter} knows the names of its data set. Leave it out"
            + (f", or type {key}.adapter=fields" if source.adapter != "toy" else ""),
        )
    taken = {pair for source in data.sources.values() for pair in source.fields.items()}
    check(data.fields.items() <= taken, _unread_map(data))
    check(data.path is None or bool(data.path.strip()), "dataset.path is empty: type dataset.path=/data/pairs.jsonl")
    check_least(data, 0, "toy_rows")
    check(data.max_rows is None or data.max_rows > 0, f"dataset.max_rows={data.max_rows} must be null or above 0")


def _unread_map(data) -> str:
    """The message for a dataset.fields that no source takes, which a source does with `fields: ${dataset.fields}`."""
    words = "{" + ", ".join(f"{ours}: {theirs}" for ours, theirs in data.fields.items()) + "}"
    mapped = [name for name, source in data.sources.items() if source.adapter in ("fields", "prompts")]
    instead = " or ".join(f"type dataset.sources.{name}.fields='{words}'" for name in mapped)
    own = f"dataset={data.name} has its own names. Leave it out, or also type dataset=jsonl (a file) or dataset=hub"
    return f"dataset.fields={words} is read by no source: {instead or own}"


# --- hardware ---------------------------------------------------------------------------------------------------------


def check_zero(zero) -> None:
    for engine in ("actor", "critic"):
        check_choice(f"hardware.zero.{engine}", getattr(zero, engine), (0, 1, 2, 3))
    for engine in ("ref", "reward"):
        stage = getattr(zero, engine)
        check(stage in (0, 3), f"hardware.zero.{engine}={stage}: a frozen model is replicated (0) or partitioned (3)")


def check_micro_batch(micro) -> None:
    for f in fields(micro):
        check(getattr(micro, f.name) >= 1, f"hardware.micro_batch.{f.name}={getattr(micro, f.name)} must be at least 1")


def check_hardware(h) -> None:
    check_choice("hardware.accelerator", h.accelerator, ("cpu", "cuda"))
    check_choice("hardware.precision", h.precision, ("fp32", "bf16", "fp16"))
    check(h.accelerator == "cuda" or h.precision != "fp16", "hardware.precision=fp16 does not run on a CPU: use fp32 or bf16")
    check_positive(h, "timeout_minutes", "memory_gb")
    check_least(h, 0, "tflops", "bandwidth_gb_s", "link_gb_s", "price_per_hour", "logits_chunk")
    check(h.nodes >= 1 and h.gpus >= 1, f"hardware.nodes={h.nodes} and hardware.gpus={h.gpus} must be at least 1")
    check(
        not h.offload.optimizer or min(h.zero.actor, h.zero.critic) > 0,
        "hardware.offload.optimizer=true needs hardware.zero.actor and hardware.zero.critic of 1 or more: ZeRO does the offloading",
    )
    check(
        not h.offload.params or h.zero.actor == 3,
        f"hardware.offload.params=true needs hardware.zero.actor=3, not {h.zero.actor}: only ZeRO-3 partitions parameters",
    )
    for engine in ("ref", "reward"):
        check(
            not getattr(h.offload, engine) or getattr(h.zero, engine) == 3,
            f"hardware.offload.{engine}=true needs hardware.zero.{engine}=3: only ZeRO-3 moves parameters to the CPU",
        )


# --- stages -----------------------------------------------------------------------------------------------------------


def check_training(block) -> None:
    where = _key(block)
    check_choice(f"{where}.lr_schedule", block.lr_schedule, SCHEDULES)
    check(
        block.use is None or bool(block.use.strip()),
        f"{where}.use is empty: type the folder of a checkpoint, or {where}.use=null for none",
    )
    check(block.warmup >= 0, f"{where}.warmup={block.warmup} must be 0 or more: steps, or below 1 a share of the run")
    check(block.grad_clip > 0, f"{where}.grad_clip={block.grad_clip} must be above 0 (1e9 for none)")
    check(len(block.betas) == 2, f"{where}.betas={block.betas} must be two numbers: type {where}.betas='[0.9,0.95]'")
    check(all(0 <= beta < 1 for beta in block.betas), f"{where}.betas={block.betas} must be 0 or more, and below 1")
    check_positive(block, "epochs", "max_steps", "eps")
    check_least(block, 0, "eval_every", "lr_end")


def check_supervised(block) -> None:
    check_training(block)
    check_positive(block, "lr", "lora_lr")
    check_least(block, 0, "weight_decay")
    check_least(block, 1, "global_batch", "eval_examples")


def check_sft(sft) -> None:
    check_supervised(sft)
    check_share(sft, "dropout")
    check(0 <= sft.prompt_loss <= 1, f"sft.prompt_loss={sft.prompt_loss} must be in [0, 1]")


def check_reward(reward) -> None:
    check_supervised(reward)
    check_share(reward, "dropout")
    check_least(reward, 0, "center_coef")


def check_dpo(dpo) -> None:
    check_supervised(dpo)
    check_positive(dpo, "beta")
    smoothing = dpo.label_smoothing
    check(0 <= smoothing < 0.5, f"dpo.label_smoothing={smoothing} must be 0 (off) or more, and below 0.5, where pairs carry no information")


def check_ppo(ppo) -> None:
    check_training(ppo)
    check_choice("ppo.kl_estimator", ppo.kl_estimator, ("k1", "k2", "k3"))
    check_least(ppo, 1, "rollout_batch", "minibatches", "ppo_epochs", "kl_horizon", "calibration_prompts", "eval_prompts")
    check_positive(ppo, "actor_lr", "critic_lr", "actor_lora_lr", "critic_lora_lr")
    check_least(ppo, 0, "actor_weight_decay", "critic_weight_decay", "critic_warmup")
    check_least(ppo, 0, "kl_coef", "score_clip", "missing_eos_penalty", "ptx_coef", "min_response_tokens")
    check(all(ppo.stop), f"ppo.stop={ppo.stop} holds an empty string, which every response contains: leave it out")
    largest = KL_STEP * ppo.rollout_batch  # the controller's step, as a share of kl_coef, is at most largest / kl_horizon
    check(
        ppo.kl_target is None or ppo.kl_horizon > largest,
        f"ppo.kl_horizon={ppo.kl_horizon} is so short that one iteration of ppo.rollout_batch={ppo.rollout_batch} responses could turn "
        f"kl_coef to zero or below: type more than {largest:g}, by default 10000",
    )
    check_positive(ppo, "kl_target", "cliprange", "cliprange_value", "log_ratio_clamp", "early_stop_kl")
    check_share(ppo, "ema_decay")
    check(
        ppo.kl_target is None or ppo.kl_coef > 0,
        f"ppo.kl_target={ppo.kl_target} multiplies ppo.kl_coef, which starts at 0 and would stay there: type ppo.kl_coef=0.05",
    )
    check(ppo.temperature > 0, f"ppo.temperature={ppo.temperature} must be above 0: PPO needs samples, not the greedy answer")
    check(0 < ppo.top_p <= 1, f"ppo.top_p={ppo.top_p} must be in (0, 1]; 1 is off")
    choice = ppo.top_k == 0 or ppo.top_k > 1
    check(choice, f"ppo.top_k={ppo.top_k} must be 0 (off) or above 1: PPO needs samples, not the greedy answer")
    check(0 <= ppo.gamma <= 1 and 0 <= ppo.lam <= 1, f"ppo.gamma={ppo.gamma} and ppo.lam={ppo.lam} must be in [0, 1]")
    check(ppo.dual_clip == 0 or ppo.dual_clip > 1, f"ppo.dual_clip={ppo.dual_clip} must be 0 (off) or above 1")
    fits = max(n for n in range(1, min(ppo.minibatches, ppo.rollout_batch) + 1) if ppo.rollout_batch % n == 0)
    check(
        ppo.rollout_batch % ppo.minibatches == 0,
        f"ppo.rollout_batch={ppo.rollout_batch} does not divide into ppo.minibatches={ppo.minibatches}: type ppo.minibatches={fits}",
    )


# --- the rest ---------------------------------------------------------------------------------------------------------


def check_rollout(rollout) -> None:
    check_choice("rollout.engine", rollout.engine, ("auto", "graph", "hf"))
    check_least(rollout, 0, "max_mismatch")


def check_checkpoint(checkpoint) -> None:
    check(checkpoint.every >= 0, f"checkpoint.every={checkpoint.every} must be 0 (only at the end) or more")
    check_least(checkpoint, 1, "keep_last")
    check_least(checkpoint, 0, "keep_best", "minutes")


def check_wandb(wandb) -> None:
    check_choice("wandb.mode", wandb.mode, ("auto", "online", "offline", "disabled"))
    check(bool(wandb.project.strip()), "wandb.project is empty: type a name, or wandb.mode=disabled for no W&B")


def check_config(cfg) -> None:
    """The keys outside blocks, and what blocks ask of each other."""
    check_choice("resume", cfg.resume, ("auto", "force", "new"))
    check_choice("invariants", cfg.invariants, ("stop", "warn"))
    check(0 <= cfg.seed < 2**32, f"seed={cfg.seed} must be 0 or more, and below {2**32}")
    check(bool(cfg.store.strip()), "store is empty: type store=/a/folder/of/yours")
    most = cfg.model.max_response_tokens
    check(
        cfg.ppo is None or cfg.ppo.min_response_tokens <= most,
        f"ppo.min_response_tokens={cfg.ppo and cfg.ppo.min_response_tokens} is more than model.max_response_tokens={most}",
    )
    check(cfg.max_restarts >= 0, f"max_restarts={cfg.max_restarts} must be 0 or more")
    limit = cfg.time_limit_seconds
    check(limit is None or 0 < limit < 1e9, f"time_limit={cfg.time_limit} must be above 0, or null for none")
    check_name(cfg.name)
    check(
        Path(cfg.store).absolute() != Path("runs", cfg.name).absolute(),
        f"name={cfg.name} would put the folders of commands among the trained steps of store={cfg.store}: type another name",
    )


def check_name(name: str) -> None:
    """The name of a run must be a folder of its own under runs/, on every file system, and must not lead out of it."""
    plain = re.fullmatch(r"\w[\w .,=+@-]{0,99}", name)
    check(bool(plain), f"name={name!r} names a folder under runs/: type letters, digits, '-', '_' and '.', at most 100, and no slash")


def seconds_of(text: str) -> float:
    """Seconds of a duration: minutes ("90", "0.5"), or in SLURM's notation "MM:SS", "HH:MM:SS", "D-HH", "D-HH:MM", "D-HH:MM:SS"."""
    with suppress(ValueError):
        return 60 * float(text)
    days, dash, rest = text.rpartition("-")
    parts = [int(part) if part.isascii() and part.isdigit() else -1 for part in rest.split(":")]
    check(
        min(parts) >= 0 and len(parts) <= 3 and (dash == "" or (days.isascii() and days.isdigit())) and bool(dash or len(parts) > 1),
        f"time_limit={text} is not a duration: type minutes (90), MM:SS (90:00), HH:MM:SS (01:30:00) or D-HH:MM:SS (1-12:00:00)",
    )
    hours, minutes, seconds = [*parts, 0, 0][:3] if dash else [0, *parts][-3:]
    # The first part may be as large as it likes
    wholes = [("seconds", seconds, 60)] + [("minutes", minutes, 60)] * bool(dash or len(parts) == 3) + [("hours", hours, 24)] * bool(dash)
    for name, value, whole in wholes:
        check(value < whole, f"time_limit={text} has {value} {name}, which is {whole} or more: write it out, or type plain minutes")
    return 86400 * int(days or 0) + 3600 * hours + 60 * minutes + seconds
