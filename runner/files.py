"""Files and folders that are complete or absent, JSON files, and the hashes that name them."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runner.errors import UserError


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `folder`. It replaces `folder` at the end of the block; after an error it is deleted."""
    work = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    put_in_place(work, folder)


def put_in_place(work: Path, folder: Path) -> None:
    """Rename a finished folder, replacing whatever has that name now."""
    for path in [*work.rglob("*"), work]:
        flush(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(work, folder)
    flush(folder.parent)


def remove_unused(run_dir: Path) -> None:
    """Delete the folder that Hydra made for a command that wrote nothing there, and empty parents below the working directory."""
    if Path.cwd().is_relative_to(run_dir.absolute()):
        return
    if not run_dir.is_dir() or not {path.name for path in run_dir.glob("*")} <= {".hydra", "run.log", "multirun.yaml"}:
        return
    shutil.rmtree(run_dir, ignore_errors=True)
    for parent in run_dir.parents:
        if parent == Path.cwd() or not parent.is_relative_to(Path.cwd()) or any(parent.iterdir()):
            return
        parent.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: it is complete, or as it was. A symlink at that path is replaced, not followed."""
    work = path.with_name(path.name + ".tmp")
    work.unlink(missing_ok=True)
    work.write_text(text, encoding="utf-8")
    flush(work)
    os.replace(work, path)


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises UserError if there is none, or it is cut short."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: it is broken or incomplete ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found


def flush(path: Path) -> None:
    """fsync a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_of(facts: object) -> str:
    """The hash of facts that JSON can hold, in hexadecimal. The names of steps and of cached data are its beginning."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
