"""Adapters for rows of any data set, by the names of their fields: `fields` for answers, `prompts` for prompts alone."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from runner.data.dialogue import OPENING, BadRow, Dropped, Example, Turn, Unmapped, chat, need, parse_dialogue, user
from runner.data.field_names import CHATS, PAIR, PROMPTS, RESPONSES, SYSTEMS, is_message


def any_fields(row: dict, fields: dict) -> Example:
    """Any row: {prompt, chosen | response, rejected?, system?} under the names of the map `fields` (ours -> theirs) or the usual ones.

    A prompt is a text, with or without roles, or a list of messages. An answer is a text, a list of messages, or, in rows
    without a prompt, a whole dialogue. `messages` (`conversations`) is a chat that ends with the response.
    """
    named = under_our_names(row, fields)
    answer = pick(named, tuple(n for n in RESPONSES if n in fields) or RESPONSES)
    if answer is None:
        raise null_field(named, RESPONSES) or no_field(row, "response", RESPONSES)
    rejected = pick(named, ("rejected",))
    if is_bad(row, single=rejected is None and fields.get(answer, answer) != "label"):
        raise Dropped("marked as bad (label: false)")
    if rejected and is_rated_no_higher(row):
        raise Dropped("chosen is rated no higher")
    return with_system(named, compare(named, prompt_turns(named, fields, answer), answer, rejected))


def is_bad(row: dict, single: bool) -> bool:
    """Whether a row is a KTO one that shows how not to answer. single: one answer, and not under this name; else 0 may be anything."""
    label = row.get(pick(row, ("kto_tag", "label")))  # LLaMA-Factory's name, TRL's name
    return label is False or (single and str(label).strip().lower() in ("false", "0", "0.0"))


# Names of the ratings beside a pair, which UltraFeedback and its descendants spell in several ways
RATINGS = [(f"{word}{sign}chosen", f"{word}{sign}rejected") for word in ("score", "rating") for sign in "_-"]
RATINGS += [(f"chosen{sign}{word}", f"rejected{sign}{word}") for word in ("score", "rating") for sign in "_-"]


def is_rated_no_higher(row: dict) -> bool:
    """Whether the ratings beside a pair do not prefer the chosen answer."""
    for chosen, rejected in RATINGS:
        with suppress(KeyError, TypeError, ValueError):
            return float(row[chosen]) <= float(row[rejected])  # numbers, or their digits in a table of texts
    return False


def prompts(row: dict, fields: dict) -> Example:
    """The prompt of any row, for PPO: found as `fields` does. Answers are left out, also one at the end of a dialogue."""
    named = under_our_names(row, fields)
    answer = pick(named, RESPONSES)
    turns = prompt_turns(named, fields, answer)
    if isinstance(named.get(answer), list):
        whole = chat(named, answer)  # repeats the prompt, or goes on from it
        turns = whole if whole and whole[0]["role"] != "assistant" else turns
    elif not turns and answer:
        turns, _ = reply(named, answer, ())
    elif not turns:
        raise null_field(named, PROMPTS) or no_field(row, "prompt", PROMPTS, mapped=("prompt",))
    if turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    return with_system(named, Example(turns, None))


def under_our_names(row: dict, fields: dict) -> dict:
    """The row, and beside its own names those of the map `fields` (ours -> theirs). Messages that were written as text are messages."""
    named = row | {ours: need(row, theirs, kind=object) for ours, theirs in fields.items()}
    return named | {name: messages for name in (*PROMPTS, *RESPONSES, "rejected") if (messages := messages_in(name, named.get(name)))}


# How Python, and `datasets` in a CSV file, write a list of messages
PYTHON_MESSAGES = re.compile(r"\s*\[\s*\{\s*'(?:role|content|from|value)':")


def messages_in(name: str, value: object) -> list | None:
    """The messages of a text that holds a list of them, as JSON, and as a table must."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return None
    if PYTHON_MESSAGES.match(value):
        raise BadRow(f"field {name} holds a list of messages as text, which cannot be read back: save the rows as .jsonl or .parquet")
    with suppress(ValueError):
        messages = json.loads(value)
        return messages if isinstance(messages, list) and messages and all(map(is_message, messages)) else None
    return None


def prompt_turns(named: dict, fields: dict, answer: str | None) -> tuple[Turn, ...]:
    """Turns of the field that holds the prompt, or of a chat beside an answer; none if the row has no such field."""
    if not (prompt := pick(named, PROMPTS)):
        return asked(named)
    if "prompt" not in fields and (inner := instruction_in(named, answer)):
        prompt = inner
    if named[prompt] == []:
        raise Dropped("empty prompt")
    turns = chat(named, prompt) if isinstance(named[prompt], list) else parse_dialogue(need(named, prompt))
    asks = named[prompt] in (named.get("instruction"), named.get("question"))  # under that name, or mapped from it
    earlier = tuple(history(named)) if asks or isinstance(named.get("history"), list) else ()
    whole = isinstance(named[prompt], list) or OPENING.match(named[prompt]) or "prompt" in fields  # a dialogue, or what the map says
    if whole and not asks:
        return (*earlier, *turns)
    extra = pick(named, ("input", "context"))  # Alpaca, Dolly; a passage that a question is about
    if extra and (asks or isinstance(named[extra], str)) and need(named, extra).strip() and named[extra] not in named[prompt]:
        turns = (*turns[:-1], user(turns[-1]["content"] + "\n\n" + named[extra]))
    return (*earlier, *turns)


