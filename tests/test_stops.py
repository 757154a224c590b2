"""Stop strings: the bytes of tokens, the automaton that reads them, and both engines that end responses by it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import EOS, NAMES, PAD, VOCAB, actor, record, rows
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationMixin, PreTrainedTokenizerFast

from runner.data.batches import pad
from runner.models.token_bytes import token_bytes
from runner.rollout import graph, hf
from runner.rollout.families import network_of
from runner.rollout.sampling import uniforms
from runner.rollout.stops import Stops, automaton, table
from runner.stages.invariants import eos_and_pad


def stops_of(strings: list[bytes], tokens: list[bytes]) -> Stops:
    return Stops([], torch.from_numpy(table(automaton(strings), tokens)))


def end_of(stops: Stops, ids) -> int | None:
    """Number of tokens up to the one that completes a stop string."""
    state = torch.zeros(1, dtype=torch.long)
    for count, token in enumerate(ids, 1):
        state = stops.next(state, torch.tensor([token]))
        if stops.reached(state):
            return count
    return None


# --- the automaton ----------------------------------------------------------------------------------------------------


def test_the_automaton_by_hand():
    """For "ab" and "bc": states 0, a, b, and one of both wholes."""
    step = automaton([b"ab", b"bc"])
    assert step.shape == (4, 256)
    after = {name: step[:, ord(name)].tolist() for name in "abcx"}
    assert after == {"a": [1, 1, 1, 3], "b": [2, 3, 2, 3], "c": [0, 0, 3, 3], "x": [0, 0, 0, 3]}
    assert table(step, [b"", b"xa", b"cabx", b"c"]).tolist() == [[0, 1, 2, 3], [1, 1, 1, 3], [3, 3, 3, 3], [0, 0, 3, 3]]


letters = st.text("abcä", min_size=1, max_size=4).map(str.encode)


@given(st.lists(letters, min_size=1, max_size=3), st.lists(st.binary(max_size=3) | letters, max_size=12))
def test_a_response_ends_with_the_token_that_completes_a_stop_string(strings, tokens):
    """Whatever the tokens' borders, in text or inside a character."""
    found = end_of(stops_of(strings, [*tokens, b""]), range(len(tokens)))
    read = (b"".join(tokens[:n]) for n in range(1, len(tokens) + 1))
    expected = next((n for n, text in enumerate(read, 1) if any(string in text for string in strings)), None)
    assert found == expected


def test_responses_are_cut_behind_their_first_stop_string(tokenizer):
    """Before EOS or at the limit; the earliest counts; a response without one keeps its own end."""
    texts = ["one two\n\nthree", "one STOP two\n\nthree", "one two three", "one two\n\n"]
    answers = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    answers[2].append(EOS)
    rollout = record([[5, 6]] * 4, answers)
    Stops.of(tokenizer, ["\n\n", "STOP"], len(tokenizer)).cut(rollout, PAD)
    kept = [tokenizer.decode(ids[:n]) for ids, n in zip(rollout.responses.tolist(), rollout.lengths.tolist(), strict=True)]
    assert kept[:2] == ["one two\n\n", "one STOP"] and kept[3] == "one two\n\n"
    assert rollout.stopped.tolist() == [True, True, False, True] and rollout.ended.tolist() == [False, False, True, False]
    assert rollout.finished.all()
    assert rollout.lengths[2] == len(answers[2])
    assert (rollout.responses[rollout.mask == 0] == PAD).all()
    rollout.sampled_logprobs = rollout.sampled_logprobs * rollout.mask
    assert eos_and_pad(rollout, PAD, EOS, max(map(len, answers))) is None


# --- the bytes of tokens ----------------------------------------------------------------------------------------------

TEXTS = ["one two\n\nthree", " Human:", "用户请继续 🙂", "naïve\t<tag>", "  two spaces  "]


