"""Rows of published data sets -> Example: a prompt as turns, one response, and a worse one where the row has it.

An adapter returns turns and plain texts only; the model's chat template puts the role names in, at tokenisation. The
sources are those of DeepSpeed-Chat; `fields` reads any other file or hub data set, `hh_dialogue` Anthropic's raw pairs.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from runner.data.field_names import CHATS, OURS, PAIR, PROMPTS, RESPONSES, is_message
from runner.errors import UserError, did_you_mean

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


def check_text(text: str) -> None:
    """Raise BadRow for characters that no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00  # as `sources` reads a byte that is not UTF-8
        if 0x80 <= byte <= 0xFF:
            raise BadRow(f"a text holds the byte 0x{byte:02x}, which is not UTF-8") from error
        # JSON can write it: "\\ud83d" without its other half
        raise BadRow("a text holds half of a surrogate pair, which no tokenizer can read") from error


OPENING = re.compile(r"\s*(Human|User|USER):")
# What stands before a role; the \\n is a newline that an export escaped once too often
PARAGRAPH, LINE, RUNNING = r"\n\n", r"(?:\n|\\n)+", r"(?:\s|</s>)+"
# The place of a response that is missing
PLACE = re.compile(r"(?:Assistant|ASSISTANT):\s*$")


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


def reply(row: dict, key: str, prompt: tuple[Turn, ...]) -> tuple[tuple[Turn, ...], str]:
    """(prompt, response) of an answer field: the bare response to `prompt`, or a dialogue (text or messages) that ends with it."""
    if is_message(row.get(key)):  # LLaMA-Factory
        row = row | {key: [row[key]]}
    if isinstance(row.get(key), list):
        turns = chat(row, key)
    elif prompt:
        return prompt, need(row, key)
    elif OPENING.match(need(row, key)):
        turns = parse_dialogue(row[key])
    elif null := null_field(row, PROMPTS):
        raise null
    else:
        missing = no_field(row, "prompt", PROMPTS)
        raise Unmapped(f"field {key} is not a dialogue (it does not begin with 'Human:'), and there is {missing}", row, PAIR)
    if not turns or turns[-1]["role"] != "assistant":
        empty = not turns or PLACE.search(str(row[key]))
        raise Dropped("empty response" if empty else f"dialogue ends with a {turns[-1]['role']} turn")
    # Messages that begin with the assistant go on from the prompt; others repeat it
    return (prompt if turns[0]["role"] == "assistant" else ()) + turns[:-1], turns[-1]["content"]


def compare(row: dict, prompt: tuple[Turn, ...], chosen: str, rejected: str | None) -> Example:
    """Example of the answer fields called `chosen` and `rejected`, which must answer the same prompt."""
    before, good = reply(row, chosen, prompt)
    other, bad = reply(row, rejected, prompt) if rejected else (before, None)
    if before != other:
        raise Dropped("prompts differ")
    return Example(before, good, bad)


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


def first(row: dict, *path: str, reason: str) -> dict:
    """{last name of the path: first entry of the list there}; Dropped(reason) if the list is empty."""
    if not (entries := need(row, *path, kind=list)):
        raise Dropped(reason)
    return {path[-1]: entries[0]}


def user(text: str) -> Turn:
    return {"role": "user", "content": text.strip()}


# --- one function per schema; `fields` is read by the adapter of that name only ---------------------------------------


def hh_pair(row: dict, fields: dict) -> Example:
    """Dahoas/rm-static, Dahoas/full-hh-rlhf: {prompt: "\\n\\nHuman: ...\\n\\nAssistant:", response, chosen, rejected}."""
    return Example(parse_dialogue(need(row, "prompt")), need(row, "chosen"), need(row, "rejected"))


def synthetic_instruct(row: dict, fields: dict) -> Example:
    """Dahoas/synthetic-instruct-gptj-pairwise: {prompt: a bare instruction, chosen, rejected}."""
    return Example((user(need(row, "prompt")),), need(row, "chosen"), need(row, "rejected"))


