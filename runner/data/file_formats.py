"""Rows of a local file: JSON lines, JSON, tables, Parquet, and folders that `datasets` has written."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from runner.checks.paths import SUFFIXES
from runner.errors import UserError

LIST_HINT = "; a file that holds one list of rows is called .json: rename it"
COMMA_HINT = "; a row ends with its }, without a comma"
UTF_16 = ("\udcff\udcfe", "\udcfe\udcff")  # its byte order marks, as `_open` reads them


class BrokenRow(Exception):
    """A line that is not a JSON object; the message says where and why."""


def file_rows(path: Path, split: str) -> Iterator[tuple[str, dict | BrokenRow]]:
    """Yield (where, row). A line that cannot be read comes as a BrokenRow. split: of a folder that has several."""
    if path.is_dir():
        shards = shards_of(path, split)
        return (row for shard in shards for row in _parquet_rows(shard)) if shards else _saved_rows(path, split)
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if path.suffix in (".csv", ".tsv"):
        return _table_rows(path)
    return _line_rows(path) if ".jsonl" in path.suffixes else _json_rows(path)


def shards_of(folder: Path, split: str) -> list[Path]:
    """The Parquet files of a split, as the hub keeps data sets: data/train-00000-of-00002.parquet."""
    name = f"{split}-*-of-*.parquet"
    return sorted([*folder.glob(name), *folder.glob(f"*/{name}")])  # no deeper: the folder may be a whole disk


def _line_rows(path: Path) -> Iterator[tuple[str, dict | BrokenRow]]:
    with _open(path) as lines:
        for number, line in enumerate(_readable(lines, path), 1):
            if line.strip():
                yield f"{path}:{number}", _parse(line)


def _open(path: Path):
    """Open as UTF-8, with or without a byte order mark. Other bytes become surrogates, which dialogue.check_text finds."""
    return (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", errors="surrogateescape")


def _readable(lines, path: Path) -> Iterator[str]:
    try:
        for number, line in enumerate(lines):
            if number == 0 and line.startswith(UTF_16):
                raise UserError(f"{path} is in UTF-16, not UTF-8: convert its text with iconv -f UTF-16 -t UTF-8 OLD > NEW")
            yield line
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}. Is it complete?") from error


def _parse(text: str) -> dict | BrokenRow:
    try:
        value = json.loads(text.rstrip())  # or a cut row would be said to be wrong at column 1, of the next line
    except json.JSONDecodeError as error:
        return BrokenRow(_not_json(error) + LIST_HINT * (text.strip() == "[") + COMMA_HINT * text.rstrip().endswith(","))
    except (ValueError, RecursionError) as error:
        return BrokenRow(f"not valid JSON ({error})")
    if isinstance(value, list):
        return BrokenRow(f"a row must be a JSON object, this is a list{LIST_HINT}")
    return value if isinstance(value, dict) else BrokenRow(f"a row must be a JSON object, this is a {type(value).__name__}")


def _not_json(error: json.JSONDecodeError) -> str:
    return f"not valid JSON ({error.msg.removesuffix(' at')} at column {error.colno})"


def _json_rows(path: Path) -> Iterator[tuple[str, dict | BrokenRow]]:
    with _open(path) as handle:
        text = "".join(_readable(handle, path))
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object per line in a file called .json
            yield from _line_rows(path)
            return
        comma = text[: error.pos].rstrip().endswith(",") and text[error.pos :].startswith("]")
        hint = "; there is a comma behind the last row" if comma else ""
        raise UserError(f"{path}:{error.lineno}: {_not_json(error)}{hint}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if isinstance(values, dict):
        lists = [v for v in values.values() if isinstance(v, list)]
        values = lists[0] if len(lists) == 1 else [values]
    if not isinstance(values, list):
        raise UserError(f"{path} is not a list of JSON objects but a single {type(values).__name__}")
    for number, value in enumerate(values, 1):
        ok = isinstance(value, dict)
        yield f"{path} row {number}", value if ok else BrokenRow(f"a row must be a JSON object, this is a {type(value).__name__}")


def _table_rows(path: Path) -> Iterator[tuple[str, dict | BrokenRow]]:
    csv.field_size_limit(2**31 - 1)  # 131,072 characters otherwise
    with _open(path) as lines:
        table = csv.DictReader(_readable(lines, path), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            if [";" in name for name in table.fieldnames or ()] == [True]:
                raise UserError(f"{path}:1: the columns are separated by semicolons: save the table with commas, or with tabs as .tsv")
            for row in table:
                odd = None in row or None in row.values()  # as it names values without a name, and names without a value
                broken = BrokenRow("the row has not as many values as the header has names")
                yield f"{path}:{table.line_num}", broken if odd else _filled(row)
        except csv.Error as error:
            raise UserError(f"{path}:{table.reader.line_num}: {error}. A quote inside a value is written twice, within quotes") from error


def _filled(row: dict[str, str]) -> dict[str, str | None]:
    """A table has no null: an empty cell stands for it."""
    return {name: value or None for name, value in row.items()}


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a Parquet file: {error}") from error
    number, batches = 0, file.iter_batches()
    while batch := _next_rows(batches, path):
        for row in batch:
            number += 1
            yield f"{path} row {number}", row


def _next_rows(batches: Iterator, path: Path) -> list[dict]:
    """Rows of the next batch that has some; [] at the end."""
    from pyarrow import ArrowException

    try:
        return next((rows for batch in batches if (rows := batch.to_pylist())), [])
    except (ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}. Is it complete?") from error


def _saved_rows(path: Path, split: str) -> Iterator[tuple[str, dict]]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # a file that is not what it should be makes it raise anything
        hint = f"name a {', '.join(SUFFIXES)} file"
        raise UserError(f"folder {path} was not written by datasets' save_to_disk ({error!r}); {hint}") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise UserError(f"folder {path} has no split {split}; it has {', '.join(saved)}")
        saved = saved[split]
    yield from ((f"{path} row {i}", row) for i, row in enumerate(saved, 1))
