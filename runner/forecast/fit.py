"""Whether a stage fits into GPU memory, and what to type if it does not."""

from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter

from runner.batch_sizes import micro_batch, step_batch
from runner.config.schema import ENGINES, PARTS, Config, frozen_models
from runner.errors import UserError
from runner.forecast.memory import host_bytes, itemsize, peaks, samples_whole
from runner.forecast.sizes import model_sizes
from runner.watch.machine import memory_limit

# The forecast may take this share of the memory
ROOM = 0.95


def refuse_the_impossible(cfg: Config, stages: list[str]) -> None:
    """Raise UserError if weights, gradients and optimizer alone do not fit: then no batch is small enough."""
    if cfg.hardware.accelerator == "cpu":
        return _refuse_for_this_machine(cfg, stages)
    for stage in stages if foreseeable(cfg) else ():
        states, memory = peaks(cfg, stage)["states"], cfg.hardware.memory_gb
        if states > memory * 2**30:  # GB on the box are GiB: an 80 GB card has 85e9 bytes
            raise UserError(
                f"{stage} of model={cfg.model.name} does not fit hardware={cfg.hardware.name}: weights, gradients and optimizer alone take "
                f"{gb(states)} of each GPU, which has {memory:g} GB (hardware.memory_gb). {cure(cfg, stages)}"
            )


def _refuse_for_this_machine(cfg: Config, stages: list[str]) -> None:
    """On CPUs, whose processes share this machine's memory. A job of several nodes may be started from a smaller machine."""
    allowed = memory_limit()
    for stage in stages if cfg.hardware.nodes == 1 and model_sizes(cfg) else ():
        needed = cfg.hardware.gpus * peaks(cfg, stage)["states"] + host_bytes(cfg, stage)
        if needed > allowed:
            takes = f"weights, gradients and optimizer alone take {gb(needed)}, and it allows {gb(allowed)}"
            instead = f", or adapters ({typed(more)})" if (more := adapters(cfg, stage)) else ""
            raise UserError(f"{stage} of model={cfg.model.name} does not fit this machine: {takes}. Take a smaller model{instead}")


def warnings(cfg: Config, stages: list[str]) -> list[str]:
    """What may not fit, then what to type for all stages together. Empty if everything fits."""
    said = []
    for stage in stages:
        if not fits(cfg, stage):
            phase, most = max(peaks(cfg, stage).items(), key=lambda item: item[1])
            said.append(f"warning: {stage} needs about {gb(most)} ({phase}), plus some for CUDA; a GPU has {cfg.hardware.memory_gb:g} GB")
    return [*said, cure(cfg, stages)] if said else []


def slow_rollouts(cfg: Config) -> str | None:
    """Why rollouts under ZeRO-3 are slow, and what to type; None if they are not, or if PPO does not fit at all."""
    if not fits(cfg, "ppo") or samples_whole(cfg):
        return None
    weights = gb(model_sizes(cfg)[0].weights * itemsize(cfg))
    said = f"note: ppo samples slowly: no GPU has room for all {weights} of the actor's weights, so every token gathers them anew"
    if more := _enough(cfg, "ppo", lambda changed, stage: fits(changed, stage) and samples_whole(changed)):
        return f"{said}. With {typed(more)} each rollout gathers them once"
    at_once, sizes = cfg.hardware.micro_batch.rollout, []
    while (at_once := 2 * at_once) <= cfg.ppo.rollout_batch // cfg.hardware.world_size:
        sizes.append({"hardware.micro_batch.rollout": at_once})
    roomy = [size for size in sizes if fits(applied(cfg, size), "ppo")]
    return f"{said}. With {typed(roomy[-1])} more responses share each gathering" if roomy else said


def foreseeable(cfg: Config) -> bool:
    """Whether there can be a forecast: not on a CPU, nor for a network of unknown sizes."""
    return cfg.hardware.accelerator == "cuda" and model_sizes(cfg) is not None


def fits(cfg: Config, stage: str) -> bool:
    return max(peaks(cfg, stage).values()) <= ROOM * cfg.hardware.memory_gb * 1e9


def gb(count: float) -> str:
    """Of an estimate: whole ones. A disk that is nearly full needs other digits, see watch/machine.py."""
    return f"{count / 1e9:,.0f} GB"


# --- what to type -----------------------------------------------------------------------------------------------------

# Key -> value
Overrides = dict[str, int | bool]


def cure(cfg: Config, stages: list[str]) -> str:
    """The overrides with which all stages fit, in a sentence."""
    overrides: Overrides = {}
    for stage in stages:
        now = applied(cfg, overrides)
        if fits(now, stage):
            continue
        more = _enough(now, stage)
        if more is None:
            return "Take a smaller model, or more or larger GPUs"
        overrides |= more
    said = f"Type {typed(overrides)}"
    if any(".lora." in key for key in overrides):
        said += " (adapters train in place of all weights)"
    if needed := max(host_bytes(applied(cfg, overrides), stage) for stage in stages):
        said += f". That takes about {gb(needed)} of CPU memory per machine"
    return said


