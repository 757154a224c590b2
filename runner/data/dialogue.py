"""An example, and the turns of a dialogue: from text with roles in it, or from a list of messages."""

import re
from dataclasses import dataclass

Turn = dict[str, str]  # {"role": "user" | "assistant" | "system", "content": str}


@dataclass(frozen=True)
class Example:
    prompt: tuple[Turn, ...]  # ends with a user turn
    chosen: str | None  # None: a prompt alone, for PPO only
    rejected: str | None = None  # None: a single-response row, for SFT only


class BadRow(ValueError):
    """The row is broken: a field is missing or of the wrong type."""


class Unmapped(BadRow):
    """The row has none of the names that are looked for.

    mapped: those of our names that a map for it would have.
    """

    def __init__(self, message: str, row: dict, mapped: tuple[str, ...]):
        super().__init__(message)
        self.row, self.mapped = row, mapped


class Dropped(Exception):
    """The row is well formed but useless; args[0] is the short reason that the summary counts."""


def check_text(text: str) -> None:
    """Raise BadRow for characters that no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00  # as file_formats.py reads a byte that is not UTF-8
        if 0x80 <= byte <= 0xFF:
            raise BadRow(f"a text holds the byte 0x{byte:02x}, which is not UTF-8") from error
        # JSON can write it: "\\ud83d" without its other half
        raise BadRow("a text holds half of a surrogate pair, which no tokenizer can read") from error


OPENING = re.compile(r"\s*(Human|User|USER):")
# What stands before a role; the \\n is a newline that an export escaped once too often. A gap begins with its first space: a long one
# would otherwise be tried from each of its places
PARAGRAPH, LINE, RUNNING = r"\n\n", r"(?<!\n)(?:\n|\\n)+", r"(?<!\s)(?:\s|</s>)+"


def parse_dialogue(text: str) -> tuple[Turn, ...]:
    """Turns of '\\n\\nHuman: ...\\n\\nAssistant:' text, or of the ' Human: ... Assistant:', 'User:' and 'USER:' variants.

    Text that does not open with a user role is one user turn. An empty assistant turn at the end, the place of the
    response, is dropped.
    """
    opening = OPENING.match(text)
    if not opening:
        return (user(text),)
    human = opening[1]
    assistant = "ASSISTANT" if human == "USER" else "Assistant"
    # People write "Human:" inside their turns too. A role counts only where this text begins its turns: after an empty line
    # if that is how the first reply, or the text, begins; otherwise after a line break; otherwise after any space, where roles alternate.
    gaps = (PARAGRAPH,) if "\n\n" in opening[0] else (PARAGRAPH, LINE, RUNNING)
    gap = next((g for g in gaps if re.search(f"{g}{assistant}:", text)), PARAGRAPH)
    after = {"user": assistant, "assistant": human} if gap == RUNNING else dict.fromkeys(("user", "assistant"), f"{human}|{assistant}")
    turns, role, start = [], "user", opening.end()
    while role:
        mark = re.compile(f"{gap}({after[role]}):").search(text, start)
        turns.append({"role": role, "content": text[start : mark.start() if mark else len(text)].strip()})
        role, start = (("user" if mark[1] == human else "assistant"), mark.end()) if mark else (None, None)
    return tuple(turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns)


ROLES = {"system": "system"} | dict.fromkeys(("user", "human", "prompter"), "user")
ROLES |= dict.fromkeys(("assistant", "gpt", "model"), "assistant")
TOOLS = ("tool", "function", "function_call", "observation")  # those of OpenAI, and of LLaMA-Factory


def chat(row: dict, key: str) -> tuple[Turn, ...]:
    """Turns of a list of messages: {role, content}, or {from, value} as in ShareGPT files."""
    turns = []
    for i, message in enumerate(row[key]):
        if not isinstance(message, dict):
            raise BadRow(f"field {key}[{i}] is {kind_of(message)}, not a message with role and content")
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        known = str(role).lower()
        if known in TOOLS or (content is None and (message.get("tool_calls") or message.get("function_call"))):
            raise Dropped("tool calls in the dialogue")  # which our templates cannot show
        if known not in ROLES:
            raise BadRow(f"field {key}[{i}] has role {role!r}, not one of {', '.join(ROLES)}")
        if (text := joined(content)) is None:
            raise BadRow(f"field {key}[{i}] has content {kind_of(content)}, not a string or a list of parts of type text")
        turns.append({"role": ROLES[known], "content": text.strip()})
    return tuple(turns)


def joined(content: object) -> str | None:
    """The text of a message: itself, or of its parts, as {type: text, text}; None if there is something else, such as an image."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    return "".join(texts) if texts and all(isinstance(text, str) for text in texts) else None


def user(text: str) -> Turn:
    return {"role": "user", "content": text.strip()}


NUMBER = (int, float)
KINDS = {str: "a string", list: "a list", NUMBER: "a number"}


def need(row: dict, *path: str, kind: type | tuple = str):
    """row[path[0]][path[1]]...; BadRow if it is missing or not of this kind."""
    value, where = row, ".".join(path)
    for key in path:
        if not isinstance(value, dict) or key not in value:
            raise BadRow(f"field {where} is missing; the row has {', '.join(map(str, row))}")
        value = value[key]
    if not isinstance(value, kind):
        raise BadRow(f"field {where} is {kind_of(value)}, not {KINDS[kind]}")
    return value


def kind_of(value) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"
