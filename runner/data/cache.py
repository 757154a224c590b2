"""Tokenised data of one stage: built once under its content key, memory-mapped from then on, never pickled.

A cache folder holds train.arrow, eval.arrow and counts.json. Rows by stage:
    sft     input_ids, prompt_length, length, source
    reward  chosen_ids, rejected_ids, prompt_length, length (the longer one), source
    ppo     input_ids (the prompt), turns (JSON), length, source
Prompts longer than the limit lose their beginning. Responses are never cut, because their end and EOS carry the meaning:
longer ones are dropped. Everything that is cut or dropped is counted.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from runner.config import SHARES, Dataset, Model, Source
from runner.data.adapters import BadRow, Dropped, Example, Unmapped, adapt, check_text
from runner.data.sources import VERSION, BrokenRow, content_key, data_key, plain_source, rows, sources_of
from runner.data.split import held_out, phase_of, prompt_hash
from runner.durable.lock import lock
from runner.errors import UserError
from runner.files import whole_folder
from runner.tokenizer import encode_responses, fingerprint, gap, plain, render_prompt

BATCH = 1000


@dataclass
class Counts:
    """What became of the rows of a stage."""

    train: int = 0
    eval: int = 0
    truncated: int = 0
    dropped: Counter = field(default_factory=Counter)
    owned: Counter = field(default_factory=Counter)  # examples per stage, before any is dropped


# --- from rows to examples --------------------------------------------------------------------------------------------


def examples(dataset: Dataset, stage: str, counts: Counts) -> Iterator[tuple[str, Example, int]]:
    """Yield (source name, example, prompt hash) of the rows that belong to a stage, counting what is dropped.

    The hash of the prompt decides. Demonstrations, which only SFT can use, go there whatever their hash.
    """
    taken = None
    for name, source in sources_of(dataset).items():
        if source.sft_only and stage != "sft":
            continue
        for example in adapted(dataset, source, counts):
            number = prompt_hash(example.prompt)
            owner = phase_of(number, dataset.split)
            if owner != "sft" and is_demonstration(source, example):
                owner = "sft"
                if stage == "sft":
                    taken = _prompts_of_other_stages(dataset) if taken is None else taken
                    if number in taken:
                        counts.dropped["prompt belongs to another stage"] += 1
                        continue
            counts.owned[owner] += 1
            if owner == stage:
                yield name, example, number


def is_demonstration(source: Source, example: Example) -> bool:
    """Whether only SFT can use a row."""
    return source.sft_only or example.rejected is None


def adapted(dataset: Dataset, source: Source, counts: Counts) -> Iterator[Example]:
    """Examples of one source; broken rows end the run or are counted, as dataset.on_bad_row says."""
    index = None
    for index, (where, row) in enumerate(rows(source, dataset.toy_rows)):
        if dataset.max_rows is not None and index >= dataset.max_rows:
            return
        try:
            if isinstance(row, BrokenRow):
                raise row
            yield adapt(source.adapter, row, source.fields)
        except Dropped as reason:
            counts.dropped[str(reason)] += 1
        except (BrokenRow, BadRow) as error:
            if dataset.on_bad_row == "error":
                raise UserError(f"{where}: {error}. {_cure(dataset, source, error)}") from error
            counts.dropped["broken row"] += 1
    if index is None:
        raise UserError(f"{source.path} holds no rows")


def _cure(dataset: Dataset, source: Source, error: Exception) -> str:
    skip = "Mend the row, or type dataset.on_bad_row=skip to count such rows and go on"
    if not isinstance(error, Unmapped):
        return skip
    if source.path != dataset.path:
        return f"Name its fields prompt and response, or give its source a map in a conf/dataset/ file. {skip}"
    return f"If all rows are like this one, type dataset.fields='{error.map}' (leave out what is not there). {skip}"


def _prompts_of_other_stages(dataset: Dataset) -> set[int]:
    """Hashes of comparisons' prompts that belong to reward model or PPO: SFT must not see them in a demonstration."""
    shared = ((s, e) for s in sources_of(dataset).values() if not s.sft_only for e in adapted(dataset, s, Counts()))
    numbers = {prompt_hash(e.prompt) for s, e in shared if not is_demonstration(s, e)}
    return {n for n in numbers if phase_of(n, dataset.split) != "sft"}


