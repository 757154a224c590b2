"""Adapters for published data sets, those of DeepSpeed-Chat and Anthropic's raw pairs: one function per schema."""

import re

from runner.data.any_row import compare
from runner.data.dialogue import NUMBER, BadRow, Dropped, Example, need, parse_dialogue, user


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


def first(row: dict, *path: str, reason: str) -> dict:
    """{last name of the path: first entry of the list there}; Dropped(reason) if the list is empty."""
    if not (entries := need(row, *path, kind=list)):
        raise Dropped(reason)
    return {path[-1]: entries[0]}
