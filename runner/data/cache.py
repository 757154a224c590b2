"""Tokenised data of one stage: built once under its content key, memory-mapped from then on, never pickled.

A cache folder holds train.arrow, eval.arrow and counts.json. Rows by stage:
    sft     input_ids, prompt_length, length, source
    reward  chosen_ids, rejected_ids, prompt_length, length (the longer one), source
    ppo     input_ids (the prompt), turns (JSON), length, source
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from runner.config.schema import SHARES, Dataset, Model, Source
from runner.data.dialogue import BadRow, check_text
from runner.data.encoder import Encoder
from runner.data.examples import Counts, adapted, can_use, each_answer, examples, only_use
from runner.data.sources import VERSION, content_key, data_key, has_rows_for, rows, sources_of
from runner.data.split import held_out, held_out_above, phase_of, prompt_hash
from runner.durable.lock import lock
from runner.errors import UserError
from runner.files import hash_of, whole_folder
from runner.models.tokenizer import fingerprint, plain

BATCH = 1000


def build(store: Path, dataset: Dataset, stage: str, tokenizer, model: Model) -> Path:
    """The cache folder of a stage, built if it does not exist. Parallel jobs build it once, and DPO shares the reward model's."""
    share = SHARES[stage]
    facts = data_key(dataset, share) | {"stage": share, "tokenizer": fingerprint(tokenizer)}
    facts["names"] = list(sources_of(dataset))  # which rows keep, and evaluations report
    facts |= {"max_prompt_tokens": model.max_prompt_tokens, "max_response_tokens": model.max_response_tokens}

    def fill(folder: Path) -> None:
        counts = Counts()
        encoder = Encoder(share, tokenizer, model, counts)
        found = examples(dataset, share, counts)
        if stage == "sft" and dataset.every_answer:
            found = each_answer(found)
        made = _encoded(found, encoder, f"tokenising {dataset.name} for {stage}")
        _write(folder, stage, dataset, made, counts)

    return _cached(store, f"{share}-{hash_of(facts)[:12]}", fill)


def build_pretrain(store: Path, dataset: Dataset, tokenizer, model: Model) -> Path:
    """Plain text for the ptx mixture, cut into blocks of prompt + response length: SFT rows without a prompt."""
    sources = [Source(path) for path in dataset.pretrain]
    block = model.max_prompt_tokens + model.max_response_tokens
    facts = {"pretrain": [content_key(s, 0) for s in sources], "block": block, "tokenizer": fingerprint(tokenizer), "version": VERSION}

    def fill(folder: Path) -> None:
        counts, pending = Counts(), []
        with _Writer(folder / "train.arrow") as train, _Writer(folder / "eval.arrow"):
            for source in sources:
                for where, row in rows(source, 0):
                    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                        raise UserError(f"{where}: a pretraining row needs a field 'text' that holds a string")
                    try:
                        check_text(row["text"])
                    except BadRow as error:
                        raise UserError(f"{where}: {error}") from error
                    pending += [*tokenizer(plain(tokenizer, row["text"]), add_special_tokens=False).input_ids, tokenizer.eos_token_id]
                    while len(pending) >= block:
                        train.add({"input_ids": pending[:block], "prompt_length": 0, "length": block, "source": source.path})
                        pending = pending[block:]
                        counts.train += 1
        if not counts.train:
            raise UserError(f"dataset.pretrain holds fewer than the {block} tokens of one block")
        _finish(folder, counts)

    return _cached(store, f"pretrain-{hash_of(facts)[:12]}", fill)


def load(folder: Path):
    """The memory-mapped rows of a cache folder, and its counts: (train, eval, counts)."""
    import datasets
    from pyarrow import ArrowException

    try:
        train, held = datasets.Dataset.from_file(str(folder / "train.arrow")), folder / "eval.arrow"
        # The ptx mixture has no held-out rows, and an Arrow file without rows has no schema
        held = datasets.Dataset.from_file(str(held)) if held.stat().st_size else train.select([])
    except (ArrowException, OSError) as error:
        raise _damaged(folder, error) from error
    return train, held, counts_of(folder)


def mean_lengths(folder: Path) -> tuple[int, float, float]:
    """Number of training rows in a cache folder, and their mean tokens: of the prompts, and of whole rows."""
    rows, _, _ = load(folder)
    lengths = np.asarray(rows["length"])
    prompts = np.asarray(rows["prompt_length"]) if "prompt_length" in rows.column_names else lengths
    return len(rows), float(prompts.mean()), float(lengths.mean())


def counts_of(folder: Path) -> dict:
    """The counts of a cache folder."""
    try:
        return json.loads((folder / "counts.json").read_text())
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> UserError:
    return UserError(f"the tokenised data in {folder} is damaged ({error}): delete this folder and it will be rebuilt")


def _cached(store: Path, name: str, fill) -> Path:
    folder = store / "data" / name
    with lock(store / "locks" / f"data-{name}", f"the tokenised data {name}"):
        if not folder.exists():
            with whole_folder(folder) as work:
                fill(work)
    return folder


