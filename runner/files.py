"""Files and folders that are whole or absent."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into. At the end of the block it takes its place; after an error it is gone."""
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
    """Give a finished folder its name, in place of what has it now."""
    for path in [*work.rglob("*"), work]:
        flush(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(work, folder)
    flush(folder.parent)


def remove_unused(run_dir: Path) -> None:
    """Delete the folder that Hydra has made for a command, and parents of it under this folder, where nothing came of the command."""
    if not run_dir.is_dir() or not {path.name for path in run_dir.glob("*")} <= {".hydra", "run.log", "multirun.yaml"}:
        return
    shutil.rmtree(run_dir, ignore_errors=True)
    for parent in run_dir.parents:
        if parent == Path.cwd() or not parent.is_relative_to(Path.cwd()) or any(parent.iterdir()):
            return
        parent.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write a file that is whole or as it was; a link at its place is replaced, not followed."""
    work = path.with_name(path.name + ".tmp")
    work.unlink(missing_ok=True)
    work.write_text(text, encoding="utf-8")
    flush(work)
    os.replace(work, path)


def flush(path: Path) -> None:
    """Push a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
