"""Names of fields in rows: ours, the usual ones that are tried, and a guess at what others mean by theirs."""

import re

# Names of the fields that `fields` looks for, in this order, and ours, which its map may give to others
PROMPTS = ("prompt", "instruction", "question", "query")
CHATS = ("messages", "conversations")
RESPONSES = ("chosen", "response", "output", "answer", "completion", *CHATS, "label")
SYSTEMS = ("system", "system_prompt", "system_message")
PAIR = ("prompt", "chosen", "rejected")
OURS = ("prompt", "chosen", "response", "rejected", "system", "messages")
# Words in the names of fields that other people choose
HINTS = {
    "prompt": {*PROMPTS, "input", "context", "post", "history"},
    "rejected": {"rejected", "bad", "worse", "worst", "loser", "lose", "negative", "dispreferred"},
    "chosen": {*RESPONSES, "good", "better", "best", "winner", "win", "positive", "preferred", "accepted", "reply"},
}
# Words in the names of fields that say which of two answers is better: "b", 1, "response_b"
VERDICTS = {"preferred", "preference", "prefer", "winner", "win", "label", "labels", "choice", "better", "best", "verdict", "judgment"}


def guessed_map(row: dict, mapped: tuple[str, ...]) -> str:
    """'{prompt: question, chosen: good, rejected: bad}' from a row's own names, with FIELD where none suggests itself.

    mapped: which of ours.
    """
    found, texts = _guessed(row), _texts(row)
    if mapped == ("prompt",) and len(texts) == 1:
        found["prompt"] = texts[0]
    return "{" + ", ".join(f"{ours}: {found[ours]}" for ours in mapped) + "}"


def why_no_map(row: dict) -> str | None:
    """Why no map makes comparisons or demonstrations of such rows, and what to do instead. None if one may."""
    found, texts = _guessed(row), _texts(row)
    if texts == ["text"]:
        return "A text alone has no prompt and no answer to it: dataset.pretrain='[FILE]' ppo.ptx_coef=27.8 mixes it into PPO"
    rewrite = "and no map reads that: write the rows as prompt, chosen and rejected first"
    if rated := next((name for name in row if _is_rated(row[name])), None):
        return f"Field {rated} is a list of rated answers, {rewrite}"
    others = [name for name in row if name != found["prompt"] and _has_word(name, VERDICTS)]
    about = [name for name in texts if name != found["prompt"]]
    verdict = next((name for name in others if _is_verdict(name, row, about)), None)
    return f"Field {verdict} says which answer is better, {rewrite}" if verdict and found["rejected"] == "FIELD" else None


def _guessed(row: dict) -> dict[str, str]:
    free, found = _texts(row), {}
    for ours, hints in HINTS.items():
        found[ours] = next((name for name in free if _has_word(name, hints)), "FIELD")
        free = [name for name in free if name != found[ours]]
    return found


def _texts(row: dict) -> list[str]:
    """The fields that a map can give to ours: those of a text, a message, or a list of messages."""
    return [name for name, value in row.items() if isinstance(value, str) or _is_chat(value if isinstance(value, list) else [value])]


def _is_chat(value: list) -> bool:
    return bool(value) and all(map(is_message, value))


def is_message(value: object) -> bool:
    return isinstance(value, dict) and bool({"role", "from"} & set(value))


def _is_rated(value: object) -> bool:
    """Whether it is a list of answers with numbers beside them: {response, overall_score} in UltraFeedback, {answer, rank} in Nectar."""
    entry = value[0] if isinstance(value, list) and value else None
    kinds = {type(inside) for inside in entry.values()} if isinstance(entry, dict) and not is_message(entry) else set()
    return str in kinds and bool(kinds & {int, float})


def _has_word(name: str, words: set[str]) -> bool:
    return bool(words & set(re.findall("[a-z]+", name.lower())))


def _is_verdict(name: str, row: dict, free: list[str]) -> bool:
    """A number, or a word such as b or response_b, beside two texts that it may be about."""
    value, texts = row.get(name), [other for other in free if other != name and isinstance(row.get(other), str)]
    number = isinstance(value, int | float) and not isinstance(value, bool)  # KTO's label is of the only answer
    return len(texts) > 1 and (number or (isinstance(value, str) and len(value.split()) == 1))
