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
    hint = f". Type {key}=FOLDER"
    if near:
        hint = f". Did you mean {' or '.join(map(str, near))}?"
    elif key.startswith("model."):
        hint += "; where the path is a preset's own, its file in conf/model/ says where to get the checkpoint"
    return f"{key}={path}: this folder does not exist (looked from {Path.cwd()}){hint}"


def no_checkpoint(folder: Path, give: str) -> str:
    """What a folder without a config.json is instead of a checkpoint, and what to give. `give` goes before a path to type."""
    merged = next((found for found in (folder / "model", folder.parent / "model") if (found / "config.json").is_file()), None)
    if folder.suffix == ".gguf" or any(folder.glob("*.gguf")):
        return "is in llama.cpp's format, which is for inference alone: give the checkpoint in Hugging Face format that it was made of"
    if folder.is_file():
        return f"is a file: {give}{folder.parent}"
    if (folder / "adapter_config.json").is_file():
        whole = f"{give}{merged}" if merged else "merge them with peft (merge_and_unload, then save_pretrained), and give that folder"
        return f"holds adapters, which are no model without the one that they adapt: {whole}"
    inside = f": {give}{merged}" if merged and merged.parent == folder else ""
    return f"is not a Hugging Face checkpoint: it has no config.json{inside}"
