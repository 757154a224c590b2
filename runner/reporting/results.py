"""The facts that the steps of a run have left in their folders: result.json and metrics.jsonl, read for the summary."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runner.plan import Step


@dataclass(frozen=True)
class Trained:
    """A step and what is in its folder."""

    step: Step
    state: str  # trained | reused | given | missing
    result: dict
    curves: dict[str, list[float]] = field(default_factory=dict)


def trained_of(step: Step, reused: set[str]) -> Trained:
    """reused: the stages that were done before and not trained in this run."""
    return Trained(step, state(step, reused), read_result(step), read_curves(step.folder))


def state(step: Step, reused: set[str]) -> str:
    if step.pinned:
        return "given"
    if step.stage in reused:
        return "reused"
    return "trained" if (step.folder / "result.json").exists() else "missing"


def read_result(step: Step) -> dict:
    """result.json, whole once a stage is done; {} without one, and for a pinned step, whose folder says nothing about the pinned model."""
    path = step.folder / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() and not step.pinned else {}


def read_curves(folder: Path) -> dict[str, list[float]]:
    """Each metric's finite values over the steps. A resumed run repeats steps: the later row counts."""
    path, by_step = folder / "metrics.jsonl", {}
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:  # an empty line, or one torn by a crash
            continue
        by_step.setdefault(row.get("step", 0), {}).update(row)
    curves: dict[str, list[float]] = {}
    for _, row in sorted(by_step.items()):
        for key, value in row.items():
            if isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(key, []).append(value)
    return curves


def flatten(facts: dict, prefix: str) -> dict:
    """Nested dicts become keys with slashes; lists (samples, calibration) are left out."""
    flat = {}
    for key, value in facts.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif not isinstance(value, list):
            flat[prefix + key] = value
    return flat


def headline(name: str, trained: Sequence[Trained], run_dir: Path, overrides: Sequence[str]) -> dict:
    """The flat facts of a run: `ppo/after/score`, `reward/accuracy`, `sft/data/train`, ..., and the overrides that made it."""
    facts = {"name": name, "run_dir": str(run_dir), "seconds": spent(trained), "overrides": list(overrides)}
    for t in trained:
        facts |= {f"{t.step.stage}/state": t.state, f"{t.step.stage}/model": str(t.step.model)}
        facts |= flatten(t.result, f"{t.step.stage}/")
    return facts


def spent(trained: Iterable[Trained]) -> float:
    """Seconds of training in this run: reused steps cost nothing."""
    return sum(t.result["seconds"] for t in trained if t.state == "trained")