# --- from examples to tokens ------------------------------------------------------------------------------------------


class Encoder:
    """Turns batches of examples into rows of one stage."""

    def __init__(self, stage: str, tokenizer, model: Model, counts: Counts):
        self.stage, self.tokenizer, self.counts = stage, tokenizer, counts
        self.max_prompt, self.max_response = model.max_prompt_tokens, model.max_response_tokens
        self.seen: set[tuple[int, ...]] = set()

    def __call__(self, batch: list[tuple[str, Example, int]]) -> list[tuple[dict, int]]:
        """(row, prompt hash) for every example that is kept."""
        batch = [item for item in batch if not self._is_useless(item[1])]
        rendered = [self._rendered(example) for _, example, _ in batch]
        batch = [item for item, text in zip(batch, rendered, strict=True) if text is not None]
        if not batch:
            return []
        texts = [text for text in rendered if text is not None]
        prompts = [self._cut(ids) for ids in self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids]
        encode = {"sft": self._sft, "reward": self._reward, "ppo": self._ppo}[self.stage]
        made = encode([e for _, e, _ in batch], prompts)
        return [(row | {"source": name}, number) for row, (name, _, number) in zip(made, batch, strict=True) if row is not None]

    def _is_useless(self, example: Example) -> bool:
        """Drop and count what says nothing, or twice the same, without the special tokens that are taken out of every text."""
        texts = (example.prompt[-1]["content"], example.chosen, example.rejected)
        prompt, chosen, rejected = (text and plain(self.tokenizer, text).strip() for text in texts)
        reasons = {"empty prompt": not prompt, "empty response": not chosen or rejected == "", "identical pair": chosen == rejected}
        reason = next((name for name, true in reasons.items() if true), None)
        self.counts.dropped.update([reason] if reason else [])
        return bool(reason)

    def _rendered(self, example: Example) -> str | None:
        """The prompt as text; None, and counted, if the chat template refuses the dialogue."""
        try:
            return render_prompt(self.tokenizer, example.prompt)
        except UserError as refused:
            self.counts.dropped[str(refused)] += 1
            return None

    def _cut(self, ids: list[int]) -> list[int]:
        if len(ids) <= self.max_prompt:
            return ids
        self.counts.truncated += 1
        start = [ids[0]] if ids[0] == self.tokenizer.bos_token_id else []
        return start + ids[len(ids) - self.max_prompt + len(start) :]

    def _responses(self, texts: list[str]) -> list[list[int] | None]:
        made = encode_responses(self.tokenizer, texts)
        return [ids if len(ids) <= self.max_response else None for ids in made]

    def _too_long(self) -> None:
        self.counts.dropped[f"response longer than {self.max_response} tokens"] += 1

    def _sft(self, batch: list[Example], prompts: list[list[int]]):
        for prompt, response in zip(prompts, self._responses([e.chosen for e in batch]), strict=True):
            if response is None:
                self._too_long()
                yield None
            else:
                yield {"input_ids": prompt + response, "prompt_length": len(prompt), "length": len(prompt) + len(response)}

    def _reward(self, batch: list[Example], prompts: list[list[int]]):
        chosen, rejected = self._responses([e.chosen for e in batch]), self._responses([e.rejected for e in batch])
        for prompt, good, bad in zip(prompts, chosen, rejected, strict=True):
            if good is None or bad is None:
                self._too_long()
                yield None
            else:
                length = len(prompt) + max(len(good), len(bad))
                yield {"chosen_ids": prompt + good, "rejected_ids": prompt + bad, "prompt_length": len(prompt), "length": length}

    def _ppo(self, batch: list[Example], prompts: list[list[int]]):
        for example, prompt in zip(batch, prompts, strict=True):
            if tuple(prompt) in self.seen:
                self.counts.dropped["same prompt again"] += 1
                yield None
            else:
                self.seen.add(tuple(prompt))
                yield {"input_ids": prompt, "turns": json.dumps(example.prompt, ensure_ascii=False), "length": len(prompt)}


