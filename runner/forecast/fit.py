"""Whether a stage fits into the memory of its GPUs, and what to type where it does not."""

from collections.abc import Callable
from dataclasses import replace

from runner.batch_sizes import micro_batch, step_batch
from runner.config import Config, Hardware, ZeroStages
from runner.errors import UserError
from runner.forecast.memory import host_bytes, moments
from runner.forecast.network import networks

# The forecast may take this share of the memory
ROOM = 0.95


def refuse_the_impossible(cfg: Config, stages: list[str]) -> None:
    """Raise UserError where weights, gradients and optimizer alone do not fit: no batch is small enough for that."""
    for stage in stages if foreseeable(cfg) else ():
        states, memory = moments(cfg, stage)["states"], cfg.hardware.memory_gb
        if states > memory * 2**30:  # makers say GB and mean more: an 80 GB card has 85e9 bytes
            raise UserError(
                f"{stage} of model={cfg.model.name} does not fit hardware={cfg.hardware.name}: weights, gradients and optimizer alone take "
                f"{gb(states)} of each GPU, which has {memory:g} GB (hardware.memory_gb). {cure(cfg, stages)}"
            )


def warnings(cfg: Config, stages: list[str]) -> list[str]:
    """What may not fit, and what to type for all stages together; nothing where all is well."""
    said = []
    for stage in stages:
        if not fits(cfg, stage):
            phase, most = max(moments(cfg, stage).items(), key=lambda item: item[1])
            said.append(f"warning: {stage} needs about {gb(most)} ({phase}), and CUDA some; a GPU has {cfg.hardware.memory_gb:g} GB")
    return [*said, cure(cfg, stages)] if said else []


def foreseeable(cfg: Config) -> bool:
    """Not on a CPU, nor for networks that nothing describes."""
    return cfg.hardware.accelerator == "cuda" and networks(cfg) is not None


def fits(cfg: Config, stage: str) -> bool:
    return max(moments(cfg, stage).values()) <= ROOM * cfg.hardware.memory_gb * 1e9


def gb(count: float) -> str:
    return f"{count / 1e9:,.0f} GB"


# --- what to type -----------------------------------------------------------------------------------------------------
# A change takes a configuration and a stage, and returns the overrides that it adds (none where it has nothing to offer) and what they
# make of the configuration

Words = dict[str, str]
Change = Callable[[Config, str], tuple[Words, Config]]


def cure(cfg: Config, stages: list[str]) -> str:
    """The overrides with which all stages fit, in a sentence."""
    words: Words = {}
    for stage in stages:
        if fits(cfg, stage):
            continue
        changes = _enough(cfg, stage)
        if changes is None:
            return "Take a smaller model, or more or larger GPUs"
        more, cfg = _made(cfg, stage, changes)
        words |= more
    said = f"Type {' '.join(f'{key}={value}' for key, value in words.items())}"
    if any(".lora." in key for key in words):
        said += " (adapters train in place of all weights)"
    if needed := max(host_bytes(cfg, stage) for stage in stages):
        said += f". That takes about {gb(needed)} of CPU memory per machine"
    return said


def _enough(cfg: Config, stage: str) -> list[Change] | None:
    """The first change that makes a stage fit, from the cheapest on; where none does alone, as few of them together as do."""
    alone, together = [[one] for one in CHANGES], [[*CHANGES[:n]] for n in range(2, len(CHANGES) + 1)]
    found = next((changes for changes in (*alone, *together) if _do(cfg, stage, changes)), None)
    for change in CHANGES if found else ():
        without = [other for other in found if other is not change]
        found = without if without and _do(cfg, stage, without) else found
    return found


def _do(cfg: Config, stage: str, changes: list[Change]) -> bool:
    words, changed = _made(cfg, stage, changes)
    return bool(words) and fits(changed, stage)


def _made(cfg: Config, stage: str, changes: list[Change]) -> tuple[Words, Config]:
    words: Words = {}
    for change in changes:
        more, cfg = change(cfg, stage)
        words |= more
    return words, cfg


