"""Whether a name means this machine's disk or the Hugging Face hub, and what to say of a folder that is not there."""

import difflib
from pathlib import Path

# Files of data that are read
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")


def is_local(path: str) -> bool:
    """Whether a path means this machine's disk rather than the hub: it exists, or looks as if it should.

    A hub name has one slash at most, so more of them are folders; so is what would lie in a folder that is here.
    """
    found = Path(path).expanduser()
    if found.exists() or path.startswith((".", "/", "~", "runs/", "checkpoints/")) or path.endswith(SUFFIXES):
        return True
    return path.count("/") > 1 or ("/" in path and found.parent.is_dir())


def no_folder(key: str, path: str) -> str:
    """The message for the folder of a model, named under `key`, that does not exist."""
    found = Path(path).expanduser()
    folders = sorted(p.name for p in found.parent.iterdir() if p.is_dir()) if found.parent.is_dir() else []
    near = difflib.get_close_matches(found.name, folders, n=3)
    hint = f". Did you mean {' or '.join(str(found.parent / name) for name in near)}?" if near else ""
    if folders and not near:
        hint = f". In {found.parent} there are: {', '.join(folders[:8])}"
    return f"{key}={path}: this folder does not exist (looked from {Path.cwd()}){hint}"
