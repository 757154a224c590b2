"""The bytes that each token adds to a text, whatever stands before it."""

import json
import re
from collections.abc import Callable, Iterable

from transformers import PreTrainedTokenizerBase

from runner.models.tokenizer import special_tokens

# Decoders that turn one token after the other into text, or only change how a text begins
TOKENWISE = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "BPEDecoder"}


def token_bytes(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> list[bytes]:
    """Of each token. Special tokens, which no text shows, have none, and so have numbers without a token."""
    spell, special = _spelling(tokenizer), set(special_tokens(tokenizer)[0])
    names = {number: token for token, number in tokenizer.get_vocab().items() if token not in special}
    return [spell(names[number], number) if number in names else b"" for number in ids]


def _spelling(tokenizer: PreTrainedTokenizerBase) -> Callable[[str, int], bytes]:
    """(token, its number) -> bytes, by the way in which the tokenizer decodes."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    steps = _steps(json.loads(decoder.__getstate__())) if decoder is not None else []
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}:
        return _byte_level
    if kinds and kinds <= TOKENWISE and all("String" in step["pattern"] for step in steps if step["type"] == "Replace"):
        return lambda token, number: _tokenwise(token, steps)
    # Words with spaces between them, for instance: what a token adds to a text that another one begins
    before = tokenizer("a", add_special_tokens=False).input_ids
    begun = tokenizer.decode(before)
    return lambda token, number: tokenizer.decode([*before, number]).removeprefix(begun).encode()


def _steps(decoder: dict) -> list[dict]:
    """The description of a decoder as a flat list."""
    return [step for part in decoder["decoders"] for step in _steps(part)] if decoder["type"] == "Sequence" else [decoder]


def _byte_level(token: str, number: int) -> bytes:
    """Byte-level BPE (OPT, BLOOM, GPT-NeoX, LLaMA 3). Tokens that were added as text stand for themselves."""
    if all(character in BYTES for character in token):
        return bytes(BYTES[character] for character in token)
    return token.encode()


def _tokenwise(token: str, steps: list[dict]) -> bytes:
    """SentencePiece (LLaMA 1 and 2): a sign for the space, and <0x0A> for a byte. Or a sign for the end of a word."""
    for step in steps:
        if step["type"] == "Replace":
            token = token.replace(step["pattern"]["String"], step["content"])
        elif step["type"] == "Metaspace":
            token = token.replace(step["replacement"], " ")
        elif step["type"] == "BPEDecoder":
            token = token.replace(step["suffix"], " ")
        elif step["type"] == "ByteFallback" and (byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)):
            return bytes.fromhex(byte[1])
    return token.encode()


def _alphabet() -> dict[str, int]:
    """The bytes that the characters of byte-level BPE stand for: printable ones for themselves, those from 256 on for the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTES = _alphabet()