def smaller_micro_batches(cfg: Config, stage: str) -> tuple[Words, Config]:
    """The largest that fits, or the smallest."""
    now, world, found = micro_batch(cfg, stage), cfg.hardware.world_size, ({}, cfg)
    for n in range(now // 2, 0, -1):
        if step_batch(cfg, stage) % (n * world) == 0:
            changed = _with(cfg, micro_batch=replace(cfg.hardware.micro_batch, **{stage: n}))
            found = {f"hardware.micro_batch.{stage}": str(n)}, changed
            if fits(changed, stage):
                break
    return found


def recomputed_layers(cfg: Config, stage: str) -> tuple[Words, Config]:
    on = {name: True for name in _engines(stage) if not getattr(cfg.hardware.gradient_checkpointing, name)}
    words = {f"hardware.gradient_checkpointing.{name}": "true" for name in on}
    return words, _with(cfg, gradient_checkpointing=replace(cfg.hardware.gradient_checkpointing, **on))


def fewer_responses_at_a_time(cfg: Config, stage: str) -> tuple[Words, Config]:
    now = cfg.hardware.micro_batch.rollout
    if stage != "ppo" or now < 4:
        return {}, cfg
    return {"hardware.micro_batch.rollout": str(now // 4)}, _with(cfg, micro_batch=replace(cfg.hardware.micro_batch, rollout=now // 4))


def weights_spread_over_the_gpus(cfg: Config, stage: str) -> tuple[Words, Config]:
    return _zero(cfg, ZeroStages(3, 3, 3, 3)) if cfg.hardware.world_size > 1 else ({}, cfg)


def optimizer_in_cpu_memory(cfg: Config, stage: str) -> tuple[Words, Config]:
    if cfg.hardware.offload.optimizer:
        return {}, cfg
    now = cfg.hardware.zero
    words, changed = _zero(cfg, ZeroStages(max(2, now.actor), max(2, now.critic), now.ref, now.reward))
    return words | {"hardware.offload.optimizer": "true"}, _with(changed, offload=replace(cfg.hardware.offload, optimizer=True))


def adapters(cfg: Config, stage: str) -> tuple[Words, Config]:
    words, model = {}, cfg.model
    for name in ("actor", "reward") if stage == "ppo" else ("reward",) if stage == "reward" else ("actor",):
        part = getattr(model, name)
        if not part.lora.dim:
            words[f"model.{name}.lora.dim"] = "16"
            model = replace(model, **{name: replace(part, lora=replace(part.lora, dim=16))})
    return words, replace(cfg, model=model)


def frozen_models_in_cpu_memory(cfg: Config, stage: str) -> tuple[Words, Config]:
    frozen = {"ppo": ("ref", "reward"), "dpo": ("ref",)}.get(stage, ())
    words, changed = _zero(cfg, replace(cfg.hardware.zero, **dict.fromkeys(frozen, 3)))
    moved = replace(cfg.hardware.offload, **dict.fromkeys(frozen, True))
    return words | {f"hardware.offload.{name}": "true" for name in frozen}, _with(changed, offload=moved)


def weights_in_cpu_memory(cfg: Config, stage: str) -> tuple[Words, Config]:
    words, changed = _zero(cfg, replace(cfg.hardware.zero, actor=3))
    return words | {"hardware.offload.params": "true"}, _with(changed, offload=replace(cfg.hardware.offload, params=True))


CHANGES: tuple[Change, ...] = (
    smaller_micro_batches,
    recomputed_layers,
    fewer_responses_at_a_time,
    weights_spread_over_the_gpus,
    optimizer_in_cpu_memory,
    frozen_models_in_cpu_memory,
    adapters,
    weights_in_cpu_memory,
)


def _engines(stage: str) -> tuple[str, ...]:
    return {"reward": ("critic",), "ppo": ("actor", "critic")}.get(stage, ("actor",))


def _zero(cfg: Config, wanted: ZeroStages) -> tuple[Words, Config]:
    if cfg.hardware.zero == wanted:
        return {}, cfg
    stages = f"'{{actor: {wanted.actor}, critic: {wanted.critic}, ref: {wanted.ref}, reward: {wanted.reward}}}'"
    return {"hardware.zero": stages}, _with(cfg, zero=wanted)


def _with(cfg: Config, **changes) -> Config:
    hardware: Hardware = replace(cfg.hardware, **changes)
    return replace(cfg, hardware=hardware)
