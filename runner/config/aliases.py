"""Names that people bring from TRL, Hugging Face's Trainer and DeepSpeed, and what to type here in their place."""

import re

from runner.config.rates import lora_rate_key, rate_key
from runner.config.schema import ENGINES, PARTS, STAGES

# The end of a foreign key, what to type, and what should be known about it. {engine}, {part}, {rate} and {lora_rate} stand for each network
# that the stage trains. Nothing to type: it does not exist here, and the last column says why
ALIASES = (
    ("learning_rate", "{rate}", ""),
    ("lr_scheduler_type", "{stage}.lr_schedule", ""),
    ("warmup_steps num_warmup_steps warmup_ratio", "{stage}.warmup", "1 or more is steps, less is a share of the run"),
    ("num_train_epochs", "{stage}.epochs", ""),
    ("max_grad_norm gradient_clipping", "{stage}.grad_clip", ""),
    ("batch_size train_batch_size", "{batch}", "it counts all GPUs; hardware.micro_batch.{stage} is what one holds at a time"),
    ("per_device_train_batch_size train_micro_batch_size_per_gpu", "hardware.micro_batch.{stage}", ""),
    ("gradient_accumulation_steps", "", "it follows from {step}, hardware.micro_batch.{stage} and the number of GPUs"),
    ("fp16", "hardware.precision=fp16", ""),
    ("bf16", "hardware.precision=bf16", ""),
    ("zero_stage", "hardware.zero.{engine}", ""),
    ("deepspeed deepspeed_config ds_config", "hardware.deepspeed", "a mapping that is merged into the configuration written here"),
    ("packing sample_packing", "", "leave it out: dialogues are packed without padding already (model.attention)"),
    (
        "load_in_4bit load_in_8bit quantization quantization_bit quantization_config",
        "model.{part}.lora.dim=16",
        "nothing trains on quantised weights here; adapters save memory, and so does hardware.offload",
    ),
    ("max_length max_seq_length max_seq_len cutoff_len", "model.max_prompt_tokens and model.max_response_tokens", "they have a limit each"),
    ("max_prompt_length max_prompt_seq_len", "model.max_prompt_tokens", ""),
    ("max_new_tokens max_completion_length response_length max_answer_seq_len", "model.max_response_tokens", ""),
    ("use_lora use_peft", "model.{part}.lora.dim", "adapters are used when their rank is above 0"),
    ("lora.r lora.rank lora.dim lora_r lora_rank lora_dim", "model.{part}.lora.dim", ""),
    ("lora_alpha", "model.{part}.lora.alpha", ""),
    ("lora.lr lora_learning_rate", "{lora_rate}", "each stage has its own"),
    ("lora_dropout", "model.{part}.lora.dropout", ""),
    ("lora.target_modules lora_target_modules", "model.{part}.lora.targets", ""),
    ("output_dir", "name, or store", "results are in runs/NAME, trained steps in the store"),
    ("save_steps", "checkpoint.every", ""),
    ("init", "model.{part}.path=null for random weights, or the checkpoint's folder or hub id", ""),
    ("report_to", "wandb.mode", "online, offline or disabled; metrics.jsonl is written in any case"),
    ("model_name_or_path", "model.{part}.path", "model=... is the preset of its size"),
    (
        "eval_dataset eval_path eval_file test_path test_file heldout",
        "dataset.eval_only='[FILE]'",
        "dataset.holdout is the share kept without",
    ),
    ("prompt_data prompt_dataset prompts", "dataset.ppo_only='[FILE]'", "or, where models are given, dataset=prompts dataset.path=FILE"),
    ("ppo.beta ppo.kl init_kl_coef kl_penalty", "ppo.kl_coef", "it weighs the KL penalty"),
    ("gae_lambda", "ppo.lam", ""),
    ("pref_beta", "dpo.beta", ""),
    ("finetuning_type", "model.{part}.lora.dim", "0 trains all weights"),
    ("lora_target", "model.{part}.lora.targets", ""),
    ("val_size", "dataset.holdout", ""),
    ("max_samples", "dataset.max_rows", ""),
    ("mask_history", "dataset.every_answer", "false trains on the last answer of a dialogue"),
    ("template", "model.chat_template", "a Jinja text, best in a preset of your own"),
    ("num_nodes nnodes", "hardware.nodes", ""),
    ("flash_attn", "model.attention", "auto takes flash attention where it can"),
    ("resume_from_checkpoint", "", "the same command resumes; resume=force does so with other settings"),
    ("logging_steps", "", "every step is logged"),
    ("num_mini_batches", "ppo.minibatches", ""),
    ("num_ppo_epochs", "ppo.ppo_epochs", ""),
    ("cliprange_vf clip_range_vf", "ppo.cliprange_value", ""),
    ("target_kl", "ppo.early_stop_kl, which ends an update, or ppo.kl_target, which steers ppo.kl_coef", ""),
    ("vf_coef value_coef", "ppo.critic_lr", "the critic is a network of its own, and its loss is not added to the actor's with a weight"),
    ("ent_coef entropy_coef entropy_coeff", "", "this PPO has no entropy bonus; ppo.kl_coef holds the actor near the SFT model"),
)


def instead_of(key: str, chosen: str | None) -> str | None:
    """What to do in place of a foreign key, where the stage is `chosen`; None for a key that is not in the table."""
    for names, typed, why in ALIASES:
        # DeepSpeed-Chat's step 3 puts the network in front: critic_zero_stage
        if re.search(rf"(?:^|\.)(?:actor_|critic_)?(?:{'|'.join(map(re.escape, names.split()))})$", key):
            typed, why = (_filled(text, key, chosen) for text in (typed, why))
            return "; ".join(filter(None, (typed and f"type {typed}", why)))
    return None


def _filled(text: str, key: str, chosen: str | None) -> str:
    """The text for each network that the key means."""
    block, network = key.split(".")[0], re.search(r"(?:^|\.)(actor|critic|reward)[._]", key)
    named = None
    if network and block not in STAGES:
        named = "critic" if network[1] == "reward" else network[1]
    stage = next((known for known in (block, chosen) if known in STAGES), "ppo")
    if named and named not in ENGINES[stage]:
        stage = "sft" if named == "actor" else "reward"
    batch = "ppo.rollout_batch" if stage == "ppo" else f"{stage}.global_batch"
    step = "ppo.rollout_batch / ppo.minibatches" if stage == "ppo" else batch
    engines = [named] if named else ENGINES[stage]
    meant = [
        text.format(
            stage=stage, engine=e, part=PARTS[e], rate=rate_key(stage, e), lora_rate=lora_rate_key(stage, e), batch=batch, step=step
        )
        for e in engines
    ]
    return " or ".join(dict.fromkeys(meant))