# --- the cache --------------------------------------------------------------------------------------------------------


def build(store: Path, dataset: Dataset, stage: str, tokenizer, model: Model) -> Path:
    """The cache folder of a stage, built if it does not exist. Parallel jobs build it once, and DPO shares the reward model's."""
    share = SHARES[stage]
    facts = data_key(dataset) | {"stage": share, "tokenizer": fingerprint(tokenizer)}
    facts |= {"max_prompt_tokens": model.max_prompt_tokens, "max_response_tokens": model.max_response_tokens}

    def fill(folder: Path) -> None:
        counts = Counts()
        encoder = Encoder(share, tokenizer, model, counts)
        made = _encoded(examples(dataset, share, counts), encoder, f"tokenising {dataset.name} for {stage}")
        _write(folder, stage, dataset, made, counts)

    return _cached(store, f"{share}-{_short_hash(facts)}", fill)


def build_pretrain(store: Path, dataset: Dataset, tokenizer, model: Model) -> Path:
    """Plain text for the ptx mixture, cut into blocks of prompt + response length: SFT rows without a prompt."""
    sources = [plain_source(path, sft_only=True) for path in dataset.pretrain]
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

    return _cached(store, f"pretrain-{_short_hash(facts)}", fill)


def training_texts(dataset: Dataset, tokenizer, limit: int = 20_000) -> Iterator[str]:
    """Rendered demonstrations, to train a tokenizer on."""
    for index, (_, example, _) in enumerate(examples(dataset, "sft", Counts())):
        if index >= limit:
            return
        yield render_prompt(tokenizer, example.prompt) + gap(tokenizer) + example.chosen


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
    return UserError(f"the tokenised data in {folder} are damaged ({error}): delete this folder, and they are made anew")


def _short_hash(facts: dict) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


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
        for row, number in made:
            if held_out(number, dataset.holdout):
                held.add(row)
                counts.eval += 1
                continue
            copies = copies_of(sources_of(dataset)[row["source"]].weight, number)
            counts.train += copies
            for _ in range(copies):
                train.add(row)
    if not counts.train or not counts.eval:
        lacks = "evaluate on" if counts.train else "train on"
        raise UserError(f"stage {stage} has no rows to {lacks} in dataset={dataset.name}: {_why_empty(dataset, stage, counts)}")
    _finish(folder, counts)


def _why_empty(dataset: Dataset, stage: str, counts: Counts) -> str:
    if (share := getattr(dataset.split, SHARES[stage])) == 0:
        return f"dataset.split.{SHARES[stage]}={share:g}"
    every = [(source, example) for source in sources_of(dataset).values() for example in adapted(dataset, source, Counts())]
    if stage != "sft" and every and all(is_demonstration(*one) for one in every):
        beside = f"dataset.sft_only=[{dataset.path or 'FILE'}]"
        return f"its rows have no `rejected` and serve SFT only. Type stage=sft, or give pairs and put these rows beside them: {beside}"
    dropped = ", ".join(f"{n} {reason}" for reason, n in counts.dropped.most_common() if n)
    if not every:
        needs = "a prompt that ends with a user turn, a response, and a worse one, if any, that differs"
        return f"all were dropped: {dropped}. A row needs {needs}"
    reason, most = next(iter(counts.dropped.most_common(1)), ("", 0))
    if most > counts.train + counts.eval and reason.startswith("response longer"):
        return (
            f"{counts.train} train, {counts.eval} held out, dropped: {dropped}. Raise model.max_response_tokens, or give shorter responses"
        )
    prompts = len({prompt_hash(example.prompt) for _, example in every})
    return (
        f"{counts.train} train, {counts.eval} held out, dropped: {dropped or 'none'}. All its rows together have {prompts} different "
        f"prompt{'s' * (prompts != 1)}, and a prompt serves one stage, to train on or to hold out. "
        "Give more prompts, or change dataset.split or dataset.holdout"
    )


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
