"""The one exception whose message is written for the person at the keyboard, and did-you-mean."""

import difflib


class UserError(Exception):
    """Something the user can fix: says what is wrong, where, and what to type instead."""


def did_you_mean(word: str, choices: list[str]) -> str:
    """' (did you mean X?)', or nothing when no choice resembles the word."""
    block, _, leaf = word.rpartition(".")
    whole = [choice for choice in choices if choice.rpartition(".")[2] == word]  # the end of a dotted key
    whole = whole or [choice for choice in choices if block and choice.startswith(f"{block}.") and choice.endswith(f"_{leaf}")]
    near = whole or difflib.get_close_matches(word, choices, n=1, cutoff=0.7)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