def instruction_in(named: dict, answer: str | None) -> str | None:
    """The field of the bare instruction, where `prompt` is a whole text that was made of it, perhaps with the answer at its end."""
    prompt, said = named.get("prompt"), named.get(answer)
    name = pick(named, ("instruction", "question"))
    if not (name and isinstance(prompt, str) and isinstance(named[name], str) and named[name].strip() in prompt):
        return None
    answered = isinstance(said, str) and said.strip() and prompt.rstrip().endswith(said.strip())
    return name if answered or "### Instruction:" in prompt else None


def asked(named: dict) -> tuple[Turn, ...]:
    """The turns of a chat that ends with the user and whose answer has a field of its own, as in LLaMA-Factory's pairs; otherwise none."""
    answer, key = pick(named, RESPONSES), pick(named, CHATS)
    if answer in CHATS or not key or not isinstance(named[key], list):
        return ()
    turns = chat(named, key)
    return turns if turns and turns[-1]["role"] == "user" else ()


def history(named: dict) -> Iterator[Turn]:
    """The turns before an instruction, as LLaMA-Factory keeps them: [[user, assistant], ...]."""
    for i, pair in enumerate(need(named, "history", kind=list) if named.get("history") else ()):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadRow(f"field history[{i}] is not a pair of texts, [user, assistant]")
        yield from (user(pair[0]), {"role": "assistant", "content": pair[1].strip()})


def with_system(named: dict, example: Example) -> Example:
    """The example with the row's system prompt before its turns, if they do not begin with it."""
    name = pick(named, SYSTEMS)
    if not name or not need(named, name).strip():
        return example
    turn = {"role": "system", "content": named[name].strip()}
    return example if example.prompt[:1] == (turn,) else replace(example, prompt=(turn, *example.prompt))


# The place of a response that is missing; and what may stand before one
PLACE = re.compile(r"(?:Assistant|ASSISTANT):\s*$")
LABEL = re.compile(r"\s*(?:Assistant|ASSISTANT):")


def reply(row: dict, key: str, prompt: tuple[Turn, ...], single: bool = False) -> tuple[tuple[Turn, ...], str]:
    """(prompt, response) of an answer field: the bare response to `prompt`, or a dialogue (text or messages) that ends with it.

    single: no other answer is compared with it; then a dialogue may go on with words of the user that nobody answers.
    """
    if is_message(row.get(key)):  # LLaMA-Factory
        row = row | {key: [row[key]]}
    if isinstance(row.get(key), str) and not row[key].strip():
        raise Dropped("empty response")
    if isinstance(row.get(key), list):
        turns = chat(row, key)
    elif prompt and not _repeats(prompt, need(row, key)):
        return prompt, LABEL.sub("", row[key], count=1) if LABEL.match(row[key]) else row[key]
    elif OPENING.match(need(row, key)):
        turns = parse_dialogue(row[key])
    elif null := null_field(row, PROMPTS):
        raise null
    else:
        missing = no_field(row, "prompt", PROMPTS)
        raise Unmapped(f"field {key} is not a dialogue (it does not begin with 'Human:'), and there is {missing}", row, PAIR)
    if single and any(turn["role"] == "assistant" for turn in turns):
        turns = turns[: max(n for n, turn in enumerate(turns, 1) if turn["role"] == "assistant")]
    if not turns or turns[-1]["role"] != "assistant":
        empty = not turns or PLACE.search(str(row[key]))
        raise Dropped("empty response" if empty else f"dialogue ends with a {turns[-1]['role']} turn")
    # Messages that begin with the assistant go on from the prompt; others repeat it
    return (prompt if turns[0]["role"] == "assistant" else ()) + turns[:-1], turns[-1]["content"]


def _repeats(prompt: tuple[Turn, ...], text: str) -> bool:
    """Whether the text of an answer is the whole dialogue."""
    turns = parse_dialogue(text) if OPENING.match(text) else ()
    return turns[:-1] == prompt and turns[-1]["role"] == "assistant"


def compare(row: dict, prompt: tuple[Turn, ...], chosen: str, rejected: str | None) -> Example:
    """Example of the answer fields called `chosen` and `rejected`, which must answer the same prompt."""
    before, good = reply(row, chosen, prompt, single=rejected is None)
    other, bad = reply(row, rejected, prompt) if rejected else (before, None)
    if before != other:
        raise Dropped("prompts differ")
    return Example(before, good, bad)


def pick(row: dict, names: tuple[str, ...]) -> str | None:
    """The first name whose field holds something. A null is no field: columnar files fill the gaps of uneven rows with it."""
    return next((name for name in names if row.get(name) is not None), None)


def null_field(row: dict, names: tuple[str, ...]) -> BadRow | None:
    """What is wrong with a row in which `pick` has found none of these names, if it has one of them."""
    return next((BadRow(f"field {name} is null") for name in names if name in row), None)


def no_field(row: dict, what: str, names: tuple[str, ...], mapped: tuple[str, ...] = PAIR) -> Unmapped:
    return Unmapped(f"no {what} among the fields {', '.join(map(str, row))}; tried {', '.join(names)}", row, mapped)