def sentencepiece() -> PreTrainedTokenizerFast:
    """Decodes as LLaMA 1 and 2 do: a sign for the space, and bytes for what has no token."""
    special, words = ["<unk>", "<s>", "</s>"], ["▁", "▁t", "▁▁", "a", *"oentwhrspcudmi:<>"]
    vocabulary = {name: n for n, name in enumerate([*special, *(f"<0x{byte:02X}>" for byte in range(256)), *words])}
    merges = [("▁", "t"), ("▁", "▁")]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_bytes_of_byte_level_tokens(tokenizer):
    """OPT, BLOOM, GPT-NeoX, LLaMA 3: any text, characters cut anywhere. Special tokens and rows without a token have none."""
    spelt = token_bytes(tokenizer, range(len(tokenizer) + 2))
    for text in TEXTS:
        assert b"".join(spelt[token] for token in tokenizer.encode(text, add_special_tokens=False)) == text.encode()
    assert spelt[PAD] == spelt[EOS] == spelt[-1] == b"" and all(spelt[3:-2])


def test_bytes_of_tokens_that_were_added_as_text(tokenizer_folder):
    """GPT-NeoX has runs of spaces; no byte-level token holds a space."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens([AddedToken("    ", normalized=False)])
    spelt = token_bytes(tokenizer, range(len(tokenizer)))
    ids = tokenizer.encode("a    b", add_special_tokens=False)
    assert len(tokenizer) - 1 in ids and b"".join(spelt[token] for token in ids) == b"a    b"


def test_bytes_of_sentencepiece_tokens():
    tokenizer = sentencepiece()
    spelt = token_bytes(tokenizer, range(len(tokenizer)))
    for text in TEXTS:
        assert b"".join(spelt[token] for token in tokenizer.encode(text, add_special_tokens=False)) == text.encode()
    assert spelt[:3] == [b""] * 3 and spelt[3 + 10] == b"\n"
    # Decoding leaves a space out at the very beginning, where a response continues a prompt
    assert tokenizer.decode(tokenizer.encode(" t", add_special_tokens=False)) == "t"


def test_bytes_of_words():
    """A decoder that knows words: what a token adds to a text that has begun."""
    vocabulary = {name: n for n, name in enumerate(["<unk>", "a", "dog", "##gy", "."])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert token_bytes(tokenizer, range(5)) == [b"", b" a", b" dog", b"gy", b" ."]
    assert end_of(Stops.of(tokenizer, ["doggy"], 5), [1, 2, 3, 4]) == 3


def test_bytes_of_characters_and_of_words_with_a_sign_at_their_end():
    """Characters of byte-level BPE may just be characters."""
    letters = Tokenizer(models.WordLevel({name: n for n, name in enumerate("aéĠ")}, unk_token="a"))
    letters.decoder = decoders.Fuse()
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=letters), range(3)) == [b"a", "é".encode(), "Ġ".encode()]
    words = Tokenizer(models.BPE({name: n for n, name in enumerate(["Hum", "an</w>", ":</w>"])}, []))
    words.decoder = decoders.BPEDecoder("</w>")
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=words), range(3)) == [b"Hum", b"an ", b": "]


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_what_follows_a_stop_string_does_not_hide_it(kind, tokenizer):
    """LLaMA's tokenizer makes line breaks before an incomplete character unreadable: texts would tell too late."""
    tokenizer = tokenizer if kind == "bytes" else sentencepiece()
    stops = Stops.of(tokenizer, ["\n\n", "用户"], len(tokenizer))

    def spelt(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    byte = spelt("好")[0]  # alone it is no text
    for begin in ([], spelt("a"), [*spelt("a"), byte, *spelt("a")]):
        for stop in ("\n\n", "用户"):
            for text in ("🙂😀", "你好", "a"):
                answer, end = [*begin, *spelt(stop), *spelt(text)], len(begin) + len(spelt(stop))
                assert {end_of(stops, answer[:n]) for n in range(end, len(answer) + 1)} == {end}
                assert {end_of(stops, answer[:n]) for n in range(end)} == {None}
    assert end_of(stops, [*spelt("\n"), byte, *spelt("\n\n")]) == len([*spelt("\n"), byte, *spelt("\n\n")])


# --- the engines ------------------------------------------------------------------------------------------------------

# "a" is token 7, "b" 8 and 9; the stop strings are "aa" and "b"
TOKENS = [b"a" if n == 7 else b"b" if n in (8, 9) else b"" if n in (PAD, EOS) else b"x" for n in range(VOCAB)]
STOPS = stops_of([b"aa", b"b"], TOKENS)
PROMPTS = rows([5, 1, 9, 3, 7, 12, 2] * 3, seed=1)


def ends(ids: list[int]) -> int | None:
    text = [TOKENS[token] for token in ids]
    return next((n for n in range(1, len(ids) + 1) if b"b" in text[:n] or b"aa" in b"".join(text[:n])), None)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("slots", [1, 3, 21])
def test_the_decode_engine_samples_nothing_behind_a_stop_string(slots, late, monkeypatch):
    """The token that completes it is the last; other responses do not change. Also where the host looks late, as on a GPU."""
    model = actor("opt").eval()

    def decoded(stops: Stops | None) -> graph.Decoder:
        uniform = uniforms(7, list(range(len(PROMPTS))), 40)
        return graph.Decoder(network_of(model.hf), model.sampling, PROMPTS, uniform, slots=slots, pad=PAD, eos=EOS, stops=stops)

    expected = decoded(None).run()
    monkeypatch.setitem(graph.LAG, "cpu", int(late))
    monkeypatch.setitem(graph.STRIDE, "cpu", 6 if late else 1)
    work = decoded(STOPS)
    found = work.run()
    assert expected.stopped is None
    for n, whole in enumerate(ids[:length] for ids, length in zip(expected.responses.tolist(), expected.lengths.tolist(), strict=True)):
        end = ends(whole)
        length = int(found.lengths[n])
        assert length == (end or len(whole)) and bool(found.stopped[n]) == (end is not None)
        assert bool(found.ended[n]) == (end is None and bool(expected.ended[n]))
        assert found.responses[n].tolist() == whole[:length] + [PAD] * (found.responses.size(1) - length)
        torch.testing.assert_close(found.sampled_logprobs[n, :length], expected.sampled_logprobs[n, :length], rtol=1e-4, atol=1e-5)
    assert 3 < int(found.stopped.sum()) < len(PROMPTS)
    assert work.stats.rows == int(found.lengths.sum())


@pytest.mark.parametrize("steps_more", [0, 6])
@pytest.mark.parametrize("name", NAMES)
def test_transformers_generate_ends_at_the_same_tokens(name, steps_more, monkeypatch):
    """Also where, under ZeRO-3, other ranks have some steps to go."""
    others = iter([True] * steps_more)
    has_unfinished = lambda self, done, synced, device: not done or (synced and next(others, False))  # noqa: E731
    monkeypatch.setattr(GenerationMixin, "_has_unfinished_sequences", has_unfinished)
    model, uniform = actor(name).eval(), uniforms(7, list(range(len(PROMPTS))), 40)
    ids, mask = pad(PROMPTS, PAD, left=True)
    found = hf.generate(model, ids, mask.sum(1), uniform, pad=PAD, eos=EOS, stops=STOPS, together=steps_more > 0)
    options = {"slots": 4, "pad": PAD, "eos": EOS, "stops": STOPS}
    expected = graph.Decoder(network_of(model.hf), model.sampling, PROMPTS, uniform, **options).run()
    width = expected.responses.size(1)
    assert found.responses.size(1) <= width + 1 + steps_more  # EOS in place of the next token, which is thrown away
    assert next(others, None) is None
    for field in ("responses", "lengths", "ended", "stopped"):
        value = getattr(found, field)
        assert torch.equal(value[:, :width] if field == "responses" else value, getattr(expected, field)), field
    assert (found.responses[:, width:] == PAD).all()
    torch.testing.assert_close(found.sampled_logprobs[:, :width], expected.sampled_logprobs, rtol=1e-4, atol=1e-5)
    assert found.stopped.any()
