"""Checkpoints from strangers: they may hold weights and settings, all of them, and run nothing.

transformers loads pickles (.bin) with weights_only=True, which runs no code, and a repository's Python only when it is told to.
Here what it refuses is refused in words, and before anything is loaded. It is never left to ask at the keyboard: whoever
calls it passes trust_remote_code, true or false.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from runner.errors import UserError
from runner.files import read_json

# For a hub model that has only .bin files, transformers would ask a service on the internet to convert it, behind our back
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

SETTINGS = ("config.json", "tokenizer_config.json")


def refuse_code(path: str, revision: str | None, remedy: str = "type model.trust_remote_code=true") -> None:
    """Raise UserError when the settings of a checkpoint (folder or hub id) ask for Python code of its own, or of others."""
    for name in SETTINGS:
        file = _file(path, name, revision)
        settings = read_json(Path(file)) if file else {}
        if asked := _code_of(settings):
            raise UserError(
                f"{path} brings Python code of its own ({asked} in {name}), which would run on this machine: refused. "
                f"Read that code; if you trust it, {remedy}"
            )


def _code_of(settings: dict) -> str | None:
    """The setting through which transformers would run code that is not its own."""
    if settings.get("auto_map"):
        return "auto_map"
    attention = settings.get("attn_implementation") or settings.get("_attn_implementation")
    return f"the attention kernel {attention}" if isinstance(attention, str) and "/" in attention else None


def refused_pickle(path: str, revision: str | None) -> UserError:
    """The message for a checkpoint whose pickles torch has refused to load."""
    settings = _file(path, "config.json", revision)
    found = next(_with_code(Path(settings).parent), None) if settings else None
    what = found or f"a .bin file of {path} holds more than tensors"
    return UserError(f"{what}: refused, and none of it was run. Use a checkpoint in safetensors, from someone you trust")


def _with_code(folder: Path) -> Iterator[str]:
    """'<file> holds ...' for each pickle in a folder that is more than tensors. Reads them without running them."""
    from torch.serialization import get_unsafe_globals_in_checkpoint

    for file in sorted(folder.glob("*.bin")):
        try:
            if calls := get_unsafe_globals_in_checkpoint(str(file)):
                yield f"{file} holds code that would run when it is loaded ({', '.join(calls)})"
        except Exception:  # torch can list the calls of files in its present format only
            yield f"{file} is damaged, or holds code that would run when it is loaded"


def _file(path: str, name: str, revision: str | None) -> str | None:
    """Where a file of a checkpoint lies on this machine, fetched if need be; None when there is none."""
    if Path(path).is_dir():
        return str(Path(path, name)) if Path(path, name).is_file() else None
    from transformers.utils import cached_file

    absent = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
    with suppress(OSError, ValueError):  # no such checkpoint: whoever loads it next says so
        return cached_file(path, name, revision=revision, **absent)
    return None


def has_weights(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in ("*.safetensors", "*.bin"))


# Any of these holds the vocabulary of a tokenizer
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def check_vocabulary(folder: Path) -> None:
    """Raise UserError when a model folder has no tokenizer, or one whose JSON is cut short: what transformers says then names no file."""
    found = [folder / name for name in VOCABULARIES if (folder / name).is_file()]
    if folder.is_dir() and not found:
        raise UserError(
            f"model folder {folder} has no tokenizer: none of {', '.join(VOCABULARIES)}. Copy the tokenizer's files of its base "
            f"model there, or write them with tokenizer.save_pretrained('{folder}')"
        )
    for file in found:
        if file.suffix == ".json":
            read_json(file)


def check_weights(folder: Path) -> None:
    """Raise UserError when a model folder has no weights, or when a safetensors file is not whole. Reads headers only."""
    from safetensors import SafetensorError, safe_open

    if not has_weights(folder):
        raise UserError(f"model folder {folder} has no weights: neither *.safetensors nor *.bin")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "np"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged ({error}): copy or download it again") from error
