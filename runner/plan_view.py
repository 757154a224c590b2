"""Prints the plan: the table of steps, notes on settings without effect, and for dry_run the launch commands and DeepSpeed configs."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from runner.batch_sizes import accumulation, micro_batch, step_batch
from runner.config.loading import read_yaml
from runner.config.rates import lora_rate_key, rate_key, typed_rates
from runner.config.schema import ENGINES, PARTS, Config
from runner.deepspeed_config import engine_configs
from runner.durable.resume import forced
from runner.formatting import print_columns, short
from runner.launch_command import command, missing_hostfile
from runner.plan import Step


def show(cfg: Config, steps: list[Step]) -> None:
    """Print what will run, on what hardware, with which batch sizes."""
    h = cfg.hardware
    unit = "GPU"
    if h.accelerator == "cpu":
        unit = "process" if h.gpus == 1 else "processes"
    machine = f"{h.nodes} x {h.gpus} {unit}" if h.nodes > 1 else f"{h.gpus} {unit}"
    where = f"hardware={h.name} ({machine}, {h.precision})"
    print(f"\n{cfg.name}: {cfg.stage} of model={cfg.model.name} on dataset={cfg.dataset.name}, {where}, seed {cfg.seed}")
    rows = [("step", "", "batch = micro x ranks x acc.", "folder")]
    for step in steps:
        micro, gas = micro_batch(cfg, step.stage), accumulation(cfg, step.stage)
        algebra = f"{step_batch(cfg, step.stage)} = {micro} x {h.world_size} x {gas}"
        rows.append((step.stage, step.state(), "" if step.done else algebra, short(Path(step.pinned or step.folder))))
    print_columns(rows)
    notes = [*results_at_hand(cfg, steps), *without_effect(cfg, [step.stage for step in steps if not step.done])]
    for note in notes:
        print(f"note: {note}")


def results_at_hand(cfg: Config, steps: list[Step]) -> Iterator[str]:
    """Results that a user may not have meant to pass over, or to stop at."""
    last, further = steps[-1], {"sft": "model.actor.path", "reward": "model.reward.path", "dpo": "sft.use", "ppo": "sft.use"}
    if last.pinned:
        yield (
            f"{last.stage}.use={last.pinned} is the result itself, so nothing is trained. To train that model further: "
            f"{further[last.stage]}=..."
        )
    if cfg.resume == "force" and last.state() == "run":
        yield (
            f"resume=force continues what was interrupted, which no {last.stage} of name={cfg.name} is: it starts from the beginning. "
            f"To train a finished model further: {further[last.stage]}=..."
        )
    for step in steps:
        if cfg.checkpoint.keep_best and step.state() == "reused" and not read_yaml(step.folder / "config.yaml")["checkpoint"]["keep_best"]:
            yield (
                f"checkpoint.keep_best={cfg.checkpoint.keep_best} comes too late for {step.stage}, which was trained without it: to train "
                f"it again, delete {short(step.folder)}"
            )
        if cfg.resume == "auto" and step.state() == "run" and (facts := forced(step.store, step.stage, cfg.name, step.facts)):
            yield (
                f"{step.stage} starts from the beginning, though {short(replace(step, facts=facts).folder)} has gone on from another "
                "configuration to this one: type resume=force for that"
            )


def without_effect(cfg: Config, stages: list[str]) -> Iterator[str]:
    """Settings that other settings switch off. Noted and not refused: a sweep over those others may well include them."""
    for engine, name in PARTS.items():
        lora = getattr(cfg.model, name).lora
        if any(engine in ENGINES[stage] for stage in stages) and lora.train_rest and not lora.dim:
            yield f"model.{name}.lora.train_rest=true has no effect: there are no adapters (model.{name}.lora.dim=0)"
    rates = [rate_key(stage, "actor") for stage in stages if "actor" in ENGINES[stage]]
    if rates and cfg.model.actor.adapters_only:
        no_effect = f"{' and '.join(rates)} ha{'s' if len(rates) == 1 else 've'} no effect"
        yield f"{no_effect}: only adapters train, at {adapters(cfg, stages, 'actor')}"
    heads = [rate_key(stage, "critic") for stage in stages if "critic" in ENGINES[stage]]
    if heads and cfg.model.reward.adapters_only:
        head = f"{' and '.join(heads)} move{'s' * (len(heads) == 1)} only the head"
        yield f"{head}: the adapters train at {adapters(cfg, stages, 'critic')}"
    if "dpo" in stages and cfg.dataset.split.ppo:
        share = f"dataset.split.ppo={cfg.dataset.split.ppo:g}"
        yield f"stage=dpo leaves PPO's share of the prompts ({share}) unused; with 0 the other stages get it, and SFT is another than PPO's"
    if "ppo" in stages and cfg.dataset.pretrain and not cfg.ppo.ptx_coef:
        yield "dataset.pretrain has no effect: ppo.ptx_coef=0 mixes in no text. InstructGPT uses ppo.ptx_coef=27.8"
    for stage in stages if cfg.checkpoint.keep_best else ():
        if not getattr(cfg, stage).eval_every:
            yield f"checkpoint.keep_best={cfg.checkpoint.keep_best} has no effect on {stage}: {stage}.eval_every=0 scores no checkpoint"


def adapters(cfg: Config, stages: list[str], engine: str) -> str:
    """The learning rates of an engine's adapters, as they would be typed."""
    keys = [lora_rate_key(stage, engine) for stage in stages if engine in ENGINES[stage]]
    return " and ".join(typed_rates(cfg, keys))


def show_details(cfg: Config, steps: list[Step]) -> None:
    """Print the launch command and the DeepSpeed configs of each step, for dry_run."""
    h = cfg.hardware
    if note := missing_hostfile(cfg):
        print(f"\nnote: {note}")
    for step in steps:
        if step.done:
            continue
        print(f"\n--- {step.stage}: launch command, {h.world_size} rank{'s' * (h.world_size > 1)}\n{command(cfg, step.folder)}")
        for name, config in engine_configs(cfg, step.stage).items():
            print(f"\n--- {step.stage}: DeepSpeed config of the {name} engine\n{json.dumps(config, indent=2)}")
