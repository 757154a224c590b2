"""Whether a name means this machine's disk or the Hugging Face hub, and what to say of a folder that is not there."""

import difflib
from pathlib import Path

# Files of data that are read
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")


def is_local(path: str) -> bool:
    """Whether a path means this machine's disk rather than the hub: it exists, or looks as if it should.

    A hub name has one slash at most, so more of them are folders; so is what would lie in a folder that is here.
    """
    found = Path(path)
    if found.exists() or path.startswith((".", "/", "~", "runs/", "checkpoints/")) or path.endswith(SUFFIXES):
        return True
    return path.count("/") > 1 or ("/" in path and found.parent.is_dir())


def no_folder(key: str, path: str) -> str:
    """The message for the folder of a model, named under `key`, that does not exist."""
    found = Path(path)
    gone = next(p for p in (found, *found.parents) if p.parent.is_dir())  # the part of it that is missing
    folders = sorted(p.name for p in gone.parent.iterdir() if p.is_dir())
    near = [gone.parent / name / found.relative_to(gone) for name in difflib.get_close_matches(gone.name, folders, n=3)]
    hint = f". In {gone.parent} there are: {', '.join(folders[:8])}" if folders else ""
    hint = f". Did you mean {' or '.join(map(str, near))}?" if near else hint
    return f"{key}={path}: this folder does not exist (looked from {Path.cwd()}){hint}"
