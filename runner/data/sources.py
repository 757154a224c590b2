"""Rows of a source: a local file, a folder written by `datasets`, the toy data, or a data set of the hub.

No torch and no tokenizer in here: the plan needs the key of the data.
"""

import difflib
import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path

from runner.checks.paths import SEVERAL, SUFFIXES, is_local
from runner.checks.secrets import redact
from runner.config.schema import Dataset, Source
from runner.data import toy
from runner.data.file_formats import BrokenRow, file_rows, shards_of
from runner.errors import UserError

# Increase it when an adapter, the encoder, the split or the order of the sources changes what becomes of a row
VERSION = 12

# A folder that datasets' save_to_disk has written holds one of these
SAVED_BY_DATASETS = ("state.json", "dataset_dict.json")


def sources_of(dataset: Dataset) -> dict[str, Source]:
    """All sources by name, with the plain paths of `sft_only` and the like. Sorted by name, so that the same key means the same rows."""
    plain = {"sft": dataset.sft_only, "ppo": dataset.ppo_only, "eval": dataset.eval_only}
    extra = {f"{only}_only_{i}": Source(path, only=only) for only, paths in plain.items() for i, path in enumerate(paths)}
    if not dataset.sft_only and all(source.adapter == "prompts" for source in dataset.sources.values()):
        for source in extra.values():
            source.adapter = "prompts"  # nothing here needs an answer, rows to evaluate on neither
    return dict(sorted((dict(dataset.sources) | extra).items()))


def has_rows_for(dataset: Dataset, share: str) -> bool:
    """Whether a share (sft, reward or ppo) gets prompts by the split, or has a source of its own."""
    return getattr(dataset.split, share) > 0 or any(source.only == share for source in sources_of(dataset).values())


def data_key(dataset: Dataset, share: str) -> dict:
    """What identifies the examples of a share (sft, reward or ppo): sources by content, and how they are split.

    Rows that are for one other stage alone are left out, so that more prompts for PPO train no reward model anew. SFT's holds all
    sources: PPO's own prompts are kept from it.
    """
    read = [s for s in sources_of(dataset).values() if share == "sft" or s.only in (None, "eval", share)]
    sources = [[_described(s), content_key(s, dataset.toy_rows)] for s in read]
    keys = ("split", "on_bad_row", "max_rows", *(() if dataset.has_own_tests else ("holdout",)))
    rest = {k: v for k, v in asdict(dataset).items() if k in keys}
    if share == "sft" and dataset.every_answer:
        rest["every_answer"] = True
    return {"version": VERSION, "sources": sources} | rest


def _described(source: Source) -> dict:
    """The fields that shape the rows. The path of a local file does not."""
    return {k: v for k, v in asdict(source).items() if k != "path" or not is_local(source.path)}


def rows(source: Source, toy_rows: int) -> Iterator[tuple[str, dict | BrokenRow]]:
    """Yield (where, row). A line that cannot be read comes as a BrokenRow, for the caller to raise or to count."""
    if source.adapter == "toy":
        yield from ((f"toy row {i}", toy.row(i)) for i in range(toy_rows))
    elif not is_local(source.path):
        yield from _hub_rows(source)
    else:
        yield from file_rows(_existing(source), source.split)


def content_key(source: Source, toy_rows: int) -> str:
    """What identifies the rows of a source: a hash of the file, or the hub's name and revision."""
    if source.adapter == "toy":
        return f"toy-{toy.VERSION}-{toy_rows}"
    if not is_local(source.path):
        return f"{source.path}@{source.revision or 'main'}"
    path = _existing(source)
    # datasets leaves the results of a filter or map beside the data
    saved = (p for p in path.rglob("*") if p.is_file() and not p.name.startswith("cache-")) if path.is_dir() else [path]
    files = shards_of(path, source.split) or sorted(saved)
    return _digest(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@cache
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Hash of the files' contents. Size and time are there for the cache: every stage, and every job of a sweep, asks again."""
    digest = hashlib.sha256()
    try:
        for file, _, _ in files:
            with file.open("rb") as handle:
                while block := handle.read(1 << 20):
                    digest.update(block)
    except OSError as error:
        raise UserError(f"data file {file} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _existing(source: Source) -> Path:
    path, found = source.path, Path(source.path)
    if not found.exists() and set(path) & set("*?["):
        raise UserError(f"data file {path} is a pattern, not the name of a file. {SEVERAL}")
    if not found.exists():
        there = sorted(p.name for p in found.parent.glob("*") if p.name.endswith(SUFFIXES) and p.exists()) if found.parent.is_dir() else []
        near = difflib.get_close_matches(found.name, there, n=3)
        more = f" and {len(there) - 8} more" if len(there) > 8 else ""
        every = f"; in {found.parent} there are: {', '.join(there[:8])}{more}" if there else ""
        hint = f"; similar names there: {', '.join(near)}" if near else every
        raise UserError(f"data file {path} does not exist (looked from {Path.cwd()}){hint}")
    for name in ("subset", "revision"):
        if (value := getattr(source, name)) is not None:
            raise UserError(f"{name}={value}: {path} lies on this disk, and only data sets of the hub have one: leave {name} out")
    if found.is_dir():  # checked before its files are hashed: it may be a whole disk
        if shards := shards_of(found, source.split):
            if len(places := sorted({str(shard.parent) for shard in shards})) > 1:
                raise UserError(f"folder {path} holds several data sets: name one of {', '.join(places)}")
            return found
        if not any((found / name).is_file() for name in SAVED_BY_DATASETS):
            inside = sorted(p.name for p in found.iterdir() if p.name.endswith(SUFFIXES))
            hint = (
                f": name one of {', '.join(inside[:8])}{f'. {SEVERAL}' * (len(inside) > 1)}"
                if inside
                else f"; name a {', '.join(SUFFIXES)} file"
            )
            raise UserError(f"folder {path} was not written by datasets' save_to_disk{hint}")
        _check_split(source, has_splits=(found / "dataset_dict.json").is_file())
        return found
    if not found.is_file():
        raise UserError(f"data file {path} is not a regular file, and it is read more than once: write its rows to a .jsonl file first")
    if not found.name.endswith(SUFFIXES):
        raise UserError(f"data file {path}: unknown format; use one of {', '.join(SUFFIXES)}")
    _check_split(source, has_splits=False)
    return found


def _check_split(source: Source, has_splits: bool) -> None:
    if not has_splits and source.split != "train":  # which is what stands where nobody has typed a split
        raise UserError(f"split={source.split}: {source.path} has no splits. Leave split out to read it whole, or name that split's file")


def _hub_rows(source: Source) -> Iterator[tuple[str, dict]]:
    import datasets

    try:
        # The hub's automatic Parquet branch has a folder per subset instead of named configurations
        subset = {"data_dir": source.subset} if source.revision == "refs/convert/parquet" else {"name": source.subset}
        loaded = datasets.load_dataset(source.path, **subset, split=source.split, revision=source.revision)
    except Exception as error:  # the hub's, the network's, or that of a broken file in there
        raise UserError(
            f"data set {source.path} cannot be loaded: {redact((str(error) or repr(error)).splitlines()[0])}. "
            "Check its name, subset and split; without network, use a file: dataset=jsonl dataset.path=/data/pairs.jsonl"
        ) from error
    yield from ((f"{source.path} row {i}", row) for i, row in enumerate(loaded, 1))
