"""Checkpoint folders on disk: which are finished, and whether they are still what was written. No torch."""

import hashlib
import json
import re
import shutil
from contextlib import suppress
from pathlib import Path

from runner.files import flush, hash_of

# Written last: a folder without it is not a checkpoint
MANIFEST = "manifest.json"
# Tensors that are the same on all ranks: an unfinished rollout
SHARED = "shared.safetensors"


def complete(folder: Path) -> list[Path]:
    """Finished checkpoints of a step folder, the oldest first."""
    found = [p for p in (folder / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+(_\d+)?", p.name) and (p / MANIFEST).exists()]
    return sorted(found, key=lambda p: [int(number) for number in p.name.split("_")[1:]])


def write_manifest(path: Path, facts: dict) -> None:
    (path / MANIFEST).write_text(json.dumps(facts | {"digest": hash_of(facts)}))


def read_manifest(path: Path) -> dict:
    """Raises ValueError if it is not what was written."""
    facts = json.loads((path / MANIFEST).read_text())
    if facts.pop("digest") != hash_of(facts):
        raise ValueError("it is not what was written (sha256)")
    return facts


def scored(paths: list[Path]) -> list[tuple[float, Path]]:
    """(score, checkpoint) of those that an evaluation has scored, worst first. A broken manifest counts as unscored."""
    found = []
    for path in paths:
        with suppress(OSError, ValueError, KeyError):
            if (score := read_manifest(path)["score"]) is not None:
                found.append((score, path))
    return sorted(found)


def remove(path: Path) -> None:
    """Delete a checkpoint, its manifest first: what a crash in between leaves is not a checkpoint."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)  # a network disk may hold on to a file for a while


def damage(path: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a checkpoint, if anything. share, shares: look only at every shares-th file, starting with number `share`."""
    try:
        files = read_manifest(path)["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{MANIFEST}: {error}"
    for name, sealed_as in sorted(files.items())[share::shares]:
        file = path / name
        if Path(name).name != name or not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != sealed_as["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {sealed_as['bytes']}"
        if digest(file) != sealed_as["sha256"]:
            return f"{name} is not what was written (sha256)"
    return None


def sealed(path: Path) -> dict:
    """fsync a file. Returns its size and hash."""
    flush(path)
    return {"bytes": path.stat().st_size, "sha256": digest(path)}


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint of a step folder that is intact."""
    return next((path for path in reversed(complete(folder)) if damage(path) is None), None)


def steps_done(folder: Path) -> int | None:
    """Steps done at the newest checkpoint of a step folder; None if there is none."""
    found = complete(folder)
    return int(found[-1].name.split("_")[1]) if found else None