def _encoded(source: Iterator, encoder: Encoder, title: str) -> Iterator[tuple[dict, int]]:
    live = sys.stderr.isatty()
    if not live:
        print(title, file=sys.stderr, flush=True)
    with Progress("{task.description}: {task.completed} rows", console=Console(stderr=True), transient=True, disable=not live) as progress:
        task = progress.add_task(title, total=None)
        batch = []
        for item in source:
            batch.append(item)
            if len(batch) == BATCH:
                yield from encoder(batch)
                progress.advance(task, len(batch))
                batch = []
        if batch:
            yield from encoder(batch)


def _write(folder: Path, stage: str, dataset: Dataset, made: Iterator[tuple[dict, int]], counts: Counts) -> None:
    with _Writer(folder / "train.arrow") as train, _Writer(folder / "eval.arrow") as held:
        sources, seen = sources_of(dataset), set()
        for row, number in made:
            source = sources[row["source"]]
            if source.only == "eval" or (not dataset.has_own_tests and held_out(number, dataset.holdout)):
                held.add(row)
                counts.eval += 1
                continue
            content = hash(tuple(token for name, ids in row.items() if name.endswith("_ids") for token in ids))
            counts.repeated += content in seen
            seen.add(content)
            copies = copies_of(source.weight, number)
            counts.train += copies
            for _ in range(copies):
                train.add(row)
    if not counts.train or not counts.eval:
        lacks = "evaluate on" if counts.train else "train on"
        raise UserError(f"stage {stage} has no rows to {lacks} in dataset={dataset.name}: {_why_empty(dataset, stage, counts)}")
    _finish(folder, counts)


def _why_empty(dataset: Dataset, stage: str, counts: Counts) -> str:
    share, sources = SHARES[stage], sources_of(dataset).values()
    if not has_rows_for(dataset, share):
        return f"dataset.split.{share}=0"
    to_evaluate = [example for source in sources if source.only == "eval" for example in adapted(dataset, source, Counts())]
    if dataset.has_own_tests and not any(can_use(share, example) for example in to_evaluate):
        return f"no row of dataset.eval_only has a `{'rejected' if share == 'reward' else 'response'}`"
    if to_evaluate and not counts.train and counts.dropped["prompt is held out"]:
        return "the rows of dataset.eval_only have all of its prompts"
    every = [(source, example) for source in sources if source.only != "eval" for example in adapted(dataset, source, Counts())]
    if stage != "sft" and every and not any(only_use(*one) in (None, share) for one in every):
        beside = f"give pairs and put these rows beside them: dataset.sft_only='[{dataset.path or 'FILE'}]'"
        return f"none of its rows has a `rejected`: only SFT can use them. Type stage=sft, or {beside}"
    if all(source.only == "eval" for source in sources):
        return "all its sources are to evaluate on (only=eval)"
    dropped = ", ".join(f"{n} {reason}" for reason, n in counts.dropped.most_common() if n)
    if not every:
        needs = "a prompt that ends with a user turn, a response, and a worse one, if any, that differs"
        return f"all were dropped: {dropped}. A row needs {needs}"
    reason, most = next(iter(counts.dropped.most_common(1)), ("", 0))
    if most > counts.train + counts.eval and reason.startswith("response longer"):
        return (
            f"{counts.train} train, {counts.eval} held out, dropped: {dropped}. Raise model.max_response_tokens, or give shorter responses"
        )
    if most > counts.train + counts.eval and reason == "prompt belongs to another stage":
        return f"{most} of its rows have prompts that {'PPO has for itself' if dataset.ppo_only else 'belong to another stage'}"
    owners = {(prompt_hash(example.prompt), only_use(source, example)) for source, example in every}
    prompts = len({number for number, _ in owners})
    holdout = _working_holdout([(number, only or phase_of(number, dataset.split)) for number, only in owners])
    instead = f"type dataset.holdout={holdout}" if holdout not in (None, dataset.holdout) else "change dataset.split or dataset.holdout"
    return (
        f"{counts.train} train, {counts.eval} held out, dropped: {dropped or 'none'}. All its rows together have {prompts} different "
        f"prompt{'s' * (prompts != 1)}, and each prompt is used by one stage, to train on or to hold out. "
        f"Give more prompts, or {instead}"
    )


def _working_holdout(owned: list[tuple[int, str]]) -> float | None:
    """The least of some usual values that leaves each stage rows to train on and to evaluate on; stages of one prompt aside."""
    points = [[held_out_above(number) for number, owner in owned if owner == stage] for stage in {owner for _, owner in owned}]
    points = [stage for stage in points if len(stage) > 1]
    works = (share for share in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5) if all(min(stage) < share <= max(stage) for stage in points))
    return next(works, None) if points else None


def copies_of(weight: float, number: int) -> int:
    """How often a row is trained on per pass: a weight of 2.5 is two copies, and a third of every other prompt."""
    whole = int(weight)
    return whole + (number % 10_000 < (weight - whole) * 10_000)


def _finish(folder: Path, counts: Counts) -> None:
    counts.dropped = Counter({reason: n for reason, n in counts.dropped.items() if n})
    (folder / "counts.json").write_text(json.dumps(vars(counts), indent=2))


class _Writer:
    """Rows into an Arrow file that `datasets` memory-maps."""

    def __init__(self, path: Path):
        from datasets.arrow_writer import ArrowWriter

        self.writer, self.empty = ArrowWriter(path=str(path)), True

    def add(self, row: dict) -> None:
        self.writer.write(row)
        self.empty = False

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None and not self.empty:
            self.writer.finalize()
        else:
            self.writer.close()
