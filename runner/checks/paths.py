"""Whether a name means a local path or the Hugging Face hub, and what to say about a folder that does not exist."""

import difflib
from pathlib import Path

# Data files that we read
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet", ".csv", ".tsv")
SEVERAL = (
    "Each file is a source: type dataset.path=FILE for one and dataset.sources.more='{path: FILE}' for another, "
    "or write a preset in conf/dataset/ that names them all"
)


def is_local(path: str) -> bool:
    """Whether a path is local rather than on the hub: it exists, or looks as if it should.

    A hub name has at most one slash, so more of them mean a folder; so does a parent folder that exists.
    """
    found = Path(path)
    if found.exists() or path.startswith((".", "/", "~", "runs/", "checkpoints/")) or path.endswith(SUFFIXES):
        return True
    return path.count("/") > 1 or ("/" in path and found.parent.is_dir())


def no_folder(key: str, path: str) -> str:
    """The message for a model folder, given under `key`, that does not exist."""
    found = Path(path)
    gone = next(p for p in (found, *found.parents) if p.parent.is_dir())  # the part of it that is missing
    folders = sorted(p.name for p in gone.parent.iterdir() if p.is_dir())
    near = [gone.parent / name / found.relative_to(gone) for name in difflib.get_close_matches(gone.name, folders, n=3)]
    hint = f". In {gone.parent} there are: {', '.join(folders[:8])}" if folders else ""
    hint = f". Did you mean {' or '.join(map(str, near))}?" if near else hint
    return f"{key}={path}: this folder does not exist (looked from {Path.cwd()}){hint}"