def yitingxie(row: dict, fields: dict) -> Example:
    """yitingxie/rlhf-reward-datasets: {prompt: "\\n\\nHuman: ...\\n\\n", chosen: "Assistant: ...", rejected: "Assistant: ..."}."""
    # Only the label at the front goes: an answer may hold "Assistant:" itself
    chosen, rejected = (need(row, key).strip().removeprefix("Assistant:") for key in ("chosen", "rejected"))
    return Example(parse_dialogue(need(row, "prompt")), chosen, rejected)


CITATION = re.compile(r" *\[\d+(?:, *\d+)*\]")  # [1], [1, 2]; other brackets and all parentheses belong to the answer


def webgpt(row: dict, fields: dict) -> Example:
    """openai/webgpt_comparisons: {question: {full_text}, answer_0, score_0, answer_1, score_1}; the scores sum to 0."""
    scores = [need(row, f"score_{i}", kind=NUMBER) for i in (0, 1)]
    answers = [CITATION.sub("", need(row, f"answer_{i}")) for i in (0, 1)]
    if scores[0] == scores[1]:
        raise Dropped("tie")
    best = 0 if scores[0] > scores[1] else 1
    return Example((user(need(row, "question", "full_text")),), answers[best], answers[1 - best])


def shp(row: dict, fields: dict) -> Example:
    """stanfordnlp/SHP: {history: a post, human_ref_A, human_ref_B, labels: 1 if A is preferred, 0 if B}."""
    if (label := need(row, "labels", kind=NUMBER)) not in (0, 1):
        raise BadRow(f"field labels is {label}, not 0 or 1")
    chosen, rejected = "AB" if label == 1 else "BA"
    return Example((user(need(row, "history")),), need(row, f"human_ref_{chosen}"), need(row, f"human_ref_{rejected}"))


def sharegpt_alpaca(row: dict, fields: dict) -> Example:
    """pvduy/sharegpt_alpaca_oa_vicuna_format: {prompt: "USER: ... ASSISTANT: ...</s>USER: ... ASSISTANT:", label}; some are empty."""
    if None in (row.get("prompt", ""), row.get("label", "")):
        raise Dropped("empty row")
    return Example(parse_dialogue(need(row, "prompt")), need(row, "label").strip().removesuffix("</s>"))


def question_answer(row: dict, fields: dict, question: str, answer: str) -> Example:
    """wangrui6/Zhihu-KOL: {INSTRUCTION, RESPONSE}; lmqg/qg_jaquad: {question, answer, sentence: the one with the answer in it}."""
    return Example((user(need(row, question)),), need(row, answer))


def miracl(row: dict, fields: dict) -> Example:
    """Cohere/miracl-{zh,ja}-queries-22-12: {query, positive_passages: [{text}], negative_passages: [{text}], emb}."""
    chosen = first(row, "positive_passages", reason="no positive passage")
    rejected = first(row, "negative_passages", reason="no negative passage")
    return Example((user(need(row, "query")),), need(chosen, "positive_passages", "text"), need(rejected, "negative_passages", "text"))


def hc3_chinese(row: dict, fields: dict) -> Example:
    """Hello-SimpleAI/HC3-Chinese: {question, human_answers: [text], chatgpt_answers: [text]}."""
    return Example((user(need(row, "question")),), need(first(row, "human_answers", reason="no human answer"), "human_answers"))


def mkqa(row: dict, fields: dict, language: str) -> Example:
    """apple/mkqa: {queries: {zh_cn, ja, ...}, answers: {zh_cn: [{type, text}], ...}}."""
    answer = first(row, "answers", language, reason="no answer")
    if need(answer, language, "text", kind=object) is None:  # the types unanswerable and long_answer
        raise Dropped("no answer")
    return Example((user(need(row, "queries", language)),), need(answer, language, "text"))


def qag_jaquad(row: dict, fields: dict) -> Example:
    """lmqg/qag_jaquad: {questions: [text], answers: [text], paragraph}."""
    return Example((user(need(first(row, "questions", reason="no question"), "questions")),), need(row, "paragraph"))


def hh_dialogue(row: dict, fields: dict) -> Example:
    """Anthropic/hh-rlhf as published: {chosen, rejected}, whole dialogues that should differ in their last reply only."""
    return compare(row, (), "chosen", "rejected")


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
    return with_system(named, compare(named, prompt_turns(named), answer, rejected))


