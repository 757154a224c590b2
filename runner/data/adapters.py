"""Rows of data sets -> Example: a prompt as turns, one response, and a worse one where the row has it.

An adapter returns turns and plain texts only; the model's chat template puts the role names in, at tokenisation.
"""

from collections.abc import Callable
from functools import partial

from runner.data import published as sets
from runner.data.any_row import any_fields, prompts
from runner.data.dialogue import BadRow, Dropped, Example, check_text, kind_of
from runner.data.field_names import OURS
from runner.errors import UserError, did_you_mean

ADAPTERS: dict[str, Callable[[dict, dict], Example]] = {
    "rm_static": sets.hh_pair,
    "full_hh_rlhf": sets.hh_pair,
    "synthetic_instruct": sets.synthetic_instruct,
    "yitingxie": sets.yitingxie,
    "webgpt": sets.webgpt,
    "shp": sets.shp,
    "sharegpt_alpaca": sets.sharegpt_alpaca,
    "zhihu_kol": partial(sets.question_answer, question="INSTRUCTION", answer="RESPONSE"),
    "miracl_zh": sets.miracl,
    "hc3_chinese": sets.hc3_chinese,
    "mkqa_zh": partial(sets.mkqa, language="zh_cn"),
    "mkqa_ja": partial(sets.mkqa, language="ja"),
    "miracl_ja": sets.miracl,
    "qg_jaquad": partial(sets.question_answer, question="question", answer="sentence"),
    "qag_jaquad": sets.qag_jaquad,
    "hh_dialogue": sets.hh_dialogue,
    "fields": any_fields,
    "prompts": prompts,
    "toy": any_fields,  # runner/data/toy.py makes rows with our names
}


def check_adapter(where: str, name: str, fields: dict) -> None:
    """Raise UserError if there is no adapter `name`, or if the map `fields` has a name that is empty or not ours. where: its key."""
    if name not in ADAPTERS:
        raise UserError(f"{where}.adapter={name} is unknown{did_you_mean(name, list(ADAPTERS))}; there are {', '.join(ADAPTERS)}")
    for ours, theirs in fields.items():
        if not theirs:
            raise UserError(f"{where}.fields.{ours} is empty: leave it out, and the usual names are tried")
        if ours not in OURS:
            raise UserError(f"{where}.fields: unknown name {ours}{did_you_mean(ours, list(OURS))}; ours are {', '.join(OURS)}")


def adapt(name: str, row: dict, fields: dict) -> Example:
    """Read one row with the adapter `name`; `fields` is the field map of the source, which only the adapter `fields` reads.

    Raises BadRow or Dropped.
    """
    if not isinstance(row, dict):
        raise BadRow(f"the row is {kind_of(row)}, not a mapping")
    example = ADAPTERS[name](row, fields)
    if not example.prompt or not example.prompt[-1]["content"]:
        raise Dropped("empty prompt")
    if example.prompt[-1]["role"] != "user":
        raise Dropped("prompt does not end with a user turn")
    chosen, rejected = (text if text is None else text.strip() for text in (example.chosen, example.rejected))
    if "" in (chosen, rejected):
        raise Dropped("empty response")
    if chosen is not None and chosen == rejected:
        raise Dropped("identical pair")
    check_text("".join([*(turn["content"] for turn in example.prompt), chosen or "", rejected or ""]))
    return Example(example.prompt, chosen, rejected)


def published_like(row: dict) -> list[str]:
    """The adapters of published sets that can read a row."""
    return [name for name in ADAPTERS if name not in ("fields", "prompts", "toy") and _reads(name, row)]


def _reads(name: str, row: dict) -> bool:
    try:
        ADAPTERS[name](row, {})
    except BadRow:
        return False
    except Dropped:
        pass
    return True
