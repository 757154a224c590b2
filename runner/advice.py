"""One line of advice at the end of a stage: the largest speed-up that its own measurements suggest, and what to type for it.

Each suggestion carries the share of the stage's time that it can save at most, computed from the measured phases. Below `NOTABLE`
nothing is said: most runs are fine as they are. Nothing here imports torch.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from statistics import median

from runner.batch_sizes import micro_batch, step_batch
from runner.config.schema import ENGINES, Config
from runner.formatting import pct

# Share of the time below which a win is not worth a line
NOTABLE = 0.1
# Fewer steps than this say nothing about the next ones
FEW = 5
# A step that takes less than this share of the GPU's memory leaves room for twice the micro batch
ROOM = 0.45
# Below these shares of the data sheet's rates a larger micro batch is likely to help
LOW_MFU, LOW_MBU = 0.35, 0.5

# Rough figures: no decimals
percent = partial(pct, digits=0)

Suggestion = tuple[float, str]  # share of the time that it can save at most, what to say


def advise(cfg: Config, stage: str, rows: Sequence[dict], phases: dict[str, float]) -> str | None:
    """The best suggestion, or None.

    Args: rows: those of metrics.jsonl that hold a step's times. phases: seconds of the whole stage by phase.
    """
    if len(rows) < FEW:
        return None
    seen = Seen(rows[1:], phases)  # the first step warms up
    found = [*around(stage, seen), *padding(stage, seen), *memory(cfg, stage, seen)]
    if stage == "ppo":
        found += [*rollouts(cfg, seen), *scoring(cfg, seen)]
    share, text = max(found, default=(0.0, ""))
    return text if share >= NOTABLE else None


class Seen:
    """What was measured: medians over the steps, and shares of the time of a step or the whole stage."""

    def __init__(self, rows: Sequence[dict], phases: dict[str, float]):
        self.rows, self.phases, self.all = rows, phases, sum(phases.values()) or 1.0

    def median(self, name: str) -> float | None:
        return median(found) if (found := [row[name] for row in self.rows if name in row]) else None

    def step(self, *names: str) -> float:
        """Share of a typical step that these phases take."""
        whole = sum(row["time/step"] for row in self.rows) or 1.0
        return sum(row.get(f"time/{name}", 0.0) for row in self.rows for name in names) / whole

    def stage(self, name: str) -> float:
        """Share of the stage that a phase takes."""
        return self.phases.get(name, 0.0) / self.all

    def room(self, cfg: Config) -> bool:
        """Whether a step leaves memory for larger batches; always, on a CPU, whose memory is not measured."""
        peak = self.median("perf/gpu_mem_peak_gb")
        return peak is None or peak < ROOM * cfg.hardware.memory_gb


def around(stage: str, seen: Seen) -> Iterator[Suggestion]:
    """Time around the training."""
    if share := seen.stage("eval"):
        yield share / 2, f"evaluations took {percent(share)} of the stage: {stage}.eval_every=0, or a larger number, makes fewer"
    if share := seen.stage("checkpoint"):
        yield share, f"checkpoints took {percent(share)} of the stage: a larger checkpoint.every or checkpoint.minutes makes fewer"
    if share := seen.stage("data"):
        yield share, f"reading and padding rows took {percent(share)} of the stage: a store on a faster disk helps"
    if share := seen.stage("export"):
        yield share / 2, f"writing the models took {percent(share)} of the stage: a store on a faster disk helps"


def padding(stage: str, seen: Seen) -> Iterator[Suggestion]:
    """Padding costs as much as real tokens."""
    empty = seen.median("perf/padding_fraction") or 0.0
    busy = seen.step("scoring", "update") if stage == "ppo" else seen.step("train")
    text = f"{percent(empty)} of the positions were padding"
    yield empty * busy, f"{text}: model.attention=packed computes no padding"


def memory(cfg: Config, stage: str, seen: Seen) -> Iterator[Suggestion]:
    """A GPU with memory to spare can recompute less, or take larger micro batches."""
    peak = seen.median("perf/gpu_mem_peak_gb")
    if peak is None or not seen.room(cfg):
        return
    busy, room = seen.step("update" if stage == "ppo" else "train"), f"{peak:.0f} of {cfg.hardware.memory_gb:.0f} GB were used"
    on = [key for key in ENGINES[stage] if getattr(cfg.hardware.gradient_checkpointing, key)]
    if on:
        # One quarter: forward, recomputed forward, and a backward that costs two
        words = " ".join(f"hardware.gradient_checkpointing.{key}=false" for key in on)
        yield busy / 4, f"{room}: {words} saves up to {percent(busy / 4)} of the time"
    mfu, micro = seen.median("perf/mfu"), micro_batch(cfg, stage)
    if mfu is not None and mfu < LOW_MFU and step_batch(cfg, stage) % (2 * micro * cfg.hardware.world_size) == 0:
        yield busy * (1 - mfu / LOW_MFU) / 2, f"{room} at {percent(mfu)} MFU: try hardware.micro_batch.{stage}={2 * micro}"


def rollouts(cfg: Config, seen: Seen) -> Iterator[Suggestion]:
    """Sampling: the right engine, with as many responses at a time as there are."""
    share, micro, cuda = seen.step("rollout"), cfg.hardware.micro_batch.rollout, cfg.hardware.accelerator == "cuda"
    took = f"rollouts took {percent(share)} of a PPO step"
    if cfg.rollout.engine == "hf":
        yield share / 2, f"{took}: rollout.engine=auto samples faster than transformers' generate"
    mine, mbu = cfg.ppo.rollout_batch // cfg.hardware.world_size, seen.median("perf/mbu")
    if micro < mine and seen.room(cfg):
        # A decode step of twice the responses takes at best the time of one
        yield share / 2, f"{took}: hardware.micro_batch.rollout={min(2 * micro, mine)} samples more responses at a time"
    elif cuda and mbu is not None and mbu < LOW_MBU:
        saved = share * (1 - mbu / LOW_MBU) / 2
        yield (
            saved,
            f"{took}, at {percent(mbu)} of the memory bandwidth: more responses at a time (ppo.rollout_batch) fill the GPU better",
        )


def scoring(cfg: Config, seen: Seen) -> Iterator[Suggestion]:
    """Scoring the rollout with actor, reference, critic and reward model."""
    share = seen.step("scoring")
    apart = (seen.median("rollout/logprob_mismatch") or 0.0) > cfg.rollout.max_mismatch
    if apart and cfg.rollout.max_mismatch:
        text = "sampler and trainer differ by more than rollout.max_mismatch, so the actor rereads every rollout"
        yield share / 4, f"scoring took {percent(share)} of a PPO step, and {text}: see rollout/logprob_mismatch"
    mine, micro = cfg.ppo.rollout_batch // cfg.hardware.world_size, cfg.hardware.micro_batch.score
    if cfg.hardware.accelerator == "cuda" and 2 * micro <= mine and seen.room(cfg):
        yield share / 4, f"scoring took {percent(share)} of a PPO step: try hardware.micro_batch.score={2 * micro}"
