"""Tokenizers: loading them so that PAD is never EOS, training one for the random models, and turning dialogues into tokens.

A dialogue is a list of turns {"role": ..., "content": ...}. One chat template (model.chat_template, or the checkpoint's own) decides how it
becomes text: training, rollouts, `runner.chat` and the exported checkpoint all use it. No torch in here.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from runner.checks.trust import check_vocabulary, refuse_code
from runner.errors import UserError
from runner.families import FAMILIES

Turn = dict[str, str]

NEW_PAD_TOKEN = "<|pad|>"
# Tokens that end a text in many vocabularies
ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>")


class NoEos(UserError):
    """A tokenizer that declares no EOS; says which key of the configuration to type."""


def load_tokenizer(
    path: str,
    *,
    revision: str | None = None,
    end_token: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer and give it a PAD of its own, the token that ends a response, and the chat template.

    Args: path: hub id or folder. end_token: replaces EOS, added where it is missing. chat_template: None keeps the saved one.
    """
    tokenizer = read_tokenizer(path, revision=revision, trust_remote_code=trust_remote_code)
    if end_token:
        tokenizer.add_special_tokens({"eos_token": end_token})
    if tokenizer.eos_token is None:
        raise NoEos(_no_end(tokenizer, path))
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        vocabulary = tokenizer.get_vocab()
        spare = [token for family in FAMILIES.values() for token in family.pads] + _never_read(tokenizer)
        pad = next((token for token in spare if token in vocabulary and token != tokenizer.eos_token), NEW_PAD_TOKEN)
        tokenizer.add_special_tokens({"pad_token": pad})
    _check_own_ids(tokenizer, path)
    if chat_template is not None:
        set_template(tokenizer, chat_template)
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    return tokenizer


def read_tokenizer(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer as its files describe it."""
    if not trust_remote_code:
        refuse_code(path, revision)
        check_vocabulary(Path(path))
    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    if not tokenizer("a", add_special_tokens=False).input_ids:
        raise UserError(f"{path} has no usable tokenizer: tokenizer.json, or what its family has instead, is missing or empty")
    return tokenizer


def _never_read(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """<unk>, where unknown characters become bytes (LLaMA 1 and 2): as PAD it needs no row that the base's embeddings lack."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    return [tokenizer.unk_token] if getattr(model, "byte_fallback", False) and tokenizer.unk_token else []


def _check_own_ids(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Refuse an EOS or PAD that shares its number with another token: a new one gets the size of the vocabulary, which may have holes."""
    vocabulary = tokenizer.get_vocab()
    for token in (tokenizer.eos_token, tokenizer.pad_token):
        twins = [other for other, number in vocabulary.items() if number == vocabulary[token] and other != token]
        if twins:
            raise UserError(
                f"{path}: {token} would share its number {vocabulary[token]} with {twins[0]!r}, as the vocabulary has holes: give a "
                "tokenizer that has a padding token of its own, and an end token"
            )


def set_template(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> None:
    """Encoding never adds special tokens, so a family that starts with BOS gets it in its template."""
    first = tokenizer("a").input_ids[0]
    begins = tokenizer.bos_token is not None and first == tokenizer.bos_token_id
    tokenizer.chat_template = ("{{- bos_token -}}" if begins else "") + chat_template


def _no_end(tokenizer: PreTrainedTokenizerBase, path: str) -> str:
    """The message for a tokenizer that declares no EOS; its vocabulary may well have such a token."""
    vocabulary = tokenizer.get_vocab()
    end = next((token for token in ENDS if token in vocabulary), ENDS[0])
    typed = f"'model.end_token=\"{end}\"'"
    return f"{path} has no EOS: no response would ever end. Type {typed}, or name eos_token in its tokenizer_config.json"


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocabulary` entries (256 bytes and 3 special tokens at least)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<pad>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def plain(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Remove what the tokenizer would read as special tokens: a "</s>" in the data must not end a response.

    Also one that only appears when another is removed from its middle: "<</s>/s>".
    """
    special, found = special_tokens(tokenizer)
    if not found(text):
        return text
    kept = ""
    for character in text:
        kept += character
        while kept.endswith(special):
            kept = kept.removesuffix(next(token for token in special if kept.endswith(token)))
    return kept


@lru_cache(maxsize=4)
def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, ...], Callable]:
    """Named special tokens, such as EOS, and unnamed ones; and a search for any of them in a text.

    LLaMA 3 has 250 in reserve: looking for each in turn takes 80 times as long as one expression.
    """
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = tuple(sorted({*tokenizer.all_special_tokens, *added}))
    return special, re.compile("|".join(map(re.escape, special))).search