def _enough(cfg: Config, stage: str, wanted: Callable[[Config, str], bool] | None = None) -> Overrides | None:
    """What makes a stage fit: the cheapest saving that is enough alone, or else as few together as are. None if all are not enough."""

    def enough(savings) -> bool:
        return (wanted or fits)(applied(cfg, _together(cfg, stage, savings)), stage)

    every = [*SAVINGS]
    if cfg.model.actor.lora.dim or cfg.model.reward.lora.dim:  # whoever has adapters in one model will sooner take them in the other
        every.remove(adapters)
        every.insert(every.index(optimizer_in_cpu_memory), adapters)
    alone, together = [[one] for one in every], [every[:n] for n in range(2, len(every) + 1)]
    found = next(filter(enough, [*alone, *together]), None)
    if found is None:
        return None
    for saving in [*found]:
        fewer = [other for other in found if other is not saving]
        found = fewer if enough(fewer) else found
    return _together(cfg, stage, found)


def _together(cfg: Config, stage: str, savings: list) -> Overrides:
    """The overrides of several savings, each on top of those before it."""
    overrides: Overrides = {}
    for saving in savings:
        overrides |= saving(applied(cfg, overrides), stage)
    return overrides


def applied(cfg: Config, overrides: Overrides) -> Config:
    """The configuration with these overrides. It is checked after each one."""

    def changed(block, path: list[str], value):
        name, *inner = path
        return replace(block, **{name: changed(getattr(block, name), inner, value) if inner else value})

    for key, value in overrides.items():
        cfg = changed(cfg, key.split("."), value)
    return cfg


def typed(overrides: Overrides) -> str:
    """Overrides as they are typed on the command line."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in overrides.items())


# --- savings ------------------------------------------------------------------------------------------------------------
# Each takes a configuration and a stage, and returns what to type: {} if it has nothing more to offer. ZeRO stages come before the keys
# that need them, because `applied` checks the configuration after each key


def smaller_micro_batch(cfg: Config, stage: str) -> Overrides:
    """The largest that fits, or the smallest."""
    overrides: Overrides = {}
    for size in smaller_sizes(cfg, stage):
        overrides = {f"hardware.micro_batch.{stage}": size}
        if fits(applied(cfg, overrides), stage):
            break
    return overrides


def smaller_sizes(cfg: Config, stage: str) -> list[int]:
    """Micro batches of half the size and less that divide an optimizer step."""
    batch, world = step_batch(cfg, stage), cfg.hardware.world_size
    return [size for size in range(micro_batch(cfg, stage) // 2, 0, -1) if batch % (size * world) == 0]


def recomputed_layers(cfg: Config, stage: str) -> Overrides:
    return _new(cfg, {f"hardware.gradient_checkpointing.{name}": True for name in ENGINES[stage]})


def fewer_responses_at_a_time(cfg: Config, stage: str) -> Overrides:
    now = cfg.hardware.micro_batch.rollout
    return {"hardware.micro_batch.rollout": now // 4} if stage == "ppo" and now >= 4 else {}


def weights_spread_over_the_gpus(cfg: Config, stage: str) -> Overrides:
    models = (*ENGINES[stage], *frozen_models(cfg, stage))
    return _new(cfg, {f"hardware.zero.{name}": 3 for name in models}) if cfg.hardware.world_size > 1 else {}


def optimizer_in_cpu_memory(cfg: Config, stage: str) -> Overrides:
    zero = {f"hardware.zero.{name}": max(2, getattr(cfg.hardware.zero, name)) for name in ("actor", "critic")}
    return _new(cfg, zero | {"hardware.offload.optimizer": True})


def frozen_models_in_cpu_memory(cfg: Config, stage: str) -> Overrides:
    frozen = frozen_models(cfg, stage)
    return _new(cfg, {f"hardware.zero.{name}": 3 for name in frozen} | {f"hardware.offload.{name}": True for name in frozen})


def adapters(cfg: Config, stage: str) -> Overrides:
    parts = [PARTS[name] for name in ENGINES[stage]]
    return {f"model.{part}.lora.dim": 16 for part in parts if not getattr(cfg.model, part).lora.dim}


def actor_in_cpu_memory(cfg: Config, stage: str) -> Overrides:
    return _new(cfg, {"hardware.zero.actor": 3, "hardware.offload.params": True}) if "actor" in ENGINES[stage] else {}


# The cheapest first, and what each does. Smaller batches have no words: each helps in one phase, and runner/faults.py tries them itself
SAVINGS = {
    smaller_micro_batch: "",
    recomputed_layers: "the backward pass computes layers again, and keeps less",
    fewer_responses_at_a_time: "",
    weights_spread_over_the_gpus: "ZeRO-3 spreads the weights over the GPUs",
    optimizer_in_cpu_memory: "it keeps the optimizer's states in CPU memory",
    frozen_models_in_cpu_memory: "models that only read wait in CPU memory",
    adapters: "adapters need no optimizer states for the other weights",
    actor_in_cpu_memory: "it keeps the actor's weights in CPU memory",
}


def _new(cfg: Config, overrides: Overrides) -> Overrides:
    """Those that are not set already."""
    return {key: value for key, value in overrides.items() if attrgetter(key)(cfg) != value}
