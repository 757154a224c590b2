"""Names of fields in rows: ours, the usual ones that are tried, and a guess at what others mean by theirs."""

import re

# Names of the fields that `fields` looks for, in this order, and ours, which its map may give to others
PROMPTS = ("prompt", "instruction", "question", "query")
CHATS = ("messages", "conversations")
RESPONSES = ("chosen", "response", "output", "answer", "completion", "label", *CHATS)
OURS = ("prompt", "chosen", "response", "rejected", "system", "messages")
# Words in the names of fields that other people choose
HINTS = {
    "prompt": {*PROMPTS, "input", "context", "post", "history"},
    "rejected": {"rejected", "bad", "worse", "worst", "loser", "lose", "negative", "dispreferred"},
    "chosen": {*RESPONSES, "good", "better", "best", "winner", "win", "positive", "preferred", "accepted", "reply"},
}
# Words in the names of fields that say which of two answers is better: "b", 1, "response_b"
VERDICTS = {"preferred", "preference", "prefer", "winner", "win", "label", "labels", "choice", "better", "best", "verdict", "judgment"}


def guessed_map(row: dict, mapped: tuple[str, ...]) -> tuple[str, str | None]:
    """'{prompt: question, chosen: good, rejected: bad}' from a row's own names, with FIELD where none suggests itself; and the verdict.

    mapped: which of ours. Without answers among them no verdict matters.
    """
    free, found, verdict = [str(name) for name in row], {}, None
    for ours, hints in HINTS.items():
        if ours == "chosen" and found["rejected"] == "FIELD":
            verdict = next((name for name in free if _has_word(name, VERDICTS) and _is_verdict(name, row, free)), None)
            free = [name for name in free if name != verdict]
        found[ours] = next((name for name in free if _has_word(name, hints)), "FIELD")
        free = [name for name in free if name != found[ours]]
    return "{" + ", ".join(f"{ours}: {found[ours]}" for ours in mapped) + "}", verdict if "chosen" in mapped else None


def _has_word(name: str, words: set[str]) -> bool:
    return bool(words & set(re.findall("[a-z]+", name.lower())))


def _is_verdict(name: str, row: dict, free: list[str]) -> bool:
    """A number, or a word such as b or response_b, beside two texts that it may be about."""
    value, texts = row.get(name), [other for other in free if other != name and isinstance(row.get(other), str)]
    number = isinstance(value, int | float) and not isinstance(value, bool)  # KTO's label is of the only answer
    return len(texts) > 1 and (number or (isinstance(value, str) and len(value.split()) == 1))
