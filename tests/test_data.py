"""Data: who gets which prompt, which rows a step sees, how dialogues become tokens, files and caches, and the toy judge."""

import csv
import gzip
import io
import itertools
import json
import random
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example as including
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from runner.config.schema import PhaseSplit, Source
from runner.data import cache, sources, toy
from runner.data.batches import EMPTY, Batches, micro_sizes, pad, pair_batch, pick, preference_batch, sft_batch, shard, subset
from runner.data.cache import copies_of
from runner.data.encoder import training_texts
from runner.data.examples import Counts, adapted, examples
from runner.data.split import held_out, phase_of, prompt_hash
from runner.errors import UserError
from runner.models.tokenizer import (
    decode_response,
    encode_prompts,
    encode_responses,
    fingerprint,
    gap,
    load_tokenizer,
    plain,
    render_prompt,
    same_tokens,
    train_tokenizer,
)

fuzz = settings(deadline=None, max_examples=50, derandomize=True)
STAGES = ("sft", "reward", "ppo")
REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


def asked(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


# --- the split --------------------------------------------------------------------------------------------------------

SPLIT = PhaseSplit(2, 4, 4)


def test_the_split_is_proportional_and_the_holdout_cuts_every_stage_alike():
    numbers = [prompt_hash(asked(f"question {i}")) for i in range(20_000)]
    of = {stage: [n for n in numbers if phase_of(n, SPLIT) == stage] for stage in STAGES}
    for stage, share in zip(STAGES, (0.2, 0.4, 0.4), strict=True):
        assert len(of[stage]) == pytest.approx(20_000 * share, abs=4 * (20_000 * share * (1 - share)) ** 0.5)
        held = sum(held_out(n, 0.1) for n in of[stage])
        assert held == pytest.approx(0.1 * len(of[stage]), abs=4 * (0.09 * len(of[stage])) ** 0.5)


@pytest.mark.parametrize(
    "number, stage",
    [(0, "sft"), (int(0.1999 * 2**64), "sft"), (int(0.2001 * 2**64), "reward"), (int(0.6001 * 2**64), "ppo"), (int(0.9999 * 2**64), "ppo")],
)
def test_edges_of_the_split(number, stage):
    assert phase_of(number, SPLIT) == stage
    assert phase_of(number, PhaseSplit(0, 1, 0)) == "reward"
    assert phase_of(number, PhaseSplit(0.4, 0.8, 0.8)) == stage  # shares, not counts


def test_the_first_human_turn_decides_without_case_punctuation_and_spacing():
    reference = prompt_hash(asked("What is  a river?"))
    assert (
        reference
        == prompt_hash(asked("what is a River"))
        == prompt_hash([{"role": "system", "content": "Be kind."}, *asked("What is a river?!")])
    )
    assert reference == prompt_hash([*asked("What is a river?"), {"role": "assistant", "content": "Water."}, *asked("Where?")])
    assert reference != prompt_hash(asked("What is a lake?"))
    assert prompt_hash(asked("???")) != prompt_hash(asked("!!!"))  # without words, what is there counts
    assert prompt_hash(asked("什么是河?")) == prompt_hash(asked("什么是河")) != prompt_hash(asked("什么是湖"))
    assert prompt_hash(asked("caf\u00e9")) == prompt_hash(asked("cafe\u0301"))


@fuzz
@given(st.text(), st.permutations([0, 1.5, 4]))
def test_a_prompt_never_goes_to_a_stage_without_a_share(text, shares):
    split = PhaseSplit(*shares)
    stage = phase_of(prompt_hash(asked(text)), split)
    assert stage in STAGES and getattr(split, stage) > 0


def test_copies_of():
    assert [copies_of(w, 7) for w in (1.0, 2.0, 0.5)] == [1, 2, 1]
    numbers = [prompt_hash(asked(f"question {i}")) for i in range(5000)]
    for weight in (0.3, 1.0, 2.5):
        copies = [copies_of(weight, n) for n in numbers]
        assert set(copies) <= {int(weight), int(weight) + 1}
        assert np.mean(copies) == pytest.approx(weight, abs=0.03)


# --- batches ----------------------------------------------------------------------------------------------------------


def lengths_of(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 100, n)


def make(n: int, world: int = 1, rank: int = 0, **changes) -> Batches:
    options = {"global_batch": 8, "positions": 200, "seed": 1} | changes
    return Batches(lengths_of(n), options.pop("global_batch"), options.pop("positions"), world=world, rank=rank, **options)


@pytest.mark.parametrize("n", [1, 8, 37, 300])
def test_every_row_once_per_epoch(n):
    batches = make(n)
    assert batches.per_epoch == -(-n // 8)
    orders = []
    for epoch in range(2):
        slots = np.concatenate([batches.rows(epoch * batches.per_epoch + s) for s in range(batches.per_epoch)])
        assert len(slots) == 8 * batches.per_epoch
        assert sorted(slots[slots != EMPTY]) == list(range(n))
        orders.append(slots.tolist())
    assert batches.per_epoch == 1 or orders[0] != orders[1]


def test_empty_slots_are_at_the_end_of_one_batch():
    """37 rows in batches of 8: one batch has 5 rows and 3 empty slots, the others none."""
    batches = make(37)
    empty = [(batches.rows(s) == EMPTY).sum() for s in range(5)]
    assert sorted(empty) == [0, 0, 0, 0, 3]
    assert (batches.rows(empty.index(3))[-3:] == EMPTY).all()


def test_drop_last_leaves_out_the_rest():
    batches = make(37, drop_last=True)
    assert batches.per_epoch == 4
    slots = np.concatenate([batches.rows(s) for s in range(4)])
    assert EMPTY not in slots and len(set(slots)) == 32
    # Another epoch leaves out others
    assert set(slots) != set(np.concatenate([batches.rows(s) for s in range(4, 8)]))
    assert make(7, drop_last=True).steps(3, None) == 0


@pytest.mark.parametrize("n", [5, 37, 64])
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(n):
    for step in range(3):
        whole = make(n).rows(step)
        for world in (1, 2, 4):
            ranks = [make(n, world, rank).micro_batches(step) for rank in range(world)]
            # Equally many backward passes, of equally many rows
            assert len({tuple(map(len, micros)) for micros in ranks}) == 1
            dealt = np.concatenate([micro for micros in ranks for micro in micros])
            assert sorted(dealt) == sorted(whole)


@fuzz
@given(st.lists(st.integers(1, 40), min_size=1, max_size=10), st.integers(1, 120), st.booleans())
def test_micro_batches_are_few_and_even(lengths, positions, packed):
    """Against all ways to cut the rows."""
    lengths = np.sort(lengths)[::-1]
    sizes = micro_sizes(lengths, positions, packed)
    assert sum(sizes) == len(lengths) and min(sizes) >= 1

    def largest(sizes: list[int]) -> int:
        starts = np.cumsum([0, *sizes[:-1]])
        # A row that is longer than a micro batch may be has one for itself
        counted = [lengths[start : start + n].sum() if packed else n * lengths[start] for start, n in zip(starts, sizes, strict=True)]
        return max((count for count, n in zip(counted, sizes, strict=True) if n > 1), default=0)

    assert largest(sizes) <= positions
    for cuts in range(len(sizes)):
        for places in itertools.combinations(range(1, len(lengths)), cuts):
            other = np.diff([0, *places, len(lengths)]).tolist()
            assert largest(other) > positions or (len(other) == len(sizes) and largest(other) >= largest(sizes))


def test_micro_batches_of_dialogues():
    """Worked by hand, counted as rows times the longest, and as tokens."""
    assert micro_sizes(np.array([40, 30, 20, 20, 20, 5, 5]), 100, packed=False) == [2, 5]  # 80 and 100
    assert micro_sizes(np.array([40, 30, 20, 20, 20, 5, 5]), 99, packed=False) == [2, 4, 1]  # 80, 80 and 5
    assert micro_sizes(np.array([40, 30, 20, 20, 20, 5, 5]), 100, packed=True) == [2, 5]  # 70 and 70
    assert micro_sizes(np.array([40, 30, 20, 20, 20, 5, 5]), 69, packed=True) == [1, 2, 4]  # 40, 50 and 50
    assert micro_sizes(np.array([40, 40, 40, 40]), 100, packed=False) == [2, 2]
    assert micro_sizes(np.array([40, 40, 40, 40, 40, 40]), 170, packed=False) == [3, 3]  # four and two fit as well
    assert micro_sizes(np.array([300, 10, 10]), 100, packed=False) == micro_sizes(np.array([300, 10, 10]), 100, packed=True) == [1, 2]
    assert micro_sizes(np.array([9, 0, 0]), 9, packed=False) == [1, 2]  # empty slots
    assert micro_sizes(np.array([9, 0, 0]), 9, packed=True) == [3]


def test_the_step_is_the_whole_position():
    used, fresh = make(37), make(37)
    for s in range(7):
        used.rows(s)
    for s in (7, 3, 12):
        assert used.rows(s).tolist() == fresh.rows(s).tolist() == make(37).rows(s).tolist()
    assert make(37).rows(0).tolist() != make(37, seed=2).rows(0).tolist()


@pytest.mark.parametrize("epochs, limit, expected", [(1, None, 5), (2, None, 10), (0.5, None, 3), (0.01, None, 1), (2, 4, 4)])
def test_steps(epochs, limit, expected):
    assert make(37).steps(epochs, limit) == expected  # 5 batches per epoch


def test_rounding_makes_no_step_more():
    assert 0.55 * 100 > 55 == make(800).steps(0.55, None)


def padded(batches: Batches, steps: int) -> float:
    groups = [batches.lengths[m[m != EMPTY]] for s in range(steps) for m in batches.micro_batches(s)]
    return 1 - sum(g.sum() for g in groups) / sum(g.max() * len(g) for g in groups)


def test_grouping_by_length_saves_padding_and_batches_stay_mixed():
    """Lengths 3 to 99 in pairs: at random 1 - 51 / 67 = 24 % is padding. A batch of 64 holds rows of all lengths."""
    n = 1024
    assert padded(make(n, global_batch=64), 16) < 0.06
    shuffled = np.random.default_rng(0).permutation(n).reshape(-1, 2)
    assert 0.2 < 1 - lengths_of(n)[shuffled].sum() / (2 * lengths_of(n)[shuffled].max(1).sum()) < 0.3
    batches = make(n, global_batch=64)
    lengths = np.array([batches.lengths[batches.rows(s)] for s in range(16)])
    assert (np.diff(lengths, axis=1) <= 0).all()  # the longest first
    assert lengths.min(1).max() < 20 < 80 < lengths.max(1).min() and lengths.mean(1).std() < 28 / 64**0.5 * 1.5


@pytest.mark.parametrize("n, micro, world", [(10, 2, 1), (10, 2, 4), (1, 4, 2), (16, 2, 4)])
def test_shard(n, micro, world):
    ranks = [shard(n, micro, world, rank) for rank in range(world)]
    assert {len(micros) for micros in ranks} == {-(-n // (micro * world))}
    assert {len(m) for micros in ranks for m in micros} == {micro}
    dealt = np.concatenate([m for micros in ranks for m in micros])
    assert sorted(dealt[dealt != EMPTY]) == list(range(n))


def test_subset_is_always_the_same_and_in_order():
    assert subset(5, 9).tolist() == [0, 1, 2, 3, 4]
    some = subset(1000, 50)
    assert len(set(some)) == 50 and (np.diff(some) > 0).all() and some.tolist() == subset(1000, 50).tolist()
    assert some.max() > 800  # from everywhere, not the first ones


# --- tensors ----------------------------------------------------------------------------------------------------------


def test_pad():
    ids, mask = pad([[5, 6], [7], []], 9)
    assert ids.tolist() == [[5, 6], [7, 9], [9, 9]] and mask.tolist() == [[1, 1], [1, 0], [1, 0]]
    ids, mask = pad([[5, 6], [7], []], 9, left=True)
    assert ids.tolist() == [[5, 6], [9, 7], [9, 9]] and mask.tolist() == [[1, 1], [0, 1], [0, 1]]
    assert pad([[]], 9)[0].tolist() == [[9]]


SFT_ROWS = [
    {"input_ids": [11, 12, 13, 14, 15], "prompt_length": 3, "length": 5},
    None,
    {"input_ids": [21, 22], "prompt_length": 0, "length": 2},  # packed text: no prompt
    {"input_ids": [31, 32, 33], "prompt_length": 1, "length": 3},
]


def test_sft_batch_counts_responses_only():
    """Width 5. Token j of row i is predicted at position 5 i + j - 1."""
    batch = sft_batch(SFT_ROWS, 0, prompt_loss=0.0)
    assert batch["index"].tolist() == [2, 3, 10, 15, 16]
    assert batch["targets"].tolist() == [14, 15, 22, 32, 33]
    assert batch["weights"].tolist() == [1.0] * 5
    assert batch["ids"].tolist()[:3] == [[11, 12, 13, 14, 15], [0] * 5, [21, 22, 0, 0, 0]]
    assert batch["mask"].sum(1).tolist() == [5, 1, 2, 3]


def test_sft_batch_with_prompt_loss():
    """The very first token of a row is never predicted; the other prompt tokens weigh a half."""
    batch = sft_batch(SFT_ROWS, 0, prompt_loss=0.5)
    assert batch["index"].tolist() == [0, 1, 2, 3, 10, 15, 16]
    assert batch["targets"].tolist() == [12, 13, 14, 15, 22, 32, 33]
    assert batch["weights"].tolist() == [0.5, 0.5, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("prompt_loss", [0.0, 0.5])
def test_loss_weights_of_the_data_are_those_of_the_batches(prompt_loss):
    """SFT divides by the weights of the whole step, which it knows from lengths alone."""
    from runner.data.batches import loss_weights

    for row in (r for r in SFT_ROWS if r):
        expected = sft_batch([row], 0, prompt_loss)["weights"].sum()
        assert loss_weights(np.array([row["length"]]), np.array([row["prompt_length"]]), prompt_loss)[0] == pytest.approx(expected.item())


def test_a_batch_of_empty_slots_only():
    batch = sft_batch([None, None], 0, 0.0)
    assert batch["ids"].shape == (2, 1) and batch["index"].shape == batch["weights"].shape == (0,)
    assert batch["index"].dtype == batch["targets"].dtype == torch.long


def test_pair_batch():
    rows = [{"chosen_ids": [1, 2, 3], "rejected_ids": [1, 4]}, None]
    batch = pair_batch(rows, 9)
    assert batch["ids"].tolist() == [[1, 2, 3], [9, 9, 9], [1, 4, 9], [9, 9, 9]]
    assert batch["mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]]
    assert batch["pair_rows"].tolist() == [0]


def test_preference_batch_predicts_the_responses_with_their_ends_and_not_the_prompts():
    """Width 5. Token j of row i is predicted at position 5 i + j - 1; rows 1 and 3 are the empty slot."""
    rows = [{"chosen_ids": [1, 2, 3, 4, 5], "rejected_ids": [1, 2, 6], "prompt_length": 2}, None]
    batch = preference_batch(rows, 9)
    assert batch["targets"].tolist() == [3, 4, 5, 6]
    assert batch["index"].tolist() == [1, 2, 3, 11]
    assert batch["target_mask"].sum(1).tolist() == [3, 0, 1, 0]
    assert preference_batch([None], 9)["targets"].shape == (0,)


def test_pick():
    assert pick(["a", "b", "c"], np.array([2, EMPTY, 0])) == ["c", None, "a"]


# --- tokenizers -------------------------------------------------------------------------------------------------------

DIALOGUE = [*asked("Please describe the river for Ann."), {"role": "assistant", "content": "The river is calm."}, *asked("And the lake?")]
RESPONSES = ["The lake is bright.", "  Calm, and fresh. \n", "(1) lake", "bright"]
ALPHABET = [
    "\n\nHuman: Please describe the river for Ann.\n\nAssistant: The river is calm.",
    "And the lake? bright fresh Calm, (1) and: is :",
] * 3


def byte_level(folder: Path) -> str:
    train_tokenizer(ALPHABET, 300).save_pretrained(folder)
    return str(folder)


def starting_with_bos(folder: Path) -> str:
    """Puts <s> before every text, as LLaMA does."""
    made = train_tokenizer(ALPHABET, 300)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.save_pretrained(folder)
    return str(folder)


def opt_like(folder: Path) -> str:
    """BOS and EOS are the same token, and every text begins with it."""
    made = train_tokenizer(ALPHABET, 300)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    made.add_special_tokens({"bos_token": "</s>"})
    made.save_pretrained(folder)
    return str(folder)


def gpt2_like(folder: Path) -> str:
    """EOS is all it has, and serves as PAD."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.train_from_iterator(
        ALPHABET, trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
    return str(folder)


def sentencepiece_like(folder: Path) -> str:
    """A mark for each space, one put before the text, BOS before that: LLaMA's."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace(prepend_scheme="first")
    core.train_from_iterator(ALPHABET, trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return str(folder)


KINDS = [byte_level, starting_with_bos, opt_like, gpt2_like, sentencepiece_like]


@pytest.fixture(params=KINDS, ids=[k.__name__ for k in KINDS])
def loaded(request, cfg, tmp_path):
    return load_tokenizer(request.param(tmp_path), chat_template=cfg.model.chat_template)


def test_pad_is_never_eos(loaded):
    assert loaded.pad_token_id is not None and loaded.eos_token_id is not None
    assert loaded.pad_token_id != loaded.eos_token_id
    assert loaded.padding_side == loaded.truncation_side == "left"
    assert len({loaded.pad_token_id, loaded.eos_token_id, *loaded("a b c", add_special_tokens=False).input_ids}) > 2


def test_spare_pad_tokens_are_used_before_a_new_one(tmp_path):
    made = train_tokenizer(ALPHABET, 300)
    size = len(made)
    made.pad_token = made.eos_token
    made.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.pad_token == "<pad>" and len(again) == size


def test_unk_is_the_pad_where_every_character_has_bytes(cfg, tmp_path):
    """LLaMA 1 and 2: then the embeddings of the base have a row for PAD, and no text holds it."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(set("".join(ALPHABET)) | {"\u2581"})]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path), chat_template=cfg.model.chat_template)
    assert (again.pad_token, again.pad_token_id, len(again)) == ("<unk>", 0, len(made))
    for text, read in {"calm \U0001f600 \u0416": "calm \U0001f600 \u0416", "calm<unk>": "calm"}.items():
        (ids,) = encode_responses(again, [text])
        assert 0 not in ids and decode_response(again, [*ids, 0, 0]) == read
    made.add_tokens("<pad>")  # the family's own goes before it
    made.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == "<pad>"


def test_a_new_token_never_shares_its_number(tmp_path):
    """In a vocabulary with a hole, tokenizers gives a new token the number of one that is there."""
    words = {"a": 0, "b": 1, "</s>": 2, "[UNK]": 3, "c": 4, "d": 6}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="[UNK]").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"would share its number 6 with 'd'"):
        load_tokenizer(str(tmp_path))


def test_bos_stands_in_the_template_where_the_tokenizer_adds_one(loaded, request, cfg):
    begins = {"starting_with_bos": [1], "opt_like": [2], "sentencepiece_like": [1]}
    ids = encode_prompts(loaded, [DIALOGUE])[0]
    first = begins.get(request.node.callspec.id.split("-")[-1], [])
    assert ids[: len(first)] == first
    special = {loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id}
    assert not special & set(ids[len(first) :])  # once, and nothing else


@pytest.mark.parametrize("response", RESPONSES)
def test_prompt_and_response_make_the_whole_dialogue(loaded, response):
    """render(prompt) + ' ' + response is the chat template's own rendering, as text and as tokens."""
    full = [*DIALOGUE, {"role": "assistant", "content": response.strip()}]
    text = loaded.apply_chat_template(full, tokenize=False)
    assert render_prompt(loaded, DIALOGUE) + " " + response.strip() == text
    joined = encode_prompts(loaded, [DIALOGUE])[0] + encode_responses(loaded, [response])[0]
    assert joined == [*loaded(text, add_special_tokens=False).input_ids, loaded.eos_token_id]


def template(opening: str, gap: str, thought: str = "", end: str = "eos_token") -> str:
    """One in which a turn is its role in brackets and `opening`, then `gap`, a reply's `thought`, what is said, and `end`."""
    start, thought = f"'[' + m['role'] + ']{opening}{gap}'", f"('{thought}' if m['role'] == 'assistant' else '')"
    turns = f"{{% for m in messages %}}{{{{ {start} + {thought} + m['content'] + {end} }}}}{{% endfor %}}"
    return turns + f"{{% if add_generation_prompt %}}{{{{ '[assistant]{opening}' }}}}{{% endif %}}"


@pytest.mark.parametrize("opening, between", [("\\n\\n", ""), ("\\n", ""), ("", "\\n"), ("", " "), (":", " ")])
@pytest.mark.parametrize("end", ["eos_token", "eos_token + '\\n'"])
def test_a_response_begins_as_the_template_begins_it(loaded, opening, between, end):
    """In order: as LLaMA 3's own template does it, ChatML, Zephyr with half an opening, LLaMA 2, and the Human/Assistant format."""
    loaded.chat_template = template(opening, between, end=end)
    full = loaded.apply_chat_template([*DIALOGUE, {"role": "assistant", "content": "calm, bright"}], tokenize=False)
    assert gap(loaded) == between.replace("\\n", "\n")
    ids = encode_prompts(loaded, [DIALOGUE])[0] + encode_responses(loaded, ["calm, bright"])[0]
    assert ids == loaded(full.rstrip("\n"), add_special_tokens=False).input_ids


def test_a_thought_that_the_template_adds_is_no_part_of_the_response(loaded):
    loaded.chat_template = template("\\n", "", thought="<think></think>")
    assert gap(loaded) == ""
    loaded.chat_template = template(":", " ", thought="<think></think>")
    assert gap(loaded) == " "


@pytest.mark.parametrize("response", RESPONSES)
def test_responses_end_with_eos_and_decode_to_themselves(loaded, response):
    ids = encode_responses(loaded, [response])[0]
    assert ids[-1] == loaded.eos_token_id and loaded.eos_token_id not in ids[:-1]
    assert decode_response(loaded, ids) == response.strip()
    assert decode_response(loaded, [*ids, loaded.pad_token_id, loaded.pad_token_id]) == response.strip()


def test_end_token(cfg, tmp_path):
    path = byte_level(tmp_path)
    made = load_tokenizer(path, end_token="<|end|>", chat_template=cfg.model.chat_template)
    assert made.eos_token == "<|end|>" and made.eos_token_id == len(train_tokenizer(ALPHABET, 300))
    assert encode_responses(made, ["calm"])[0][-1] == made.eos_token_id
    assert load_tokenizer(path, end_token="<s>").eos_token_id == 1


def test_a_vocabulary_that_merges_a_line_break_with_what_follows_loses_nothing():
    """As BLOOM's pre-tokenizer allows it. The template's opening ends with a line break."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(["x\n(a)\n(b)\n(c)"] * 50, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"
    )
    assert len(tokenizer("\n(").input_ids) == 1
    assert [decode_response(tokenizer, ids) for ids in encode_responses(tokenizer, ["(a) yes", "yes"])] == ["(a) yes", "yes"]


@pytest.mark.parametrize(
    "core, end",
    [(train_tokenizer(ALPHABET, 300).backend_tokenizer, "</s>"), (Tokenizer(models.WordLevel({"a": 0, "<pad>": 1}, "a")), "<|endoftext|>")],
    ids=["has one without a name", "has none"],
)
def test_a_tokenizer_without_eos_is_refused_with_one_that_cures_it(core, end, tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=re.escape(f"has no EOS: no response would ever end. Type 'model.end_token=\"{end}\"'")):
        load_tokenizer(str(tmp_path))
    assert load_tokenizer(str(tmp_path), end_token=end).eos_token == end


def test_loading_again_changes_nothing(loaded, cfg, tmp_path):
    loaded.save_pretrained(tmp_path / "saved")
    for template in (None, cfg.model.chat_template):
        again = load_tokenizer(str(tmp_path / "saved"), chat_template=template)
        assert same_tokens(loaded, again) and len(again) == len(loaded)
        assert again.chat_template == loaded.chat_template


def test_fingerprints_differ_where_tokenisation_does(cfg, tmp_path):
    made = [load_tokenizer(kind(tmp_path / kind.__name__), chat_template=cfg.model.chat_template) for kind in KINDS]
    assert len({fingerprint(t) for t in made}) == len(KINDS)
    before = fingerprint(made[0])
    made[0].chat_template = "{{ messages[0]['content'] }}"
    assert fingerprint(made[0]) != before and not same_tokens(made[0], made[1])
    # A word that is special is taken out of texts
    named = [PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<x>": 1}, "a"))) for _ in range(2)]
    for tokenizer, special in zip(named, (True, False), strict=True):
        tokenizer.add_tokens([AddedToken("<x>", special=special)])
    assert not same_tokens(*named)


# --- files ------------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(5)]


def write(path: Path, rows: list) -> Path:
    """Rows in the format that the name of the file says."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    text = lines if ".jsonl" in path.suffixes else json.dumps(rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix:
        path.write_text(text)
    else:
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


def read(path: Path, **changes) -> list:
    return list(sources.rows(replace(Source(str(path)), **changes), 0))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz", "a.json.gz", "a.parquet", "folder"])
def test_rows_of_every_format(name, tmp_path):
    path = write(tmp_path / name, ROWS)
    found = read(path)
    assert [row for _, row in found] == ROWS
    assert found[3][0] == (f"{path}:4" if "jsonl" in name else f"{path} row 4")


def test_other_shapes_of_json(tmp_path):
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    (tmp_path / "wrapped.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    (tmp_path / "one.json").write_text(json.dumps(ROWS[0]))
    (tmp_path / "gaps.jsonl").write_text("\n".join(["", *map(json.dumps, ROWS), ""]))
    assert [row for _, row in read(tmp_path / "lines.json")] == ROWS
    assert [row for _, row in read(tmp_path / "wrapped.json")] == ROWS
    assert [row for _, row in read(tmp_path / "one.json")] == ROWS[:1]
    assert [where for where, _ in read(tmp_path / "gaps.jsonl")] == [f"{tmp_path}/gaps.jsonl:{n}" for n in range(2, 7)]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_tables_have_a_header_and_texts(name, tmp_path):
    path, texts = tmp_path / name, ["What, and\n\twhere?", 'A "lake"', "", "5" * 200_000]
    with path.open("w", encoding="utf-8-sig", newline="") as file:  # as Excel writes it
        table = csv.writer(file, delimiter="," if name == "a.csv" else "\t")
        table.writerows([["prompt", "chosen", "rejected", "label"], texts, ["a", "b"], ["a", "b", "c", "d", "e"], ["a", "b", "c", 0]])
    found = read(path)
    texts[2] = None  # there is no other way to leave out a value
    assert found[0] == (f"{path}:3", dict(zip(["prompt", "chosen", "rejected", "label"], texts, strict=True)))
    assert [where for where, _ in found[1:]] == [f"{path}:{line}" for line in (4, 5, 6)]
    assert all(str(row) == "the row has not as many values as the header has names" for _, row in found[1:3])
    assert found[3][1]["label"] == "0"


def test_folder_with_splits(tmp_path):
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:2])}).save_to_disk(
        str(tmp_path / "d")
    )
    assert len(read(tmp_path / "d")) == 5 and len(read(tmp_path / "d", split="test")) == 2
    before = sources.content_key(Source(str(tmp_path / "d")), 0)
    (tmp_path / "d" / "train" / "cache-0123.arrow").write_text("what somebody's filter has left there")
    assert sources.content_key(Source(str(tmp_path / "d")), 0) == before
    with pytest.raises(UserError, match=r"has no split validation; it has train, test"):
        read(tmp_path / "d", split="validation")


@pytest.mark.parametrize("key", ["subset", "revision"])
def test_what_only_the_hub_has_is_refused_of_a_file(key, tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(UserError, match=rf"{key}=main: {path} lies on this disk, .* leave {key} out"):
        read(path, **{key: "main"})


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "folder"])
def test_what_has_no_splits_is_not_read_whole_in_place_of_one(name, tmp_path):
    path = write(tmp_path / name, ROWS)
    with pytest.raises(UserError, match=rf"split=train_prefs: {path} has no splits.* Leave split out"):
        read(path, split="train_prefs")


def test_a_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path / "pairs.jsonl", ROWS)
    with pytest.raises(UserError, match=r"data file .*/pears.jsonl does not exist .*similar names there: pairs.jsonl$"):
        read(tmp_path / "pears.jsonl")
    for i in range(9):
        write(tmp_path / f"{i}.json", ROWS)
    with pytest.raises(UserError, match=r"; in .* there are: 0.json, .*, 7.json and 2 more$"):  # nothing there is like it
        read(tmp_path / "quux.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"does not exist \(looked from [^)]*\)$"):
        read(tmp_path / "empty" / "pears.jsonl")


def test_broken_lines_say_what_is_broken(tmp_path):
    lines = [json.dumps(ROWS), "[", '{"prompt": "a\tb"}', "5"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    one_line, open_list, control, number = [str(row) for _, row in read(tmp_path / "a.jsonl")]
    for text in (one_line, open_list):
        assert "a file that holds one list of rows is called .json: rename it" in text
    assert control == "not valid JSON (Invalid control character at column 14)"
    assert number == "a row must be a JSON object, this is a int"


def damaged_parquet() -> bytes:
    """A file whose end is whole, so that it opens, and whose pages are not."""
    import pyarrow
    import pyarrow.parquet

    whole = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [f"Q {i}?" for i in range(200)]}), whole)
    content = whole.getvalue()
    return content[:4] + b"\xff" * 400 + content[404:]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"x,y\n", "unknown format; use one of .json, .jsonl"),
        ("a.csv", b"prompt;chosen\na;b\n", r"a.csv:1: the columns are separated by semicolons"),
        ("a.csv", b'prompt,chosen\na,b\na,"b" is it\n', r"a.csv:3: .* expected after .*A quote inside a value is written twice"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "x"}\n' * 100, mtime=0)[:-20], "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b"x", mtime=0)[:10] + b"\xff" * 9, "cannot be read"),
        ("a.json", b'[{"prompt": "x"},\n oops]', r"a.json:2: not valid JSON"),
        ("a.json", b"3", "is not a list of JSON objects but a single int"),
        ("a.json", b"[" * 100_000, "not valid JSON"),
        ("a.json", b"1" * 5000, "not valid JSON"),
        ("a.parquet", b"nothing", "is not a Parquet file"),
        ("a.parquet", damaged_parquet(), "a.parquet cannot be read: .*complete"),
    ],
)
def test_unreadable_files(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(UserError, match="was not written by datasets' save_to_disk"):
        read(folder)


def test_a_folder_as_the_hub_keeps_it_is_read_shard_by_shard(tmp_path):
    """README and the notes of a download are no part of it, nor are other splits."""
    import datasets

    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for name, rows in {"train-00000-of-00002": (1, 2), "train-00001-of-00002": (3,), "test-00000-of-00001": (4,)}.items():
        datasets.Dataset.from_list([{"prompt": f"Say {n}", "response": "yes"} for n in rows]).to_parquet(folder / f"{name}.parquet")

    def said(split: str) -> list[str]:
        return [row["prompt"] for _, row in sources.rows(Source(str(tmp_path / "set"), split=split), 0)]

    assert said("train") == ["Say 1", "Say 2", "Say 3"] and said("test") == ["Say 4"]
    key = sources.content_key(Source(str(tmp_path / "set")), 0)
    (tmp_path / "set" / "README.md").write_text("changed")
    assert (
        sources.content_key(Source(str(tmp_path / "set")), 0) == key != sources.content_key(Source(str(tmp_path / "set"), split="test"), 0)
    )
    with pytest.raises(UserError, match="was not written by datasets' save_to_disk"):
        said("validation")
    shutil.copytree(folder, tmp_path / "set" / "other")
    with pytest.raises(UserError, match=r"holds several data sets: name one of .*data, .*other"):
        said("train")


def test_a_folder_of_other_things_is_no_data_set(tmp_path):
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="was not written by datasets' save_to_disk"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
@pytest.mark.parametrize("order", ["utf-16-le", "utf-16-be"])
def test_utf16_is_named_with_its_cure_and_never_skipped(name, order, data, tmp_path):
    dataset = data(ROWS, name=name, on_bad_row="skip")
    content = ("\ufeff" + "\n".join(map(json.dumps, ROWS))).encode(order)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(UserError, match=rf"{name} is in UTF-16, not UTF-8: .* iconv -f UTF-16 -t UTF-8 OLD > NEW$"):
        list(adapted(dataset, dataset.sources["mine"], Counts()))


def test_a_windows_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8-sig")
    (tmp_path / "b.json").write_text(json.dumps(ROWS), encoding="utf-8-sig")
    for name in ("a.jsonl", "b.json"):
        assert [row for _, row in read(tmp_path / name)] == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_byte_that_is_not_utf8_breaks_its_row_only(name, data, build, tmp_path):
    dataset = data(pairs(30), **only("sft"))
    lines = [json.dumps(row).encode() for row in pairs(30)]
    lines[5] = lines[5].replace(b"good", b"caf\xe9")
    (tmp_path / name).write_bytes(b"\n".join(lines) if name == "a.jsonl" else b"[" + b",".join(lines) + b"]")
    mine = replace(dataset.sources["mine"], path=str(tmp_path / name))
    dataset = replace(dataset, sources={"mine": mine})
    with pytest.raises(UserError, match=rf"{name}(:| row )6: a text holds the byte 0xe9, which is not UTF-8.*dataset.on_bad_row=skip"):
        build(dataset, "sft")
    assert build(replace(dataset, on_bad_row="skip"), "sft")[2]["dropped"] == {"broken row": 1}


@pytest.mark.parametrize("line", ['{"prompt": ' + "1" * 5000 + "}", '{"a":' * 100_000, '{"prompt": "\\ud800", "chosen": "b"}'])
def test_rows_that_no_tokenizer_could_read_are_broken_rows(line, data):
    dataset = data(ROWS)
    path = Path(dataset.sources["mine"].path)
    path.write_text(path.read_text() + "\n" + line)
    with pytest.raises(UserError, match=rf"{path.name}:\d+: .*on_bad_row=skip"):
        list(adapted(dataset, dataset.sources["mine"], Counts()))


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", ROWS)
    monkeypatch.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(UserError, match=r"a.jsonl cannot be read: Permission denied"):
        sources.content_key(Source(str(path)), 0)


# --- caches -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(cfg, tmp_path):
    """make(rows, **changes of the Dataset, weight) -> Dataset of one jsonl file."""

    def make(rows: list, name: str = "a.jsonl", weight: float = 1.0, **changes):
        path = write(tmp_path / name, rows)
        source = replace(Source(str(path)), weight=weight)
        return replace(cfg.dataset, name="mine", toy_rows=0, **({"sources": {"mine": source}, "holdout": 0.2} | changes))

    return make


@pytest.fixture
def build(cfg, tokenizer, tmp_path):
    """build(dataset, stage, prompt, response) -> (train rows, eval rows, counts)"""

    def build(dataset, stage: str, prompt: int = 60, response: int = 20):
        model = replace(cfg.model, max_prompt_tokens=prompt, max_response_tokens=response)
        train, held, counts = cache.load(cache.build(tmp_path, dataset, stage, tokenizer, model))
        return list(train), list(held), counts

    return build


def pairs(n: int, start: int = 0) -> list[dict]:
    return [{"prompt": f"Say {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(start, start + n)]


def test_every_answer_of_a_dialogue_can_be_trained_on(data, build, tokenizer):
    """Each ends with EOS and has the turns before it as its prompt. Training and held-out rows share no dialogue."""

    def dialogue(i: int) -> dict:
        said = [("system", "Be brief."), ("user", f"Say {i}"), ("assistant", f"one {i}"), ("user", "Again"), ("assistant", f"two {i}")]
        return {"messages": [{"role": role, "content": text} for role, text in said]}

    rows, every = [dialogue(i) for i in range(40)], {}
    for answers in (False, True):
        train, held, counts = build(data(rows, every_answer=answers), "sft")
        every[answers] = [[tokenizer.decode(row["input_ids"]) for row in part] for part in (train, held)]
        assert counts["train"] == len(train) and all(row["input_ids"][-1] == tokenizer.eos_token_id for row in train)
        assert counts["earlier"] == len(rows)  # which a note counts unless they are trained on
    last, (train, held) = every[False], every[True]
    assert (len(train), len(held)) == (2 * len(last[0]), 2 * len(last[1])) and held
    assert set(last[0]) < set(train) and set(last[1]) < set(held)
    first = sorted(set(train) - set(last[0]))[0]
    number = first.partition("Say ")[2].split()[0]
    assert first == f"Be brief.\n\nHuman: Say {number}\n\nAssistant: one {number}{tokenizer.eos_token}"
    whole, other = (data(pairs(30), every_answer=answers) for answers in (False, True))
    assert [build(whole, "reward"), build(whole, "ppo")] == [build(other, "reward"), build(other, "ppo")]


@pytest.mark.parametrize("stage", STAGES)
def test_the_mean_lengths_of_a_cache_are_those_of_its_rows(stage, data, cfg, tokenizer, tmp_path):
    folder = cache.build(tmp_path, data(pairs(60)), stage, tokenizer, cfg.model)
    rows = list(cache.load(folder)[0])
    count, prompt, length = cache.mean_lengths(folder)
    assert count == len(rows) > 0
    assert length == pytest.approx(sum(row["length"] for row in rows) / len(rows))
    assert prompt == length if stage == "ppo" else prompt == pytest.approx(sum(row["prompt_length"] for row in rows) / len(rows))


def test_cached_rows_are_the_tokens_of_the_dialogues(data, build, tokenizer):
    dataset, seen = data(pairs(60)), {}
    for stage in STAGES:
        train, held, counts = build(dataset, stage)
        assert (len(train), len(held)) == (counts["train"], counts["eval"]) and counts["dropped"] == {}
        for row in train + held:
            ids = row["chosen_ids"] if stage == "reward" else row["input_ids"]
            prompt = tokenizer.decode(ids if stage == "ppo" else ids[: row["prompt_length"]])
            number = int(prompt.removeprefix("\n\nHuman: Say ").removesuffix("\n\nAssistant:"))
            assert number not in seen
            seen[number] = stage
            assert row["source"] == "mine"
            if stage == "ppo":
                assert json.loads(row["turns"]) == asked(f"Say {number}") and row["length"] == len(ids)
                continue
            assert tokenizer.decode(ids[row["prompt_length"] :]) == f" good {number}</s>"
            if stage == "reward":
                assert tokenizer.decode(row["rejected_ids"]) == f"{prompt} bad {number}</s>"
                assert row["length"] == max(len(ids), len(row["rejected_ids"]))
            else:
                assert row["length"] == len(ids)
    assert set(seen) == set(range(60))  # every row has its place, in one stage


def test_a_prompt_has_one_stage_across_sources(data, tmp_path, cfg):
    """The same questions in two files, in other words of case and punctuation."""
    shouted = [row | {"prompt": row["prompt"].upper() + "!"} for row in pairs(60)]
    both = data(pairs(60)).sources | {"other": Source(str(write(tmp_path / "b.jsonl", shouted)))}
    dataset = replace(data(pairs(60)), sources=both)
    of: dict[str, set[str]] = {}
    for stage in STAGES:
        for name, example, _ in examples(dataset, stage, Counts()):
            of.setdefault(example.prompt[0]["content"].lower().rstrip("!"), set()).add(stage)
            assert name in both
    assert len(of) == 60 and all(len(stages) == 1 for stages in of.values())


def test_demonstrations_do_not_give_away_prompts_of_other_stages(data, tmp_path):
    """sft_only rows whose prompt reward model or PPO owns are taken out of SFT, and counted."""
    extra = [{"prompt": f"say {i}!", "response": f"fine {i}"} for i in range(40, 80)]
    dataset = data(pairs(60), sft_only=[str(write(tmp_path / "extra.jsonl", extra))])
    split = dataset.split
    owners = {i: phase_of(prompt_hash(asked(f"Say {i}")), split) for i in range(60)}
    counts = Counts()
    found = [example.prompt[0]["content"] for name, example, _ in examples(dataset, "sft", counts) if name == "sft_only_0"]
    expected = [i for i in range(40, 80) if owners.get(i, "sft") == "sft"]
    assert found == [f"say {i}!" for i in expected]
    taken = sum(owners[i] != "sft" for i in range(40, 60))
    assert 0 < taken < 20 and counts.dropped == Counter({"prompt belongs to another stage": taken})
    for stage in ("reward", "ppo"):  # and they stay in SFT
        assert {name for name, _, _ in examples(dataset, stage, Counts())} == {"mine"}


def test_prompts_of_their_own_go_to_ppo_alone(data, build, tmp_path):
    """Those that comparisons give to another stage are left out, and SFT sees none of them in a demonstration, whatever their hash."""
    prompts = str(write(tmp_path / "prompts.jsonl", [{"prompt": f"say {i}!"} for i in range(40, 80)]))
    shown = str(write(tmp_path / "shown.jsonl", [{"prompt": f"Say {i}", "response": f"fine {i}"} for i in range(60, 100)]))
    dataset = data(pairs(60), ppo_only=[prompts], sft_only=[shown])
    owners = {i: phase_of(prompt_hash(asked(f"Say {i}")), SPLIT) for i in range(60)}
    counts, alone = Counts(), []
    for name, one, _ in examples(dataset, "ppo", counts):
        alone += [int(one.prompt[0]["content"].strip("say !"))] if name == "ppo_only_0" else []
    assert alone == [i for i in range(40, 80) if owners.get(i, "ppo") == "ppo"]
    assert counts.dropped == {"prompt belongs to another stage": 40 - len(alone)} and len(alone) < 40
    demonstrated = [one.chosen for name, one, _ in examples(dataset, "sft", Counts()) if name == "sft_only_0"]
    assert demonstrated == [f"fine {i}" for i in range(80, 100)]
    assert {name for name, _, _ in examples(dataset, "reward", Counts())} == {"mine"}
    train, held, _ = build(dataset, "ppo")
    assert {row["source"] for row in train} == {"mine", "ppo_only_0"} and held


def test_a_data_set_of_prompts_trains_ppo_and_nothing_else(data, build, tmp_path):
    rows = [{"prompt": f"Say {i}"} for i in range(30)]
    with pytest.raises(UserError, match=r"a.jsonl:1: no response among the fields prompt; .* Only PPO can use .*: dataset=prompts"):
        build(data(rows, path=str(tmp_path / "a.jsonl")), "ppo")
    dataset = data(rows, split=PhaseSplit(0, 0, 1))
    dataset = replace(dataset, sources={"mine": replace(dataset.sources["mine"], adapter="prompts", only="ppo")})
    train, held, counts = build(dataset, "ppo")
    assert len(train) + len(held) == 30 and held and counts["owned"] == {"ppo": 30}
    with pytest.raises(UserError, match=r"stage sft has no rows to train on .*: dataset.split.sft=0"):
        build(dataset, "sft")


def test_rows_to_evaluate_on_are_the_held_out_ones_of_all_stages(data, build, tmp_path):
    """In place of a share of the others, and nothing with their prompts is trained on."""
    tests = str(write(tmp_path / "test.jsonl", pairs(30, start=45)))
    dataset = data(pairs(60), eval_only=[tests])
    for stage in STAGES:
        train, held, counts = build(dataset, stage)
        mine = [i for i in range(60) if phase_of(prompt_hash(asked(f"Say {i}")), SPLIT) == stage]
        assert len(held) == 30 and {row["source"] for row in held} == {"eval_only_0"}
        assert len(train) == sum(i < 45 for i in mine) > 0
        assert counts["dropped"] == ({"prompt is held out": left} if (left := sum(i >= 45 for i in mine)) else {})
    shown = str(write(tmp_path / "shown.jsonl", [{"prompt": "Say 1", "response": "it"}]))
    assert len(build(data(pairs(60), eval_only=[shown]), "sft")[1]) == 1
    with pytest.raises(UserError, match=r"stage sft has no rows to train on .*: the rows of dataset.eval_only have all of its prompts"):
        build(data(pairs(60), eval_only=[str(write(tmp_path / "same.jsonl", pairs(60)))]), "sft")
    everything = {"mine": replace(data(pairs(60)).sources["mine"], only="eval")}
    with pytest.raises(UserError, match=r"stage sft has no rows to train on .*: all its sources are to evaluate on \(only=eval\)"):
        build(replace(data(pairs(60)), sources=everything), "sft")
    with pytest.raises(UserError, match=r"stage sft has no rows .*: 30 of its rows have prompts that PPO has for itself"):
        demonstrations = data([{"prompt": f"Say {i}", "response": "it"} for i in range(30)])
        build(replace(demonstrations, ppo_only=[str(write(tmp_path / "same.jsonl", pairs(30)))]), "sft")
    with pytest.raises(UserError, match=r"stage reward has no rows to evaluate on .*: no row of dataset.eval_only has a `rejected`"):
        build(data(pairs(60), eval_only=[shown]), "reward")


def test_the_tokenizer_and_the_key_see_no_more_of_rows_to_evaluate_on_than_they_must(data, tokenizer, tmp_path):
    dataset = data(pairs(60), eval_only=[str(write(tmp_path / "test.jsonl", pairs(30, start=100)))], **only("sft"))
    texts = list(training_texts(dataset, tokenizer, limit=50))
    assert len(texts) == 50 and not any("Say 1" in text and "good 1" in text and len(text.split()[2]) > 2 for text in texts)
    assert sources.data_key(dataset, "sft") == sources.data_key(replace(dataset, holdout=0.5), "sft")
    assert sources.data_key(dataset, "sft") != sources.data_key(replace(dataset, eval_only=[]), "sft")


def test_demonstrations_beside_prompts_are_evaluated_on_demonstrations(data, build, tmp_path):
    dataset = data([{"prompt": f"Say {i}"} for i in range(30)], split=PhaseSplit(0, 0, 1))
    dataset = replace(dataset, sources={"mine": Source(dataset.sources["mine"].path, only="ppo")})
    shown, tests = ([{"prompt": f"Say {i}", "response": "it"} for i in numbers] for numbers in (range(100, 120), range(200, 210)))
    more = {"sft_only": [str(write(tmp_path / "shown.jsonl", shown))], "eval_only": [str(write(tmp_path / "test.jsonl", tests))]}
    train, held, _ = build(replace(dataset, **more), "sft")
    assert (len(train), len(held)) == (20, 10)


def test_prompts_alone_are_evaluated_on_prompts_alone(data, build, tmp_path):
    dataset = data([{"prompt": f"Say {i}"} for i in range(30)], split=PhaseSplit(0, 0, 1))
    dataset = replace(dataset, sources={"mine": Source(dataset.sources["mine"].path, adapter="prompts", only="ppo")})
    tests = str(write(tmp_path / "test.jsonl", [{"prompt": f"Say {i}"} for i in range(20, 40)]))
    train, held, _ = build(replace(dataset, eval_only=[tests]), "ppo")
    assert (len(train), len(held)) == (20, 20)


ONLY = {"mine": None, "shown": "sft", "alone": "ppo", "tests": "eval"}


@fuzz
@given(rows=st.lists(st.tuples(st.sampled_from([*ONLY]), st.integers(0, 30), st.sampled_from(["", "good", "good bad"])), max_size=60))
def test_no_mixture_shows_a_prompt_to_two_stages_or_trains_on_what_it_evaluates_on(rows, cfg, tmp_path_factory):
    """Sources of all kinds that share prompts, of rows with no answer (for `alone` only), one and two."""
    folder, made = tmp_path_factory.mktemp("mixture"), {}
    for name in {name for name, _, answers in rows if answers or name == "alone"}:
        kept = [(i, answers.split()) for other, i, answers in rows if other == name and (answers or name == "alone")]
        own = [{"prompt": f"Say {i}"} | dict(zip(("chosen", "rejected"), answers, strict=False)) for i, answers in kept]
        made[name] = Source(str(write(folder / f"{name}.jsonl", own)), "prompts" if name == "alone" else "fields", only=ONLY[name])
    if not made:
        return
    dataset = replace(cfg.dataset, toy_rows=0, sources=made)
    found = {stage: list(examples(dataset, stage, Counts())) for stage in STAGES}
    trained = {stage: {number for name, _, number in kept if name != "tests"} for stage, kept in found.items()}
    evaluated = {number for kept in found.values() for name, _, number in kept if name == "tests"}
    for one, other in itertools.combinations(STAGES, 2):
        assert not trained[one] & trained[other]
    assert not evaluated & set().union(*trained.values())
    assert all(example.chosen is not None for _, example, _ in found["sft"])
    assert all(example.rejected is not None for _, example, _ in found["reward"])


def test_weights_repeat_training_rows_and_leave_the_held_out_alone(data, build):
    train, held, _ = build(data(pairs(200)), "reward")
    for weight in (2.0, 0.5):
        more, same, counts = build(data(pairs(200), weight=weight), "reward")
        numbers = [prompt_hash(asked(p)) for p in (f"Say {i}" for i in range(200))]
        mine = [n for n in numbers if phase_of(n, SPLIT) == "reward" and not held_out(n, 0.2)]
        assert len(more) == counts["train"] == sum(copies_of(weight, n) for n in mine)
        assert len(same) == len(held)
    assert len(train) == len(mine)


def only(stage: str) -> dict:
    return {"split": PhaseSplit(*(float(s == stage) for s in STAGES))}


@pytest.mark.parametrize("stage", STAGES)
def test_rows_of_special_tokens_alone_are_dropped(stage, data, build):
    """They are taken out of every text, so that nothing would be left of it but the end."""
    useless = [{"prompt": "</s>"}, {"chosen": "<s> </s>"}, {"rejected": "</s>"}, {"chosen": "bad 1</s>"}]
    rows = [{"prompt": f"Ask {i}", "chosen": "good 1", "rejected": "bad 1"} | change for i, change in enumerate(useless)]
    train, held, counts = build(data(rows + pairs(20), **only(stage)), stage)
    assert len(train + held) == 20
    assert counts["dropped"] == {"empty prompt": 1, "empty response": 2, "identical pair": 1}
    with pytest.raises(UserError, match=f"stage {stage} has no rows to train on in dataset=mine: .* dropped: 2 empty response, 1 "):
        build(data(rows, "b.jsonl", **only(stage)), stage)


@pytest.mark.parametrize("stage", STAGES)
def test_special_tokens_and_the_marks_of_other_templates_are_counted(stage, data, build):
    """Once per row, wherever they stand."""
    wrapped = {"prompt": "[INST] Say 21 [/INST]", "chosen": "good", "rejected": "bad"}
    closed = [{"prompt": f"Say {i}</s>", "chosen": "good <s> 1", "rejected": "bad 1"} for i in (22, 23)]
    _, _, counts = build(data([*pairs(20), wrapped, *closed], **only(stage)), stage)
    assert counts["foreign"] == {"[INST]": 1} and counts["special"] == {"</s>": 2}


@pytest.mark.parametrize("stage", STAGES)
def test_long_prompts_lose_their_beginning(stage, data, build, tokenizer):
    long = [{"prompt": f"{'before ' * 20} Say {i}", "chosen": "good", "rejected": "bad"} for i in range(20)]
    train, held, counts = build(data(long + pairs(20), **only(stage)), stage, prompt=30)
    assert counts["truncated"] == 20
    for row in train + held:
        ids = row["chosen_ids"] if stage == "reward" else row["input_ids"]
        size = row["length"] if stage == "ppo" else row["prompt_length"]
        assert size <= 30 and tokenizer.decode(ids[:size]).endswith("\n\nAssistant:")
        if stage != "ppo":  # the response is whole, with EOS
            assert tokenizer.decode(ids[size:]).endswith("</s>") and "good" in tokenizer.decode(ids[size:])


def test_truncation_keeps_bos(cfg, data, tmp_path):
    made = load_tokenizer(starting_with_bos(tmp_path / "bos"), chat_template=cfg.model.chat_template)
    model = replace(cfg.model, max_prompt_tokens=12, max_response_tokens=20)
    folder = cache.build(
        tmp_path,
        data([{"prompt": f"Please describe river {i}", "chosen": "calm", "rejected": "wild"} for i in range(30)], **only("ppo")),
        "ppo",
        made,
        model,
    )
    rows = [row["input_ids"] for part in cache.load(folder)[:2] for row in part]
    end = encode_prompts(made, [asked("x")])[0][-8:]
    for ids in rows:
        assert len(ids) == 12 and ids[0] == made.bos_token_id and made.bos_token_id not in ids[1:]
        assert ids[-3:] == end[-3:]


def test_long_responses_are_dropped_whole_and_counted(data, build, tokenizer):
    rows = pairs(30)
    rows[3]["chosen"] = rows[4]["rejected"] = "x y z " * 20
    train, held, counts = build(data(rows, **only("reward")), "reward")
    assert counts["dropped"] == {"response longer than 20 tokens": 2} and len(train) + len(held) == 28
    assert sum(counts["needed"].values()) == 2 and all(int(length) > 20 and int(length) % 32 == 0 for length in counts["needed"])
    train, held, counts = build(data(rows, **only("sft")), "sft")
    assert counts["dropped"] == {"response longer than 20 tokens": 1} and len(train) + len(held) == 29
    # The limit counts EOS: exactly as long as allowed is kept
    exact = len(encode_responses(tokenizer, ["good 1"])[0])
    assert len(build(data([{"prompt": f"Say {i}", "chosen": "good 1"} for i in range(30)], **only("sft")), "sft", response=exact)[0]) > 0
    with pytest.raises(UserError, match=rf"dropped: 30 response longer than {exact - 1} tokens"):
        build(data([{"prompt": f"Say {i}", "chosen": "good 1"} for i in range(30)], **only("sft")), "sft", response=exact - 1)


def test_dialogues_that_the_chat_template_refuses_are_dropped_and_counted(data, build, tokenizer, monkeypatch):
    """Those of LLaMA 2, Mistral and Gemma take no system turn, or want roles to alternate."""
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", refusal + tokenizer.chat_template)
    told = [{"role": "system", "content": "Be kind."}]
    rows = pairs(30) + [{"prompt": told + asked(f"Tell {i}"), "chosen": "good", "rejected": "bad"} for i in range(4)]
    train, held, counts = build(data(rows, **only("sft")), "sft")
    assert counts["dropped"] == {"refused by the chat template: no system turn": 4} and len(train) + len(held) == 30
    with pytest.raises(UserError, match=r"0 held out, dropped: 4 refused by the chat template: no system turn"):
        build(data(rows[30:], **only("sft")), "sft")


def test_the_same_prompt_is_answered_once_in_ppo(data, build):
    rows = pairs(30) + pairs(10)
    train, held, counts = build(data(rows, **only("ppo")), "ppo")
    assert counts["dropped"] == {"duplicate prompt": 10} and len(train) + len(held) == 30


def test_exact_copies_of_training_rows_are_counted_and_kept(data, build):
    other = {"prompt": "Say 0", "chosen": "good 0", "rejected": "another"}
    train, _, counts = build(data(pairs(30) + pairs(10) + [other], **only("reward"), holdout=0.05, weight=2.0), "reward")
    assert len(train) == counts["train"] and counts["repeated"] == 10 - sum(
        held_out(prompt_hash(asked(f"Say {i}")), 0.05) for i in range(10)
    )


def test_rows_without_a_rejected_response_all_serve_sft(data, build):
    """Only a prompt that reward model or PPO see in a comparison is kept from them."""
    alone = [{"prompt": f"Say {i}", "response": f"fine {i}"} for i in range(60)]
    train, held, counts = build(data(alone), "sft")
    assert len(train) + len(held) == 60 and len(held) == sum(held_out(prompt_hash(asked(f"Say {i}")), 0.2) for i in range(60))
    assert counts["dropped"] == {} and counts["owned"] == {"sft": 60}

    mixed = data(pairs(40) + alone)
    owner = [phase_of(prompt_hash(asked(f"Say {i}")), SPLIT) for i in range(60)]
    train, held, counts = build(mixed, "sft")
    both = owner[:40].count("sft")
    assert len(train) + len(held) == both + both + 20
    assert counts["dropped"] == {"prompt belongs to another stage": 40 - both}
    for stage in ("reward", "ppo"):
        train, held, counts = build(mixed, stage)
        assert len(train) + len(held) == owner[:40].count(stage) and counts["dropped"] == {}


def test_demonstrations_cannot_train_the_other_stages(data, build):
    alone = data([{"prompt": f"Say {i}", "response": "good"} for i in range(30)])
    for stage in ("reward", "dpo", "ppo"):
        with pytest.raises(
            UserError,
            match=rf"stage {stage} has no rows .*none of its rows has a `rejected`.*Type stage=sft, or .*dataset.sft_only='\[FILE\]'$",
        ):
            build(alone, stage)


def test_a_single_prompt_is_named_as_the_cause(data, build):
    same = [{"prompt": "Say it", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(30)]
    with pytest.raises(UserError, match=r"30 train, 0 held out.*together have 1 different prompt, and each prompt is used by one stage"):
        build(data(same, **only("sft"), holdout=1e-9), "sft")


def test_dpo_reads_the_reward_models_pairs(data, cfg, tokenizer, tmp_path):
    folders = {cache.build(tmp_path, data(pairs(60)), stage, tokenizer, cfg.model) for stage in ("reward", "dpo")}
    assert len(folders) == 1
    with pytest.raises(UserError, match=r"stage dpo has no rows to train on in dataset=mine: dataset.split.reward=0$"):
        cache.build(tmp_path, data(pairs(30), split=PhaseSplit(1, 0, 1)), "dpo", tokenizer, cfg.model)


@pytest.mark.parametrize(
    "row, why",
    [
        ({"prompt": "Say", "chosen": "it", "rejected": "it"}, "30 identical pair"),
        ({"messages": [{"role": "user", "content": "Say"}]}, "30 dialogue ends with a user turn"),
    ],
)
def test_rows_that_all_were_dropped_are_not_said_to_want_another_split(row, why, data, build):
    with pytest.raises(UserError, match=rf"no rows to train on in dataset=mine: all were dropped: {why}\. A row needs"):
        build(data([row] * 30, **only("sft")), "sft")


def test_a_source_without_rows_is_named_beside_others(data, build, tmp_path):
    (tmp_path / "none.jsonl").write_text("\n \n")
    with pytest.raises(UserError, match=r"none.jsonl holds no rows$"):
        build(replace(data(pairs(30)), sft_only=[str(tmp_path / "none.jsonl")]), "sft")


def test_an_empty_share_says_so(data, build):
    with pytest.raises(UserError, match=r"stage ppo has no rows to train on in dataset=mine: dataset.split.ppo=0$"):
        build(data(pairs(30), split=PhaseSplit(1, 1, 0)), "ppo")
    with pytest.raises(
        UserError,
        match=r"stage sft has no rows to evaluate on in dataset=mine: 1 train, 0 held out.*change dataset.split or dataset.holdout",
    ):
        build(data(pairs(1), **only("sft"), holdout=1e-9), "sft")


@pytest.mark.parametrize("split", [PhaseSplit(1, 1, 1), PhaseSplit(1, 0, 0)])
def test_few_rows_come_with_a_holdout_that_works_for_every_stage(split, data, build):
    dataset = data(pairs(24), holdout=0.01, split=split)
    with pytest.raises(UserError, match=r"no rows to evaluate on .*Give more prompts, or type dataset.holdout=0.\d+$") as refused:
        build(dataset, "sft")
    holdout = float(str(refused.value).rpartition("=")[2])
    for stage in ("sft", "reward", "ppo") if split.ppo else ("sft",):
        build(replace(dataset, holdout=holdout), stage)


BROKEN = [json.dumps(row) for row in pairs(30)]
BROKEN[6] = '{"prompt": "Say", '
BROKEN[9] = "[1, 2]"
BROKEN[12] = json.dumps({"prompt": "Say 12"})
BROKEN[20] = json.dumps({"prompt": "Say 20", "chosen": 5})


@pytest.mark.parametrize(
    "line, message",
    [
        (7, r"not valid JSON \(.*\)"),
        (10, "a row must be a JSON object, this is a list"),
        (13, "no response among the fields prompt; tried chosen, response,"),
        (21, "field chosen is of type int, not a string"),
    ],
)
def test_a_broken_row_stops_with_its_line(line, message, data, build, tmp_path):
    dataset = data(pairs(30), **only("sft"))
    lines = [json.dumps(row) for row in pairs(30)]
    lines[line - 1] = BROKEN[line - 1]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"a.jsonl:{line}: {message}.*Fix the row, or type dataset.on_bad_row=skip"):
        build(dataset, "sft")


def test_broken_rows_are_skipped_and_counted_on_demand(data, build, tmp_path):
    dataset = data(pairs(30), **only("sft"), on_bad_row="skip")
    (tmp_path / "a.jsonl").write_text("\n".join(BROKEN))
    train, held, counts = build(dataset, "sft")
    assert counts["dropped"] == {"broken row": 4} and len(train) + len(held) == 26


def test_max_rows(data, build):
    train, held, _ = build(data(pairs(60), **only("sft"), max_rows=20), "sft")
    assert len(train) + len(held) == 20


def test_a_cache_is_reused_until_something_changes(data, cfg, tokenizer, tmp_path, monkeypatch):
    dataset = data(pairs(60))

    def folder(dataset=dataset, stage="sft", **changes):
        return cache.build(tmp_path, dataset, stage, tokenizer, replace(cfg.model, **changes))

    first = folder()
    before = (first / "train.arrow").stat().st_mtime_ns
    with monkeypatch.context() as patched:
        patched.setattr(cache, "examples", lambda *_: pytest.fail("read again"))
        assert folder() == first and (first / "train.arrow").stat().st_mtime_ns == before
        # Where the file lies, and which model trains on it, is not content
        moved = write(tmp_path / "elsewhere.jsonl", pairs(60))
        assert folder(replace(dataset, sources={"mine": replace(dataset.sources["mine"], path=str(moved))}), name="other") == first
    others = {
        folder(stage="reward"),
        folder(max_prompt_tokens=50),
        folder(replace(dataset, holdout=0.3)),
        folder(replace(dataset, split=PhaseSplit(1, 1, 1))),
        folder(data(pairs(60)[:-1] + pairs(1, start=99))),  # one row of the file has changed
    }
    assert len(others) == 5 and first not in others
    assert not list((tmp_path / "data").glob("*.tmp"))


def test_an_interrupted_cache_is_built_anew(data, build, tmp_path, monkeypatch):
    dataset = data(pairs(60))
    with monkeypatch.context() as patched:
        patched.setattr(cache, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(dataset, "sft")
    train, held, _ = build(dataset, "sft")
    assert len(train) + len(held) > 5


def test_pretraining_text_is_packed_into_full_blocks(data, cfg, tokenizer, tmp_path):
    texts = [f"The river number {i} is calm." for i in range(20)]
    path = write(tmp_path / "text.jsonl", [{"text": t} for t in texts])
    model = replace(cfg.model, max_prompt_tokens=20, max_response_tokens=12)
    dataset = replace(data(pairs(5)), pretrain=[str(path)])
    rows, held, counts = cache.load(cache.build_pretrain(tmp_path, dataset, tokenizer, model))
    stream = [token for text in texts for token in [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]]
    path = write(tmp_path / "text.jsonl", [{"text": t.replace("is", "i<</s>/s>s")} for t in texts])  # no text ends in its middle
    assert len(rows) == counts["train"] == len(stream) // 32 and len(held) == 0
    assert [token for row in rows for token in row["input_ids"]] == stream[: 32 * len(rows)]
    assert {(row["length"], row["prompt_length"]) for row in rows} == {(32, 0)}
    # All but the first token of a block is learned
    assert sft_batch([rows[0]], 0, 0.0)["targets"].tolist() == stream[1:32]
    with pytest.raises(UserError, match="fewer than the 812 tokens of one block"):
        cache.build_pretrain(tmp_path, dataset, tokenizer, replace(model, max_prompt_tokens=800))
    write(path, [{"text": "fine"}, {"content": "no"}])
    with pytest.raises(UserError, match=r"text.jsonl:2: a pretraining row needs a field 'text'"):
        cache.build_pretrain(tmp_path, dataset, tokenizer, model)
    path.write_bytes(b'{"text": "caf\xe9"}')
    with pytest.raises(UserError, match=r"text.jsonl:1: a text holds the byte 0xe9"):
        cache.build_pretrain(tmp_path, dataset, tokenizer, model)


# --- the toy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "response, score",
    [
        ("The river is calm, bright and fresh.", 1.0),
        ("Fresh and calm it is, and BRIGHT.", 1.0),
        ("", 0.0),
        ("The river is calm.", 1 / 3),
        ("The river is calm, bright and fresh", 2 / 3),  # no full stop
        ("The river is calm, bright, fresh and warm.", 2 / 3),  # one too many
        ("The river is calm, calm and calm.", -1 / 3),  # 1 - 2 repetitions
        ("The river is calm, dull and bright", 0.0),  # 2 - 1 unkind - 1 for the end
        ("The river is ugly.", -1 / 3),
        ("The river is there.", 0.0),
    ],
)
def test_toy_judge(response, score):
    assert toy.judge(response) == pytest.approx(score)


def test_toy_rows_are_always_the_same_and_the_judge_agrees_with_them():
    rows = [toy.row(i) for i in range(300)]
    random.seed(5)  # whatever the global state is
    assert rows == [toy.row(i) for i in range(300)]
    assert len({json.dumps(row) for row in rows}) == 300
    for row in rows:
        assert toy.judge(row["chosen"]) - toy.judge(row["rejected"]) > 0.6
        assert [t["role"] for t in row["prompt"]] in (["user"], ["user", "assistant", "user"])
    assert 0.2 < np.mean([len(row["prompt"]) == 3 for row in rows]) < 0.45
    assert toy.judge(rows[0]["chosen"]) <= 1


# --- real data --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (REAL / "hh_helpful_pairs.jsonl.gz").exists(), reason="no ../shared/data")
def test_real_data_is_read_and_split_without_overlap(cfg):
    """6183 pairs of people, and demonstrations of two other sources on top: all rows are accounted for, no prompt in two stages."""
    files = {name: str(REAL / name) for name in ("hh_helpful_pairs.jsonl.gz", "alpaca_sft.jsonl.gz", "dolly_sft.jsonl.gz")}
    hh, *demonstrations = files.values()
    dataset = replace(cfg.dataset, toy_rows=0, sources={"hh": Source(hh)}, sft_only=demonstrations)
    found, counts = {}, {stage: Counts() for stage in STAGES}
    for stage in STAGES:
        found[stage] = list(examples(dataset, stage, counts[stage]))
        for _, example, _ in found[stage]:
            assert example.prompt[-1]["role"] == "user" and example.chosen
    numbers = {stage: {n for _, _, n in found[stage]} for stage in STAGES}
    assert not (numbers["sft"] & numbers["reward"] or numbers["sft"] & numbers["ppo"] or numbers["reward"] & numbers["ppo"])
    by_source = Counter(name for stage in STAGES for name, _, _ in found[stage])
    sizes = {name: gzip.decompress(Path(path).read_bytes()).count(b"\n") for name, path in files.items()}
    assert by_source["hh"] == sizes["hh_helpful_pairs.jsonl.gz"] == 6183
    assert len(found["reward"]) == pytest.approx(0.4 * 6183, rel=0.08)
    dropped = sum(counts["sft"].dropped.values())
    assert by_source["sft_only_0"] + by_source["sft_only_1"] + dropped == sum(sizes.values()) - 6183


def test_special_tokens_in_the_text_of_a_dialogue_are_not_special(tokenizer):
    eos = tokenizer.eos_token
    (response,) = encode_responses(tokenizer, [f"calm {eos} bright"])
    assert response.count(tokenizer.eos_token_id) == 1 and response[-1] == tokenizer.eos_token_id
    (prompt,) = encode_prompts(tokenizer, [[{"role": "user", "content": f"calm {eos}{tokenizer.pad_token}"}]])
    assert tokenizer.eos_token_id not in prompt and tokenizer.pad_token_id not in prompt


PIECES = [
    "<",
    "</",
    "/s>",
    "s>",
    "</s>",
    "<s>",
    "<pad>",
    "<eos>",
    "<|pad|>",
    "<|",
    "|>",
    "<|extra|>",
    "pad",
    "eos",
    ">",
    " ",
    "calm",
    "\n",
    ":",
    "ß",
]


@pytest.mark.parametrize("kind", KINDS, ids=[kind.__name__ for kind in KINDS])
def test_no_text_yields_a_special_token(kind, cfg, tmp_path):
    """Not one inside another either, and none of those that the tokenizer has without a name."""
    loaded = load_tokenizer(kind(tmp_path), chat_template=cfg.model.chat_template)
    loaded.add_tokens(AddedToken("<|extra|>", special=True))
    special = {i for i, token in loaded.added_tokens_decoder.items() if token.special} - {loaded.unk_token_id}
    texts = st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text(max_size=20)

    @fuzz
    @including("a <</s>/s> b")
    @including("<<|<s>ext<|pad|>ra|>/s>")
    @given(texts)
    def check(text):
        (response,), (prompt,) = encode_responses(loaded, [text]), encode_prompts(loaded, [asked(text)])
        assert not special & set(response[:-1]) and not special & set(prompt[1:])
        assert plain(loaded, plain(loaded, text)) == plain(loaded, text)

    check()


def test_damaged_tokenised_data_is_named_with_its_folder(tmp_path):
    from runner.data.cache import load

    for text in ("", "bad"):
        (tmp_path / "train.arrow").write_text(text)
        with pytest.raises(UserError, match=f"the tokenised data in {tmp_path} is damaged .*: delete this folder and it will be rebuilt"):
            load(tmp_path)
