"""From the rows of the sources to the examples that a stage owns, and the count of what was lost on the way."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from runner.config import Dataset, Source
from runner.data.adapters import BadRow, Dropped, Example, Unmapped, adapt
from runner.data.sources import BrokenRow, rows, sources_of
from runner.data.split import phase_of, prompt_hash
from runner.errors import UserError


@dataclass
class Counts:
    """What became of the rows of a stage."""

    train: int = 0
    eval: int = 0
    truncated: int = 0
    dropped: Counter = field(default_factory=Counter)
    owned: Counter = field(default_factory=Counter)  # examples per stage, before any is dropped


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
    if error.verdict:
        return (
            f"Field {error.verdict} says which answer is better, and no map reads that: write the rows as prompt, chosen and rejected first"
        )
    if source.path != dataset.path:
        return f"Name its fields prompt and response, or give its source a map in a conf/dataset/ file. {skip}"
    return f"If all rows are like this one, type dataset.fields='{error.map}' (leave out what is not there). {skip}"


def _prompts_of_other_stages(dataset: Dataset) -> set[int]:
    """Hashes of comparisons' prompts that belong to reward model or PPO: SFT must not see them in a demonstration."""
    shared = ((s, e) for s in sources_of(dataset).values() if not s.sft_only for e in adapted(dataset, s, Counts()))
    numbers = {prompt_hash(e.prompt) for s, e in shared if not is_demonstration(s, e)}
    return {n for n in numbers if phase_of(n, dataset.split) != "sft"}
