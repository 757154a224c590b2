"""Adapters on rows of each published schema, their traps included, and the presets that name them."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from runner.cli.overrides import check_overrides
from runner.config.loading import load
from runner.config.schema import Dataset
from runner.data.adapters import ADAPTERS, adapt, check_adapter, published_like
from runner.data.dialogue import BadRow, Dropped, Example, Unmapped, parse_dialogue, user
from runner.data.field_names import guessed_map, why_no_map
from runner.errors import UserError

REPO = Path(__file__).resolve().parents[1]
DATA = REPO.parent / "shared" / "data"


def turns(*contents: str) -> tuple[dict, ...]:
    return tuple({"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents))


def reason(name: str, row: dict) -> str:
    with pytest.raises(Dropped) as dropped:
        adapt(name, row, {})
    return dropped.value.args[0]


# --- dialogues --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, contents",
    [
        ("\n\nHuman: Hi\n\nAssistant:", ["Hi"]),
        ("\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Bye\n\nAssistant: ", ["Hi", "Hello!", "Bye"]),
        (" Human: Hi Assistant:", ["Hi"]),
        (" Human: Hi\nthere Assistant: Hello! Human: Bye Assistant:", ["Hi\nthere", "Hello!", "Bye"]),
        ("Human: Hi\n\nAssistant: Hello!\n\nHuman: Bye", ["Hi", "Hello!", "Bye"]),
        ("User: Hi\nAssistant: Hello!\nUser: Bye\nAssistant: ", ["Hi", "Hello!", "Bye"]),
        ("User: Hi\\nAssistant: Hello!\\n\\nUser: Bye\\nAssistant: ", ["Hi", "Hello!", "Bye"]),
        ("USER: Hi ASSISTANT: Hello!</s>USER: Bye ASSISTANT:", ["Hi", "Hello!", "Bye"]),
        ("  What does Human: mean?\n\nAssistant: tell me", ["What does Human: mean?\n\nAssistant: tell me"]),
        # Roles inside a turn are text: after an empty line only, as this text begins its turns; not the same role again
        ("\n\nHuman: Say\nAssistant: hm and Human: ha\n\nAssistant:", ["Say\nAssistant: hm and Human: ha"]),
        ("\n\nHuman: What is Assistant: for?\n\n", ["What is Assistant: for?"]),
        ("USER: What is the USER: label? ASSISTANT:", ["What is the USER: label?"]),
        ("\n\nHuman: \n\nAssistant: Hm?\n\nHuman: Hi\n\nAssistant:", ["", "Hm?", "Hi"]),
    ],
)
def test_parse_dialogue(text, contents):
    assert parse_dialogue(text) == turns(*contents)


def test_parse_dialogue_keeps_a_role_that_speaks_twice():
    parsed = parse_dialogue("\n\nHuman: a\n\nAssistant: b\n\nAssistant: c\n\nHuman: d")
    assert [t["role"] for t in parsed] == ["user", "assistant", "assistant", "user"]


def has_no_role(text: str) -> bool:
    return not any(role in text for role in ("Human:", "Assistant:", "User:", "USER:", "ASSISTANT:"))


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=40)
contents = st.one_of(words, st.lists(words, max_size=3).map("\n\n".join)).map(str.strip).filter(lambda t: t and has_no_role(t))


@given(st.lists(contents, min_size=1, max_size=6), st.lists(st.booleans(), min_size=6, max_size=6), st.booleans())
def test_hh_text_round_trip(texts, roles, opened):
    dialogue = [{"role": "user" if i == 0 or roles[i] else "assistant", "content": text} for i, text in enumerate(texts)]
    rendered = "".join(("\n\nHuman: " if t["role"] == "user" else "\n\nAssistant: ") + t["content"] for t in dialogue)
    assert parse_dialogue(rendered + ("\n\nAssistant:" if opened else "")) == tuple(dialogue)


@given(
    st.lists(st.tuples(contents, contents), max_size=2),
    contents,
    st.sampled_from([("Human: ", "Assistant: ", " "), ("USER: ", "ASSISTANT: ", "</s>")]),
)
def test_running_text_round_trip(rounds, last, style):
    human, assistant, end = style
    rendered = "".join(f"{human}{question} {assistant}{answer}{end}" for question, answer in rounds) + f"{human}{last} {assistant}"
    assert parse_dialogue(rendered) == turns(*(text for both in rounds for text in both), last)


@given(st.text())
def test_parse_dialogue_takes_any_text(text):
    parsed = parse_dialogue(text)
    assert parsed[0]["role"] == "user" and all(t["content"] == t["content"].strip() for t in parsed)


# --- one row per schema -----------------------------------------------------------------------------------------------

HH = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "response": " Hello!", "chosen": " Hello!", "rejected": " What?"}
WEBGPT = {
    "question": {"dataset": "eli5", "id": "1", "full_text": "Why is the sky blue?"},
    "answer_0": "Light scatters.",
    "answer_1": "Air scatters blue (short waves) more [1], says f(x) [sic].[2, 3] So it is blue.",
    "score_0": -0.5,
    "score_1": 0.5,
}
SHP = {"history": "My cat sleeps. Why?", "human_ref_A": "Cats do.", "human_ref_B": "Ask a vet.", "labels": 1, "score_ratio": 2.0}
SHAREGPT = {"prompt": "USER: What is a USER manual? ASSISTANT: A text.</s>USER: Thanks ASSISTANT:", "label": "Welcome.</s>"}
MIRACL = {
    "query_id": "1",
    "query": "誰?",
    "positive_passages": [{"docid": "1#0", "title": "t", "text": "彼。"}, {"docid": "1#1", "title": "t", "text": "二。"}],
    "negative_passages": [{"docid": "2#0", "title": "t", "text": "否。"}],
}
MKQA = {
    "query": "who?",
    "queries": {"en": "who?", "ja": "誰?", "zh_cn": "谁?"},
    "answers": {
        "en": [{"type": 0, "text": "him"}],
        "ja": [{"type": 0, "entity": "Q1", "text": "彼", "aliases": []}],
        "zh_cn": [{"type": 0, "entity": "Q1", "text": "他", "aliases": []}],
    },
}

ROWS = [
    ("rm_static", HH, Example(turns("Hi"), "Hello!", "What?")),
    ("full_hh_rlhf", HH, Example(turns("Hi"), "Hello!", "What?")),
    (
        "synthetic_instruct",
        {"prompt": "Human: is a role. Why? Assistant:", "chosen": "It labels\nturns.", "rejected": "Hm."},
        Example(turns("Human: is a role. Why? Assistant:"), "It labels\nturns.", "Hm."),
    ),
    (
        "yitingxie",
        {
            "prompt": "\n\nHuman: Write a role\n\nAssistant: Which?\n\nHuman: Yours\n\n",
            "chosen": "Assistant: It is Assistant: so.",
            "rejected": "Assistant: No.",
        },
        Example(turns("Write a role", "Which?", "Yours"), "It is Assistant: so.", "No."),
    ),
    (
        "webgpt",
        WEBGPT,
        Example(turns("Why is the sky blue?"), "Air scatters blue (short waves) more, says f(x) [sic]. So it is blue.", "Light scatters."),
    ),
    ("shp", SHP, Example(turns("My cat sleeps. Why?"), "Cats do.", "Ask a vet.")),
    ("shp", SHP | {"labels": 0}, Example(turns("My cat sleeps. Why?"), "Ask a vet.", "Cats do.")),
    ("sharegpt_alpaca", SHAREGPT, Example(turns("What is a USER manual?", "A text.", "Thanks"), "Welcome.")),
    ("zhihu_kol", {"INSTRUCTION": "怎么?", "RESPONSE": "这样。", "SOURCE": "Zhihu"}, Example(turns("怎么?"), "这样。")),
    ("miracl_zh", MIRACL, Example(turns("誰?"), "彼。", "否。")),
    ("miracl_ja", MIRACL, Example(turns("誰?"), "彼。", "否。")),
    ("hc3_chinese", {"question": "什么?", "human_answers": ["甲", "乙"], "chatgpt_answers": ["丙"]}, Example(turns("什么?"), "甲")),
    ("mkqa_zh", MKQA, Example(turns("谁?"), "他")),
    ("mkqa_ja", MKQA, Example(turns("誰?"), "彼")),
    (
        "qg_jaquad",
        {"question": "何?", "answer": "水", "sentence": "水です。", "paragraph": "水です。他。"},
        Example(turns("何?"), "水です。"),
    ),
    ("qag_jaquad", {"questions": ["何?", "誰?"], "answers": ["水", "彼"], "paragraph": "水です。"}, Example(turns("何?"), "水です。")),
    (
        "hh_dialogue",
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e",
        },
        Example(turns("a", "b", "c"), "d", "e"),
    ),
    ("toy", {"prompt": list(turns("a", "b", "c")), "chosen": "d", "rejected": "e"}, Example(turns("a", "b", "c"), "d", "e")),
]


@pytest.mark.parametrize("name, row, example", ROWS, ids=[name for name, _, _ in ROWS])
def test_row(name, row, example):
    assert adapt(name, row, {}) == example


def test_every_adapter_has_a_row():
    assert {name for name, _, _ in ROWS} | {"fields", "prompts"} == set(ADAPTERS)


@pytest.mark.parametrize("name, row", [(name, row) for name, row, _ in ROWS if name != "toy"], ids=[n for n, _, _ in ROWS if n != "toy"])
def test_broken_rows_are_named(name, row):
    """Without any one field that the adapter reads, or with a mapping in its place, the row is refused and the field named."""
    read = 0
    for key in row:
        for broken in ({k: v for k, v in row.items() if k != key}, row | {key: {"x": 1}}):
            try:
                assert adapt(name, broken, {}) == adapt(name, row, {})  # a field that the adapter does not read
            except BadRow as error:
                assert key in str(error)
                read += 1
    assert read >= 4


@pytest.mark.parametrize(
    "name, row, why",
    [
        ("rm_static", HH | {"rejected": "Hello! "}, "identical pair"),
        ("rm_static", HH | {"chosen": " "}, "empty response"),
        ("rm_static", HH | {"rejected": ""}, "empty response"),
        ("rm_static", HH | {"prompt": "\n\nHuman: \n\nAssistant:"}, "empty prompt"),
        ("rm_static", HH | {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nAssistant:"}, "prompt does not end with a user turn"),
        ("webgpt", WEBGPT | {"score_0": 0.0, "score_1": 0.0}, "tie"),
        ("webgpt", WEBGPT | {"answer_1": " [1]"}, "empty response"),
        ("sharegpt_alpaca", SHAREGPT | {"prompt": None}, "empty row"),
        ("sharegpt_alpaca", SHAREGPT | {"label": None}, "empty row"),
        ("sharegpt_alpaca", SHAREGPT | {"prompt": ""}, "empty prompt"),
        ("sharegpt_alpaca", SHAREGPT | {"label": "</s>"}, "empty response"),
        ("miracl_zh", MIRACL | {"negative_passages": []}, "no negative passage"),
        ("miracl_ja", MIRACL | {"positive_passages": []}, "no positive passage"),
        ("hc3_chinese", {"question": "什么?", "human_answers": []}, "no human answer"),
        ("mkqa_ja", MKQA | {"answers": {"ja": [{"type": 2, "text": None}]}}, "no answer"),
        ("mkqa_zh", MKQA | {"answers": {"zh_cn": []}}, "no answer"),
        ("qag_jaquad", {"questions": [], "paragraph": "水です。"}, "no question"),
        ("hh_dialogue", {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: b"}, "prompts differ"),
        ("hh_dialogue", {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: "}, "empty response"),
    ],
)
def test_useless_rows_are_dropped(name, row, why):
    assert reason(name, row) == why


def test_shp_label_out_of_range():
    with pytest.raises(BadRow, match="labels is 2"):
        adapt("shp", SHP | {"labels": 2}, {})


def test_a_text_in_place_of_a_list_is_not_indexed():
    with pytest.raises(BadRow, match="human_answers is of type str, not a list"):
        adapt("hc3_chinese", {"question": "什么?", "human_answers": "甲"}, {})


def test_unknown_adapter_names_the_near_ones():
    with pytest.raises(UserError, match=r"mine.adapter=web_gpt is unknown .did you mean webgpt"):
        check_adapter("mine", "web_gpt", {})


# --- any row ----------------------------------------------------------------------------------------------------------


def messages(*contents: str) -> list[dict]:
    return list(turns(*contents))


SYSTEM = {"role": "system", "content": "Be kind."}
DIALOGUES = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
GOOD = {"from": "gpt", "value": "b"}
PAIR = Example(turns("a"), "b", "c")
SINGLE = Example(turns("a"), "b")
TURNS = messages("a", "b")
TOOL_TURNS = [
    {"role": "tool", "content": "a"},
    {"role": "Function", "content": "a"},
    {"from": "observation", "value": "a"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
    {"role": "assistant", "content": None, "function_call": {"name": "f"}},
]
NECTAR = {"prompt": "a", "answers": [{"answer": "b", "model": "m", "rank": 1.0}], "turns": 1, "good_natured": True}
ULTRAFEEDBACK = {
    "source": "s",
    "instruction": "a",
    "models": ["m"],
    "completions": [{"response": "b", "annotations": {}, "overall_score": 8.5}],
}
PARTS = [{"type": "text", "text": " "}, {"type": "text", "text": "a"}]


@pytest.mark.parametrize(
    "row, fields, example",
    [
        ({"prompt": " a ", "chosen": " b ", "rejected": "c"}, {}, PAIR),
        ({"prompt": "\n\nHuman: a\n\nAssistant:", "response": " b"}, {}, SINGLE),
        ({"prompt": "Human: a Assistant: b Human: c Assistant:", "response": "d"}, {}, Example(turns("a", "b", "c"), "d")),
        ({"prompt": "a", "chosen": "b", "rejected": None}, {}, SINGLE),
        ({"question": "a", "answer": "b"}, {}, SINGLE),
        ({"query": "a", "completion": "b"}, {}, SINGLE),
        ({"prompt": "a", "label": "b", "response": None}, {}, SINGLE),
        *[({"prompt": "a", "completion": "b", "label": yes}, {}, SINGLE) for yes in (True, 1, "True", None)],
        ({"prompt": "a", "label": "0"}, {}, Example(turns("a"), "0")),  # the answer itself
        ({"prompt": "a", "label": "0"}, {"response": "label"}, Example(turns("a"), "0")),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "label": 0}, {}, PAIR),
        ({"instruction": "a", "input": "", "output": "b"}, {}, SINGLE),
        ({"instruction": "a", "input": "x", "output": "b"}, {}, Example(turns("a\n\nx"), "b")),
        ({"instruction": "a", "input": "x", "output": "b"}, {"prompt": "instruction", "chosen": "output"}, Example(turns("a\n\nx"), "b")),
        ({"instruction": "a", "context": "x", "response": "b"}, {}, Example(turns("a\n\nx"), "b")),
        ({"question": "a", "context": "x", "answer": "b"}, {}, Example(turns("a\n\nx"), "b")),
        ({"question": "a", "context": "x", "answer": "b"}, {"prompt": "context"}, Example(turns("x"), "b")),
        ({"prompt": "a", "input": "x", "output": "b"}, {}, Example(turns("a\n\nx"), "b")),
        ({"query": "a", "context": "x", "response": "b"}, {}, Example(turns("a\n\nx"), "b")),
        ({"prompt": "a x", "context": "x", "response": "b"}, {}, Example(turns("a x"), "b")),  # it is in there already
        ({"prompt": "\n\nHuman: a\n\nAssistant:", "context": "x", "response": "b"}, {}, SINGLE),
        ({"prompt": "a", "context": {"id": 3}, "response": "b"}, {}, SINGLE),
        ({"text": "a", "input": "x", "output": "b"}, {"prompt": "text", "response": "output"}, SINGLE),  # the map says what the prompt is
        # A prompt that was made of the instruction, with the answer in it or in the format of Alpaca
        ({"instruction": "a", "input": "x", "output": "b", "prompt": "Do: a\nWith: x\nSo: b"}, {}, Example(turns("a\n\nx"), "b")),
        ({"instruction": "a", "output": "b", "prompt": "### Instruction:\na\n\n### Response:"}, {}, SINGLE),
        ({"question": "a", "answer": "b", "prompt": "Please say: a"}, {}, Example(turns("Please say: a"), "b")),
        *[
            ({name: "Be kind.", "question": "a", "response": "b"}, {}, Example((SYSTEM, *turns("a")), "b"))
            for name in ("system_prompt", "system_message")
        ],
        ({"system_prompt": None, "question": "a", "response": "b"}, {}, SINGLE),
        # A subject called label, and KTO's
        ({"prompt": "a", "messages": messages("a", "b"), "label": "maths"}, {}, SINGLE),
        ({"messages": messages("a", "b"), "label": True}, {}, SINGLE),
        # Messages in a table
        ({"messages": json.dumps(messages("a", "b"))}, {}, SINGLE),
        ({"prompt": json.dumps(messages("a")), "chosen": "b", "rejected": json.dumps(messages("a", "c"))}, {}, PAIR),
        ({"prompt": "a", "response": "[1, 2]"}, {}, Example(turns("a"), "[1, 2]")),
        ({"prompt": "a", "response": '[{"x": 1}]'}, {}, Example(turns("a"), '[{"x": 1}]')),
        (
            {"instruction": "e", "input": "x", "output": "b", "history": [["a ", "b"], ["c", "d"]]},
            {},
            Example(turns(*"abcd", "e\n\nx"), "b"),
        ),
        *[({"instruction": "a", "output": "b", "history": none}, {}, SINGLE) for none in ([], None, "")],
        ({"prompt": "c", "chosen": "b", "rejected": "d", "history": [["a", "b"]]}, {}, Example(turns(*"abc"), "b", "d")),
        # A map, ours -> theirs; its names win over the usual ones
        ({"q": "a", "good": "b", "bad": "c"}, {"prompt": "q", "chosen": "good", "rejected": "bad"}, PAIR),
        ({"q": "a", "a": "b", "chosen": "x", "messages": []}, {"prompt": "q", "response": "a"}, SINGLE),
        ({"prompt": "x", "q": "a", "output": "b"}, {"prompt": "q"}, SINGLE),
        ({"q": "a", "output": "b", "s": " Be kind."}, {"prompt": "q", "system": "s"}, Example((SYSTEM, *turns("a")), "b")),
        ({"dialog": messages("a", "b"), "prompt": "x"}, {"messages": "dialog"}, SINGLE),
        # Chats
        ({"messages": messages("a", "b")}, {}, SINGLE),
        ({"messages": messages("a", "b", "thanks")}, {}, SINGLE),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "chosen_score": 7.5, "rejected_score": 7.0}, {}, PAIR),
        ({"system": "Be kind.", "messages": [SYSTEM, *messages("a", "b")]}, {}, Example((SYSTEM, *turns("a")), "b")),
        ({"messages": [SYSTEM, *messages("a", "b", "c", "d")]}, {}, Example((SYSTEM, *turns("a", "b", "c")), "d")),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, {}, SINGLE),
        ({"messages": [{"role": "User", "content": "a"}, {"role": "model", "content": "b"}]}, {}, SINGLE),
        ({"conversations": [{"from": "HUMAN", "value": "a"}, {"from": "GPT", "value": "b"}]}, {}, SINGLE),
        ({"messages": [TURNS[0], TURNS[1] | {"tool_calls": None}]}, {}, SINGLE),
        ({"prompt": "a", "messages": messages("a", "b")}, {}, SINGLE),
        ({"messages": [{"role": "user", "content": PARTS}, *messages("a", "b")[1:]]}, {}, SINGLE),
        # Preferences as TRL keeps them: with a prompt, with the prompt inside, with both
        ({"prompt": messages("a"), "chosen": messages("x", "b")[1:], "rejected": messages("x", "c")[1:]}, {}, PAIR),
        ({"chosen": messages("a", "b"), "rejected": messages("a", "c")}, {}, PAIR),
        ({"prompt": "a", "chosen": messages("a", "b"), "rejected": messages("a", "c"), "messages": messages("a", "b")}, {}, PAIR),
        ({"prompt": messages("a"), "chosen": messages("x", "b", "c", "d")[1:]}, {}, Example(turns("a", "b", "c"), "d")),
        # Preferences as LLaMA-Factory keeps them: one message each
        ({"conversations": [{"from": "human", "value": "a"}], "chosen": GOOD, "rejected": {"role": "assistant", "content": "c"}}, {}, PAIR),
        ({"conversations": messages(*"abc"), "chosen": GOOD}, {}, Example(turns(*"abc"), "b")),
        ({"conversations": messages("a"), "chosen": "b", "rejected": "c"}, {}, PAIR),
        ({"instruction": "a", "chosen": GOOD, "rejected": "c"}, {}, PAIR),
        # With ratings
        ({"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 7.5, "score_rejected": 7.0}, {}, PAIR),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 7.5, "score_rejected": None}, {}, PAIR),
        ({"prompt": "a", "chosen": "b", "rejected": None, "score_chosen": 1, "score_rejected": 2}, {}, SINGLE),
        # Whole dialogues
        (DIALOGUES, {}, PAIR),
        (DIALOGUES | {"prompt": "\n\nHuman: a\n\nAssistant:"}, {}, PAIR),
        (DIALOGUES | {"prompt": "a"}, {}, PAIR),
        ({"prompt": "x", "chosen": DIALOGUES["chosen"]}, {}, Example(turns("x"), DIALOGUES["chosen"].strip())),  # about another question
        ({"prompt": "a", "chosen": "b", "rejected": " Human: a"}, {}, Example(turns("a"), "b", "Human: a")),  # as some of HH's bad ones do
        # Answers with a label
        ({"prompt": "Human: a", "chosen": "Assistant: b", "rejected": "ASSISTANT:c"}, {}, PAIR),
        ({"prompt": "a", "response": "b Assistant: c"}, {}, Example(turns("a"), "b Assistant: c")),
        ({"good": DIALOGUES["chosen"], "bad": DIALOGUES["rejected"]}, {"chosen": "good", "rejected": "bad"}, PAIR),
        ({"chosen": DIALOGUES["chosen"]}, {}, SINGLE),
    ],
)
def test_fields(row, fields, example):
    assert adapt("fields", row, fields) == example


@pytest.mark.parametrize(
    "row, fields, prompt",
    [
        ({"prompt": "Hi?"}, {}, [user("Hi?")]),
        ({"prompt": "\n\nHuman: Hi?\n\nAssistant:", "chosen": None, "rejected": 3}, {}, [user("Hi?")]),
        ({"instruction": "Add", "input": "1 2", "output": ""}, {}, [user("Add\n\n1 2")]),
        # no_robots and UltraChat: the messages hold more than the field prompt, also for SFT
        ({"prompt": "a", "messages": [SYSTEM, *messages("a", "b")]}, {}, [SYSTEM, *turns("a")]),
        ({"prompt": "a", "messages": messages("a", "b", "c", "d")}, {}, turns("a", "b", "c")),
        ({"prompt": "a", "chosen": [SYSTEM, *messages("a", "b")], "rejected": [SYSTEM, *messages("a", "c")]}, {}, [SYSTEM, *turns("a")]),
        ({"prompt": "a", "response": messages("x", "b")[1:]}, {}, turns("a")),
        ({"prompt": json.dumps(messages("a"))}, {}, turns("a")),
        ({"frage": "Hi?", "system": "Be brief."}, {"prompt": "frage"}, [{"role": "system", "content": "Be brief."}, user("Hi?")]),
        ({"messages": TURNS[:1]}, {}, [user("a")]),
        ({"conversations": TURNS[:1], "chosen": GOOD, "rejected": GOOD}, {}, [user("a")]),
        ({"messages": TURNS}, {}, [user("a")]),
        ({"prompt": TURNS}, {}, [user("a")]),
        ({"conversations": [*TURNS, user("c")]}, {}, [*TURNS, user("c")]),
        ({"chosen": "\n\nHuman: Hi?\n\nAssistant: Ho.", "rejected": "x"}, {}, [user("Hi?")]),
        ({"messages": "\n\nHuman: Hi?\n\nAssistant: Ho."}, {}, [user("Hi?")]),
    ],
)
def test_prompts_of_rows_with_and_without_answers(row, fields, prompt):
    assert adapt("prompts", row, fields) == Example(tuple(prompt), None)


@pytest.mark.parametrize(
    "row, error, message",
    [
        ({"text": "a"}, Unmapped, "no prompt among the fields text; tried prompt, instruction"),
        ({"prompt": None}, BadRow, "field prompt is null"),
        ({"prompt": 3}, BadRow, "field prompt is of type int"),
        ({"messages": 3}, BadRow, "field messages is of type int"),
        ({"prompt": []}, Dropped, "empty prompt"),
        ({"prompt": " "}, Dropped, "empty prompt"),
        ({"messages": TURNS[1:]}, Dropped, "empty prompt"),
    ],
)
def test_rows_without_a_prompt(row, error, message):
    with pytest.raises(error, match=message):
        adapt("prompts", row, {})


def test_the_map_for_a_prompt_alone_has_no_answers():
    with pytest.raises(Unmapped) as caught:
        adapt("prompts", {"history": "a", "winner": "b", "loser": "c", "preferred": 1}, {})
    assert guessed_map(caught.value.row, caught.value.mapped) == "{prompt: history}"
    assert guessed_map({"text": "a", "id": 3}, ("prompt",)) == "{prompt: text}"


@pytest.mark.parametrize(
    "row, fields, message",
    [
        ({"text": "a"}, {}, "no response among the fields text; tried chosen, response"),
        ({"Frage": "a", "chosen": "b", "rejected": "c"}, {}, "no prompt among the fields Frage, chosen, rejected"),
        ({"prompt": "a", "chosen": "b"}, {"prompt": "q"}, "field q is missing; the row has prompt, chosen"),
        ({"prompt": "a", "chosen": 3}, {}, "field chosen is of type int, not a string"),
        ({"prompt": {"x": 1}, "chosen": "b"}, {}, "field prompt is of type dict, not a string"),
        ({"messages": ["a", "b"]}, {}, r"messages\[0\] is of type str"),
        (
            {"prompt": "a", "chosen": "[{'content': 'a', 'role': 'user'}\n {'content': 'b', 'role': 'assistant'}]"},
            {},
            "chosen holds a list of messages as text",
        ),
        ({"messages": [{"role": "Narrator", "content": "a"}]}, {}, r"messages\[0\] has role 'Narrator'"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, {}, "has role"),
        ({"messages": [{"role": "user", "content": None}]}, {}, r"messages\[0\] has content null, not a string"),
        (
            {"messages": [{"role": "user", "content": [*PARTS, {"type": "image", "url": "x"}]}]},
            {},
            "content of type list, not a string or a list",
        ),
        ({"messages": [{"role": "user", "content": []}]}, {}, "content of type list, not a string or a list"),
        ({"prompt": None, "chosen": "b", "rejected": "c"}, {}, "field prompt is null"),
        ({"instruction": "a", "output": "b", "history": "c"}, {}, "field history is of type str, not a list"),
        (
            {"instruction": "a", "output": "b", "history": [["c", "d"], ["e"]]},
            {},
            r"history\[1\] is not a pair of texts, \[user, assistant\]",
        ),
        ({"instruction": "a", "output": "b", "history": [["c", None]]}, {}, r"history\[0\] is not a pair of texts"),
    ],
)
def test_fields_of_broken_rows(row, fields, message):
    with pytest.raises(BadRow, match=message):
        adapt("fields", row, fields)


@pytest.mark.parametrize(
    "row, why",
    [
        ({"chosen": messages("a", "b", "c"), "rejected": messages("a", "d")}, "dialogue ends with a user turn"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "chosen-rating": 2, "rejected-rating": 5}, "chosen is rated no higher"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "rating_chosen": "2", "rating_rejected": "2"}, "chosen is rated no higher"),
        ({"messages": [*messages("a"), {"role": "assistant", "content": ""}]}, "empty response"),
        ({"chosen": "\n\nHuman: a\n\nAssistant:"}, "empty response"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "rejected": "d"}, "dialogue ends with a user turn"),
        ({"messages": []}, "empty response"),
        ({"messages": messages("a", "b"), "kto_tag": "false"}, "marked as bad (label: false)"),
        ({"messages": messages("a", "b"), "kto_tag": None, "label": False}, "marked as bad (label: false)"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": "1.0", "score_rejected": "5.0"}, "chosen is rated no higher"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 7, "score_rejected": 7.0}, "chosen is rated no higher"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 6.5, "score_rejected": 7.0}, "chosen is rated no higher"),
        *[({"messages": [*messages("a"), turn, *messages("b", "c")]}, "tool calls in the dialogue") for turn in TOOL_TURNS],
        ({"messages": messages("a", "b")[1:]}, "empty prompt"),
        ({"prompt": "", "response": "b"}, "empty prompt"),
        ({"prompt": [], "response": messages("a", "b")[1:]}, "empty prompt"),
        ({"chosen": messages("a", "b"), "rejected": messages("x", "c")}, "prompts differ"),
        *[
            ({"prompt": "a", "completion": "b", "label": no}, "marked as bad (label: false)")
            for no in (False, 0, 0.0, "0", "False", "false")
        ],
    ],
)
def test_fields_of_useless_rows(row, why):
    assert reason("fields", row) == why


@pytest.mark.parametrize(
    "row, guess, why_not",
    [
        ({"question": "a", "good": "b", "bad": "c"}, "{prompt: question, chosen: good, rejected: bad}", None),
        ({"post": "a", "bad_reply": "c", "good_reply": "b"}, "{prompt: post, chosen: good_reply, rejected: bad_reply}", None),
        ({"q": "a", "text": "b"}, "{prompt: FIELD, chosen: FIELD, rejected: FIELD}", None),
        ({"Frage": "a", "chosen": "b", "rejected": "c"}, "{prompt: FIELD, chosen: chosen, rejected: rejected}", None),
        ({"question": "a", "winner": "b", "loser": "c"}, "{prompt: question, chosen: winner, rejected: loser}", None),
        ({"question": "a", "best_answer": "Paris"}, "{prompt: question, chosen: best_answer, rejected: FIELD}", None),
        # Which answer is better stands in a field of its own: the map alone would turn every other pair round
        (
            {"query": "a", "response_a": "b", "response_b": "c", "preferred": "b"},
            "{prompt: query, chosen: response_a, rejected: FIELD}",
            "Field preferred says which answer is better",
        ),
        ({"query": "a", "text_0": "b", "text_1": "c", "better": 1}, "{prompt: query, chosen: FIELD, rejected: FIELD}", "Field better says"),
        (
            {"dialogue_a": "a", "dialogue_b": "b", "winner": "model_b"},
            "{prompt: FIELD, chosen: winner, rejected: FIELD}",
            "Field winner says",
        ),
        ({"Frage": "a", "completion": "b", "label": True}, "{prompt: FIELD, chosen: completion, rejected: FIELD}", None),
        # A name alone is not enough: a map needs texts
        ({"question": "a", "good_natured": True, "good": "b", "bad": None}, "{prompt: question, chosen: good, rejected: FIELD}", None),
        ({"post": messages("a"), "good": GOOD, "bad": [1]}, "{prompt: post, chosen: good, rejected: FIELD}", None),
        (NECTAR, "{prompt: prompt, chosen: FIELD, rejected: FIELD}", "Field answers is a list of rated answers, and no map reads that"),
        (ULTRAFEEDBACK, "{prompt: instruction, chosen: FIELD, rejected: FIELD}", "Field completions is a list of rated answers"),
        ({"text": "a", "score": 3}, "{prompt: FIELD, chosen: FIELD, rejected: FIELD}", "A text alone has no prompt .* dataset.pretrain="),
    ],
)
def test_a_row_with_unknown_names_comes_with_a_map_to_type(row, guess, why_not):
    with pytest.raises(Unmapped) as caught:
        adapt("fields", row, {})
    assert guessed_map(caught.value.row, caught.value.mapped) == guess
    said = why_no_map(caught.value.row)
    assert re.match(why_not, said) if why_not else said is None


@pytest.mark.parametrize("name, row", [(name, row) for name, row, _ in ROWS], ids=[name for name, _, _ in ROWS])
def test_rows_of_published_sets_that_fields_cannot_read_are_recognised(name, row):
    try:
        adapt("fields", row, {})
    except Unmapped:
        assert name in published_like(row)[:2]  # Chinese and Japanese rows look alike
    for other in (NECTAR, ULTRAFEEDBACK, {"question": "a", "good": "b", "bad": "c"}, {"text": "a"}):
        assert published_like(other) == []


def test_fields_map_with_an_unknown_name():
    with pytest.raises(UserError, match=r"mine.fields: unknown name promt .did you mean prompt"):
        check_adapter("mine", "fields", {"promt": "q"})


def test_row_that_is_no_mapping():
    with pytest.raises(BadRow, match="the row is of type list"):
        adapt("fields", ["a"], {})


# --- real rows --------------------------------------------------------------------------------------------------------


def adapt_all(name: str, rows: list[dict]) -> tuple[list[Example], Counter]:
    made, counts = [], Counter()
    for row in rows:
        try:
            made.append(adapt(name, row, {}))
        except Dropped as dropped:
            counts[dropped.args[0]] += 1
    for example in made:
        assert example.prompt[0]["role"] == example.prompt[-1]["role"] == "user"
        assert example.chosen == example.chosen.strip() and example.rejected != example.chosen
    return made, counts


def squeeze(text: str) -> str:
    return "".join(text.split())


def real(path: str) -> Path:
    if not (DATA / path).exists():
        pytest.skip(f"{DATA / path} is not here")
    return DATA / path


def test_real_hh_dialogues():
    with gzip.open(real("raw/hh-rlhf/helpful-base.test.jsonl.gz"), "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    made, counts = adapt_all("hh_dialogue", rows)
    assert counts == {"prompts differ": 9, "empty response": 4, "identical pair": 2}
    assert made == adapt_all("fields", rows)[0]
    published = {squeeze(row["chosen"]) for row in rows}
    for example in made:
        dialogue = [*example.prompt, {"role": "assistant", "content": example.chosen}]
        assert squeeze("".join(("Human:" if t["role"] == "user" else "Assistant:") + t["content"] for t in dialogue)) in published


@pytest.mark.parametrize("name", ["reward_example_100", "reward_with_scores_250"])
def test_real_rm_static_schema(name):
    from pyarrow import parquet

    rows = parquet.read_table(real(f"raw/rm-static-schema-sample/{name}.parquet")).to_pylist()
    made, counts = adapt_all("rm_static", rows)
    assert len(made) == len(rows) and not counts
    # 'User: ...\nAssistant: '; the second file holds a backslash and an n in place of each newline between turns
    assert [len(e.prompt) for e in made] == [2 * row["prompt"].count("User:") - 1 for row in rows]
    assert not any(turn["content"].endswith(("\\n", "Assistant:")) for e in made for turn in e.prompt)


# --- presets ----------------------------------------------------------------------------------------------------------

PRESETS = sorted(path.stem for path in (REPO / "conf" / "dataset").glob("*.yaml"))
BLENDS = {"deepspeed_chat": 6, "chinese": 4, "japanese": 4}


@pytest.fixture(scope="module", autouse=True)
def conf():
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        yield


def dataset(*overrides: str):
    return load(compose("config", overrides=list(overrides))).dataset


def test_every_source_has_a_preset():
    sources = {path.stem for path in (REPO / "conf" / "dataset" / "source").glob("*.yaml")}
    assert sources | set(BLENDS) | {"hub", "jsonl", "prompts", "toy"} == set(PRESETS)
    assert set(ADAPTERS) - sources == {"fields", "hh_dialogue", "prompts", "toy"} and sources - set(ADAPTERS) == {"hh_rlhf"}


@pytest.mark.parametrize("name", PRESETS)
def test_preset(name):
    # The group alone: a third of the time of the whole config
    group = compose(f"dataset/{name}", overrides=["dataset.path=a"] if name in ("hub", "jsonl", "prompts") else [])
    values = OmegaConf.to_container(group.dataset, resolve=True)
    composed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Dataset), values))
    assert composed.name == name and len(composed.sources) == BLENDS.get(name, 1)
    assert all(source.adapter in ADAPTERS for source in composed.sources.values())
    if any(source.only == "sft" for source in composed.sources.values()):
        assert (composed.split.reward, composed.split.ppo) == (0, 0)


def test_overrides_of_presets():
    words = ["dataset=deepspeed_chat", "dataset.sources.shp.weight=0.5", "dataset.sources.shp.subset=x"]
    shp = dataset(*check_overrides(words, REPO / "conf")).sources["shp"]
    assert (shp.weight, shp.subset, shp.split) == (0.5, "x", "train")
    assert list(dataset("dataset=rm_static", "+dataset/source=[shp,webgpt]").sources) == ["rm_static", "shp", "webgpt"]
    assert "shp" not in dataset("dataset=deepspeed_chat", "~dataset.sources.shp").sources
    words = ["dataset=hub", "dataset.path=a/b", "dataset.fields={prompt: q, response: a}", "dataset.sources.hub.split=dev"]
    hub = dataset(*check_overrides(words, REPO / "conf"))
    source = hub.sources["hub"]
    assert (source.path, source.split) == ("a/b", "dev")
    assert adapt(source.adapter, {"q": "a", "a": "b"}, source.fields) == SINGLE