def special_in(tokenizer: PreTrainedTokenizerBase, text: str) -> str | None:
    """A special token that a text holds, if it holds one."""
    found = special_tokens(tokenizer)[1](text)
    return found.group() if found else None


def render_prompt(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> str:
    """The text that the model gets: the dialogue so far and the opening of its reply."""
    return _render(tokenizer, turns, add_generation_prompt=True)


def _render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], add_generation_prompt: bool) -> str:
    """Raises UserError if the template refuses the dialogue: many accept no system turn, or only roles that alternate."""
    turns = [turn | {"content": plain(tokenizer, turn["content"])} for turn in turns]
    try:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=add_generation_prompt, tokenize=False)
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise UserError(f"refused by the chat template: {error}") from error


def gap(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template puts between the opening of a reply and the reply: ' ' after 'Assistant:', '' after a header's line breaks.

    A response is trained with it, so that it looks like the earlier replies of the same dialogue.
    """
    hello, answer = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Answer"}
    opening, whole = render_prompt(tokenizer, [hello]), _render(tokenizer, [hello, answer], add_generation_prompt=False)
    between, found, _ = whole.removeprefix(opening).partition("Answer")
    if found and whole.startswith(opening) and not between.strip():
        return between
    # The template writes something else there, such as an empty thought
    return "" if opening[-1:].isspace() else " "


def check_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raise UserError if the chat template is broken, does something the sandbox forbids, or leaves out the messages."""
    try:
        rendered = render_prompt(tokenizer, [{"role": "user", "content": "Hello"}])
    except UserError as error:
        raise UserError(f"{where} is refused by the template engine: {error.__cause__}") from error
    if "Hello" not in rendered:
        raise UserError(
            f"{where} leaves out what is said: it turns a message 'Hello' into {rendered!r}. It needs {{{{ message['content'] }}}}"
        )


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids, without special tokens but those in the texts. Not verbose: a text beyond the context is cut or dropped later."""
    return tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []  # of none, transformers raises IndexError


def encode_prompts(tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Sequence[Turn]]) -> list[list[int]]:
    return encode(tokenizer, [render_prompt(tokenizer, turns) for turns in dialogues])


def encode_responses(tokenizer: PreTrainedTokenizerBase, responses: Sequence[str]) -> list[list[int]]:
    """Tokens of gap + response + EOS, as they follow the prompt.

    Tokenised after a short text, which is then cut off: otherwise SentencePiece would add a space of its own. Where a vocabulary merges
    that text with the response, the response is tokenised alone.
    """
    between = gap(tokenizer)
    before = "a" if between else "\n"
    (anchor,) = encode(tokenizer, [before])
    texts = [between + plain(tokenizer, response).strip() for response in responses]
    rows = encode(tokenizer, [before + text for text in texts])
    for n, ids in enumerate(rows):
        rows[n] = ids[len(anchor) :] if ids[: len(anchor)] == anchor else encode(tokenizer, [texts[n]])[0]
    return [[*ids, tokenizer.eos_token_id] for ids in rows]


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits that change with anything that changes how a dialogue is tokenised."""
    facts = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": [tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token, *special_tokens(tokenizer)[0]],
        "template": tokenizer.chat_template,
        # Two tokenizers may share a vocabulary and still split differently
        "probe": tokenizer("Hello, wörld!  123 \n\nHuman: 你好 a_b", add_special_tokens=False).input_ids,
    }
    return hashlib.sha256(json.dumps(facts, ensure_ascii=False).encode()).hexdigest()[:16]


def same_tokens(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Whether ids mean the same to both: then the reward model can read what the actor wrote."""
    return fingerprint(a) == fingerprint(b)
