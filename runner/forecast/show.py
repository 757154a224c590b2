"""The forecast that is printed before any stage starts: memory, time and money."""

from dataclasses import dataclass
from pathlib import Path

from runner.batch_sizes import batches_per_epoch, step_batch, steps_of
from runner.config.schema import Config
from runner.forecast.duration import step_seconds, why_no_time
from runner.forecast.fit import foreseeable, slow_rollouts, warnings
from runner.forecast.memory import peaks
from runner.formatting import print_columns, spell
from runner.plan import Step

# Steps to give time and price for, while the number of steps is unknown
MANY = 1000


@dataclass(frozen=True)
class Rows:
    """The rows of a stage, once they are tokenised."""

    count: int
    prompt: float  # mean tokens
    response: float


@dataclass(frozen=True)
class Forecast:
    stage: str
    memory: float  # bytes on the fullest GPU
    step: float | None  # seconds
    steps: int | None

    @property
    def seconds(self) -> float | None:
        return None if self.step is None or self.steps is None else self.step * self.steps


def show_forecast(cfg: Config, steps: list[Step], inputs: dict[str, dict]) -> None:
    """Print a table of the stages that are still to run. inputs: from runner.prepare; if empty, sequences count at maximum length."""
    missing = [step for step in steps if not step.done]
    if cfg.hardware.accelerator == "cpu" or not missing:
        return
    if not foreseeable(cfg):
        return print("\nno forecast: no preset gives the sizes of this hub model")
    known = {stage: rows_of(cfg, stage, given) for stage, given in inputs.items()}
    found = [forecast(cfg, step.stage, known.get(step.stage), step.resumes_at or 0) for step in missing]
    counted = all(one.steps is not None for one in found)
    print()
    print_columns(with_totals(cfg, found) if counted else for_many_steps(cfg, found))
    if why := why_no_time(cfg):
        print(f"No time estimate with {why}")
    if not inputs:
        print(
            "For sequences of maximum length. Once the data is tokenised, a run prints this again with the real lengths, before it trains."
        )
    for text in warnings(cfg, [step.stage for step in missing]):
        print(text)
    if missing[-1].stage == "ppo" and (note := slow_rollouts(cfg)):
        print(note)


def forecast(cfg: Config, stage: str, rows: Rows | None, done: int) -> Forecast:
    """done: steps already taken, if the stage is resumed."""
    lengths = (rows.prompt, rows.response) if rows else (cfg.model.max_prompt_tokens, cfg.model.max_response_tokens)
    steps = steps_of_stage(cfg, stage, rows)
    ahead = None if steps is None else max(steps - done, 0)
    return Forecast(stage, max(peaks(cfg, stage).values()), step_seconds(cfg, stage, *lengths), ahead)


def with_totals(cfg: Config, found: list[Forecast]) -> list[tuple[str, ...]]:
    rows = [("forecast", "memory", "a step", "steps", "time", "price")]
    rows += [(*_begin(cfg, one), f"{one.steps:,}", spell(one.seconds), price(cfg, one.seconds)) for one in found]
    if len(found) > 1 and all(one.seconds is not None for one in found):
        whole = sum(one.seconds for one in found)
        rows.append(("all", "", "", "", spell(whole), price(cfg, whole)))
    return rows


def for_many_steps(cfg: Config, found: list[Forecast]) -> list[tuple[str, ...]]:
    spent = [one.step and MANY * one.step for one in found]
    rows = [(*_begin(cfg, one), spell(seconds), price(cfg, seconds)) for one, seconds in zip(found, spent, strict=True)]
    return [("forecast", "memory", "a step", f"{MANY:,} steps", "price"), *rows]


def _begin(cfg: Config, one: Forecast) -> tuple[str, str, str]:
    return one.stage, f"{one.memory / 1e9:.0f} of {cfg.hardware.memory_gb:g} GB", spell(one.step)


def rows_of(cfg: Config, stage: str, given: dict) -> Rows:
    from runner.data.cache import mean_lengths

    count, prompt, length = mean_lengths(Path(given["data"]))
    return Rows(count, prompt, cfg.model.max_response_tokens if stage == "ppo" else length - prompt)


def steps_of_stage(cfg: Config, stage: str, rows: Rows | None) -> int | None:
    """Optimizer steps (PPO: iterations); None while they depend on data that is not tokenised yet."""
    block, ppo = getattr(cfg, stage), stage == "ppo"
    if rows is None:
        return block.max_steps
    per_epoch = batches_per_epoch(rows.count, cfg.ppo.rollout_batch if ppo else step_batch(cfg, stage), drop_last=ppo)
    return steps_of(per_epoch, block.epochs, block.max_steps)


def price(cfg: Config, seconds: float | None) -> str:
    hourly = cfg.hardware.price_per_hour * cfg.hardware.world_size
    return f"${seconds / 3600 * hourly:,.2f}" if seconds is not None and hourly else "-"
