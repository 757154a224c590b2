"""What lies in the store: `python -m runner.store [FOLDER]`. One line per step, then what deleting would free. It deletes nothing itself.

No torch, and of each step only small files are read: the store may hold hundreds.
"""

import argparse
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runner.checks.trust import check_weights
from runner.config.schema import STAGES
from runner.durable.lock import is_held
from runner.durable.manifest import steps_done
from runner.durable.resume import FACTS
from runner.errors import UserError
from runner.files import read_json
from runner.formatting import num, print_columns, short

# What is in the store besides steps
SHARED = {"data": "tokenised data", "base": "tokenizers and shapes of random models"}
# Characters in a cell
SHOWN = 60


@dataclass(frozen=True)
class Stored:
    """A step's folder."""

    folder: Path
    state: str
    name: str
    model: str
    dataset: str
    bytes: int
    checkpoints: int  # bytes of them
    used: float  # seconds since the epoch
    parents: set[str]  # names of the folders that it was trained on, some of which are no steps

    @property
    def done(self) -> bool:
        return self.state == "done"


def stored(store: Path) -> list[Stored]:
    """The steps in a store, the one that was used last at the end."""
    folders = [folder for stage in STAGES for folder in store.glob(f"{stage}-*") if folder.is_dir()]
    return sorted(map(_read, folders), key=lambda step: step.used)


def _read(folder: Path) -> Stored:
    files = list(_files(folder))
    saved = [count for path, count, _ in files if path.startswith(f"{folder}/checkpoints/")]
    step = _facts(folder / "step.json")
    models = [*(step.get("parents") or {}).values(), step.get("base") or ""]
    preset = _presets(folder / "config.yaml")
    return Stored(
        folder,
        state(folder),
        str(_facts(folder / FACTS).get("name", "-")),
        preset["model"],
        preset["dataset"],
        sum(count for _, count, _ in files),
        sum(saved),
        max((used for *_, used in files), default=0.0),
        {Path(model).resolve().parent.name for model in models},  # the store may have been moved since
    )


def state(folder: Path) -> str:
    """How far a step has come. A damaged one is what the next run would refuse; its tokenizer, which is slow to read, is not looked at."""
    if (folder / "DONE").exists():
        try:
            read_json(folder / "result.json")
            read_json(folder / "model" / "config.json")
            check_weights(folder / "model")
        except UserError:
            return "damaged"
        return "done"
    total = _facts(folder / "logs" / "rank_0.alive").get("total")
    at, of = steps_done(folder), f" of {total}" if total else ""
    ended = "failed" if any(folder.glob("logs/error_rank*.json")) else "interrupted"
    what = "being worked on" if is_held(folder.parent / "locks" / folder.name) else ended
    return f"{what}, no checkpoint yet" if at is None else f"{what} at step {at}{of}"


def _facts(path: Path) -> dict:
    try:
        return read_json(path)
    except UserError:
        return {}


def _presets(path: Path) -> dict[str, str]:
    """The names of the model and dataset presets in a step's config.yaml. A YAML parser would take a second for twenty files."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    found = {block: re.search(rf"^{block}:\n  name: (.*)$", text, re.MULTILINE) for block in ("model", "dataset")}
    return {block: match[1] if match else "-" for block, match in found.items()}


def _files(folder: Path | str) -> Iterator[tuple[str, int, float]]:
    """(path, bytes, time) of each file below a folder. A file with several names counts under each with its share."""
    for entry in os.scandir(folder):
        try:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path)
            else:
                facts = entry.stat(follow_symlinks=False)
                yield entry.path, facts.st_size // facts.st_nlink, facts.st_mtime
        except OSError:  # a run has just removed it, or it is somebody else's to read
            continue


def show_store(store: Path) -> None:
    steps = stored(store)
    if not steps:
        raise UserError(f"{short(store)} holds no steps: type python -m runner.store FOLDER")
    children = {step.folder.name: [s.folder.name for s in steps if step.folder.name in s.parents] for step in steps}
    rows = [("step", "state", "name", "model", "dataset", "size", "last used", "trained on it")]
    for step in steps:
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(step.used))
        needed = children[step.folder.name]
        by = ", ".join(needed[:2]) + (f" and {len(needed) - 2} more" if needed[2:] else "")
        rows.append((step.folder.name, step.state, step.name[:SHOWN], step.model, step.dataset, size(step.bytes), day, by))
    print_columns(rows, shutil.get_terminal_size(fallback=(10_000, 0)).columns)  # through a pipe, a step has one line
    others = {name: sum(count for _, count, _ in _files(store / name)) for name in SHARED if (store / name).is_dir()}
    print()
    if others:
        print_columns([(f"{name}/", size(total), f"{SHARED[name]}, made anew where it is missing") for name, total in others.items()])
    total = size(sum(step.bytes for step in steps) + sum(others.values()))
    print(f"\n{short(store)}: {total} in all. Nothing was deleted. What can be:")
    saved = [step for step in steps if step.done and step.checkpoints]
    if saved:
        words = shlex.join(["rm", "-rf", *(short(step.folder / "checkpoints") for step in saved)])
        free = size(sum(step.checkpoints for step in saved))
        print(f"- {free} of checkpoints of finished steps, which nothing reads any more:\n  {words}")
    last = [step for step in steps if step.done and not children[step.folder.name]]
    free = size(sum(step.bytes - step.checkpoints for step in last))
    print(f"- {free} more of finished steps that no other was trained on, beside their checkpoints, if you want none of their models")


def size(count: int) -> str:
    return f"{num(count / 1e9)} GB" if count >= 1e9 else f"{num(count / 1e6)} MB"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m runner.store", description="List the steps in a store. Deletes nothing.")
    parser.add_argument("folder", nargs="?", default="runs/store", help="the store, runs/store by default")
    store = Path(parser.parse_args().folder)
    if not store.is_dir():
        sys.exit(f"error: there is no store {store} (looked from {Path.cwd()}): type python -m runner.store FOLDER")
    try:
        show_store(store.absolute())
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
