"""From the rows of the sources to the examples that a stage owns, and the count of what was lost on the way."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, partial

from runner.config.schema import Dataset, Source
from runner.data.adapters import adapt, published_like
from runner.data.dialogue import BadRow, Dropped, Example, Unmapped
from runner.data.field_names import guessed_map, why_no_map
from runner.data.file_formats import BrokenRow
from runner.data.sources import rows, sources_of
from runner.data.split import phase_of, prompt_hash
from runner.errors import UserError


@dataclass
class Counts:
    """What became of the rows of a stage."""

    train: int = 0
    eval: int = 0
    truncated: int = 0
    repeated: int = 0  # rows to train on that are exact copies of one before them
    dropped: Counter = field(default_factory=Counter)
    owned: Counter = field(default_factory=Counter)  # examples per stage, before the encoder drops any
    elsewhere: Counter = field(default_factory=Counter)  # comparisons whose prompts the split gives to another stage
    needed: Counter = field(default_factory=Counter)  # tokens that dropped responses need, rounded up -> how many
    earlier: int = 0  # answers before the last one of dialogues that are no pairs
    special: Counter = field(default_factory=Counter)  # special token -> rows that it was taken out of
    foreign: Counter = field(default_factory=Counter)  # mark of another chat template -> rows that hold it


def examples(dataset: Dataset, stage: str, counts: Counts) -> Iterator[tuple[str, Example, int]]:
    """Yield (source name, example, prompt hash) of the rows that belong to a stage, counting what is dropped.

    Rows to evaluate on (`eval_only`) belong to all stages that can use them, and no stage trains on their prompts. A comparison belongs
    to the stage of its prompt's hash. Demonstrations go to SFT and prompts alone to PPO, as no other stage can use them, unless their
    prompt belongs to another stage: by a comparison, or one of PPO's own.
    """
    evaluated, sources = _evaluated_prompts(dataset), sources_of(dataset)
    owners = cache(partial(_owners, dataset))  # reads all sources: only if a row asks for it
    # A demonstration may have one of PPO's own prompts, whatever its hash. Without such, only a hash of another stage needs a look
    hides = stage == "sft" and any(source.only == "ppo" or source.adapter == "prompts" for source in sources.values())

    def owned_elsewhere(number: int) -> bool:
        return (hides or phase_of(number, dataset.split) != stage) and owners().get(number, stage) != stage

    for name, source in sources.items():
        if source.only not in (None, "eval", stage):
            continue
        for example in adapted(dataset, source, counts):
            number, only = prompt_hash(example.prompt), only_use(source, example)
            if only == "eval":
                if can_use(stage, example):
                    yield name, example, number
                continue
            if only == stage and owned_elsewhere(number):
                counts.dropped["prompt belongs to another stage"] += 1
                continue
            owner = only or phase_of(number, dataset.split)
            counts.owned[owner] += 1
            if owner != stage:
                counts.elsewhere[owner] += only is None
                continue
            if number in evaluated:
                counts.dropped["prompt is held out"] += 1
                continue
            yield name, example, number


def each_answer(dialogues: Iterator[tuple[str, Example, int]]) -> Iterator[tuple[str, Example, int]]:
    """Every answer of each dialogue as an example of its own, with the turns before it as its prompt."""
    for name, example, number in dialogues:
        for i, turn in enumerate(example.prompt):
            if turn["role"] == "assistant" and i and example.prompt[i - 1]["role"] == "user":
                yield name, Example(example.prompt[:i], turn["content"]), number
        yield name, example, number


def can_use(stage: str, example: Example) -> bool:
    """Whether a row has what a stage needs beside the prompt."""
    return {"sft": example.chosen, "reward": example.rejected, "ppo": example.prompt}[stage] is not None


def only_use(source: Source, example: Example) -> str | None:
    """What alone a row serves: a stage, or "eval". None for a comparison, which any stage can use."""
    if source.only or example.rejected is not None:
        return source.only
    return "ppo" if example.chosen is None else "sft"


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
    skip = "Fix the row, or type dataset.on_bad_row=skip to count such rows and go on"
    if not isinstance(error, Unmapped):
        return skip
    prompts = source.adapter == "prompts"
    if not prompts and (known := published_like(error.row)):
        return f"It looks like a row of a published set: {_with_adapter(dataset, source, known[0])}"
    if not prompts and (why := why_no_map(error.row)):
        return why
    map = guessed_map(error.row, error.mapped)
    if source.path != dataset.path:
        names = "field prompt" if prompts else "fields prompt and response"
        own = _name(dataset, source)
        give = f"type dataset.sources.{own}.fields='{map}'" if own else "make it a source of its own, with a map (README, Your own data)"
        return f"Name its {names}, or {give}. {skip}"
    alone = "" if prompts else " Only PPO can use prompts without an answer: dataset=prompts reads them, or dataset.ppo_only beside pairs."
    return f"If all rows are like this one, type dataset.fields='{map}' (leave out what is not there).{alone} {skip}"


def _with_adapter(dataset: Dataset, source: Source, adapter: str) -> str:
    """What to type for another adapter."""
    name = _name(dataset, source)
    own = f"make this file a source of its own: dataset.sources.more='{{path: {source.path}, adapter: {adapter}, only: {source.only}}}'"
    return f"type dataset.sources.{name}.adapter={adapter}" if name else own


def _name(dataset: Dataset, source: Source) -> str | None:
    """The name of a source; the plain paths of `sft_only` and the like have none, and no keys of their own."""
    return next((name for name, other in dataset.sources.items() if other is source), None)


def _owners(dataset: Dataset) -> dict[int, str]:
    """The stage of each prompt that more than one stage could use: those of comparisons, then PPO's own. The others must not see it."""
    owners = {}
    for source in sources_of(dataset).values():
        if source.only not in (None, "ppo"):
            continue
        for example in adapted(dataset, source, Counts()):
            number, only = prompt_hash(example.prompt), only_use(source, example)
            if only is None:
                owners[number] = phase_of(number, dataset.split)
            elif only == "ppo":
                owners.setdefault(number, "ppo")
    return owners


def _evaluated_prompts(dataset: Dataset) -> set[int]:
    sources = (source for source in sources_of(dataset).values() if source.only == "eval")
    return {prompt_hash(example.prompt) for source in sources for example in adapted(dataset, source, Counts())}
