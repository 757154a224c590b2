"""What the stages of a run will need, as it is printed before any of them starts: memory, time and money."""

from dataclasses import dataclass
from pathlib import Path

from runner.batch_sizes import batches_per_epoch, step_batch, steps_of
from runner.config import Config
from runner.forecast.duration import step_seconds
from runner.forecast.fit import foreseeable, warning
from runner.forecast.memory import moments
from runner.plan import Step

# Steps of which the price is told where nobody knows yet how many there will be
MANY = 1000


@dataclass(frozen=True)
class Rows:
    """What is known of the rows of a stage, once they are tokenised."""

    count: int
    prompt: float  # mean tokens
    response: float


def show_forecast(cfg: Config, steps: list[Step], inputs: dict[str, dict]) -> None:
    """Print a table of the stages that are still to run. inputs: of runner.prepare; without any, sequences are as long as they may be."""
    missing = [step.stage for step in steps if not step.done]
    if not foreseeable(cfg) or not missing:
        return
    known = {stage: rows_of(cfg, stage, given) for stage, given in inputs.items()}
    counts = {stage: steps_ahead(cfg, stage, known.get(stage)) for stage in missing}
    everything_known = None not in counts.values()
    table = [("forecast", "memory", "a step", *(("steps", "time", "price") if everything_known else (f"{MANY:,} steps", "price")))]
    total = 0.0
    for stage in missing:
        seconds = seconds_of_a_step(cfg, stage, known.get(stage))
        memory = f"{max(moments(cfg, stage).values()) / 1e9:.0f} of {cfg.hardware.memory_gb:g} GB"
        whole = seconds and seconds * (counts[stage] if everything_known else MANY)
        steps_told = (f"{counts[stage]:,}",) if everything_known else ()
        table.append((stage, memory, spell(seconds), *steps_told, spell(whole), price(cfg, whole)))
        total += whole or 0.0
    if everything_known and len(missing) > 1:
        table.append(("all", "", "", "", spell(total or None), price(cfg, total or None)))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print()
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if not everything_known:
        print("For sequences of the greatest length. Once the data are tokenised a run says how many steps there are, before it trains.")
    for stage in missing:
        if text := warning(cfg, stage):
            print(f"warning: {text}")


def rows_of(cfg: Config, stage: str, given: dict) -> Rows:
    from runner.data.cache import mean_lengths

    count, prompt, length = mean_lengths(Path(given["data"]))
    return Rows(count, prompt, cfg.model.max_response_tokens if stage == "ppo" else length - prompt)


def steps_ahead(cfg: Config, stage: str, rows: Rows | None) -> int | None:
    """Optimizer steps, of PPO iterations; None where they depend on data that nobody has counted."""
    block, ppo = getattr(cfg, stage), stage == "ppo"
    if rows is None:
        return block.max_steps
    per_epoch = batches_per_epoch(rows.count, cfg.ppo.rollout_batch if ppo else step_batch(cfg, stage), drop_last=ppo)
    return steps_of(per_epoch, block.epochs, block.max_steps)


def seconds_of_a_step(cfg: Config, stage: str, rows: Rows | None) -> float | None:
    lengths = (rows.prompt, rows.response) if rows else (cfg.model.max_prompt_tokens, cfg.model.max_response_tokens)
    return step_seconds(cfg, stage, *lengths)


def price(cfg: Config, seconds: float | None) -> str:
    return "-" if seconds is None else f"${seconds / 3600 * cfg.hardware.price_per_hour:,.2f}"


def spell(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.2g} s"
    minutes = seconds / 60
    if minutes < 60:
        return f"{minutes:.2g} min"
    return f"{minutes // 60:,.0f} h {minutes % 60:.0f} min"