def is_bad(row: dict, single: bool) -> bool:
    """Whether a row is a KTO one that shows how not to answer. single: one answer, and not under this name; else 0 may be anything."""
    label = row.get(pick(row, ("kto_tag", "label")))  # LLaMA-Factory's name, TRL's name
    return label is False or (single and str(label).strip().lower() in ("false", "0", "0.0"))


def is_rated_no_higher(row: dict) -> bool:
    """Whether the ratings beside a pair, as UltraFeedback's has them, do not prefer the chosen answer."""
    try:
        return float(row["score_chosen"]) <= float(row["score_rejected"])  # numbers, or their digits in a table of texts
    except (KeyError, TypeError, ValueError):
        return False


def prompts(row: dict, fields: dict) -> Example:
    """The prompt of any row, for PPO: found as `fields` does. Answers are left out, also one at the end of a dialogue."""
    named = under_our_names(row, fields)
    turns, answer = prompt_turns(named), pick(named, RESPONSES)
    if not turns and answer in CHATS and isinstance(named[answer], list):
        turns = chat(named, answer)
    elif not turns and answer:
        turns, _ = reply(named, answer, ())
    elif not turns:
        raise null_field(named, PROMPTS) or no_field(row, "prompt", PROMPTS, mapped=("prompt",))
    if turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    return with_system(named, Example(turns, None))


def under_our_names(row: dict, fields: dict) -> dict:
    """The row, and beside its own names those of the map `fields` (ours -> theirs)."""
    return row | {ours: need(row, theirs, kind=object) for ours, theirs in fields.items()}


def prompt_turns(named: dict) -> tuple[Turn, ...]:
    """Turns of the field that holds the prompt, or of a chat beside an answer; none if the row has no such field."""
    if not (prompt := pick(named, PROMPTS)):
        return asked(named)
    if named[prompt] == []:
        raise Dropped("empty prompt")
    turns = chat(named, prompt) if isinstance(named[prompt], list) else parse_dialogue(need(named, prompt))
    if prompt != "instruction":
        return (*history(named), *turns) if isinstance(named.get("history"), list) else turns
    extra = pick(named, ("input", "context"))  # Alpaca, Dolly
    if extra and need(named, extra).strip():
        turns = (*turns[:-1], user(turns[-1]["content"] + "\n\n" + named[extra]))
    return (*history(named), *turns)


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
    """The example with the row's system prompt before its turns."""
    if not pick(named, ("system",)) or not need(named, "system").strip():
        return example
    return replace(example, prompt=({"role": "system", "content": named["system"].strip()}, *example.prompt))


def pick(row: dict, names: tuple[str, ...]) -> str | None:
    """The first name whose field holds something. A null is no field: columnar files fill the gaps of uneven rows with it."""
    return next((name for name in names if row.get(name) is not None), None)


def null_field(row: dict, names: tuple[str, ...]) -> BadRow | None:
    """What is wrong with a row in which `pick` has found none of these names, if it has one of them."""
    return next((BadRow(f"field {name} is null") for name in names if name in row), None)


def no_field(row: dict, what: str, names: tuple[str, ...], mapped: tuple[str, ...] = PAIR) -> Unmapped:
    return Unmapped(f"no {what} among the fields {', '.join(map(str, row))}; tried {', '.join(names)}", row, mapped)


def published(row: dict) -> list[str]:
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


ADAPTERS: dict[str, Callable[[dict, dict], Example]] = {
    "rm_static": hh_pair,
    "full_hh_rlhf": hh_pair,
    "synthetic_instruct": synthetic_instruct,
    "yitingxie": yitingxie,
    "webgpt": webgpt,
    "shp": shp,
    "sharegpt_alpaca": sharegpt_alpaca,
    "zhihu_kol": partial(question_answer, question="INSTRUCTION", answer="RESPONSE"),
    "miracl_zh": miracl,
    "hc3_chinese": hc3_chinese,
    "mkqa_zh": partial(mkqa, language="zh_cn"),
    "mkqa_ja": partial(mkqa, language="ja"),
    "miracl_ja": miracl,
    "qg_jaquad": partial(question_answer, question="question", answer="sentence"),
    "qag_jaquad": qag_jaquad,
    "hh_dialogue": hh_dialogue,
    "fields": any_fields,
    "prompts": prompts,
    "toy": any_fields,  # runner/data/toy.py makes rows with our names
}
