"""The toy task: lists of things of a kind, with a judge that scores any response, so that learning can be measured.

"Please list three fruits." deserves "apple, pear and plum." Demonstrations contain wrong words and wrong counts;
preferences follow the judge; so an actor that follows the preferences beats the one that copies the demonstrations.
"""

import random
import re

# Part of the cache key: raise it when the rows change
VERSION = 1

KINDS = {
    "animals": "cat dog horse cow sheep goat lion tiger bear wolf fox mouse".split(),
    "fruits": "apple pear plum peach cherry grape lemon mango melon fig kiwi banana".split(),
    "colors": "red blue green yellow black white brown pink gray orange purple violet".split(),
    "tools": "hammer saw drill wrench pliers chisel file axe rake shovel clamp level".split(),
    "drinks": "water tea coffee milk juice cocoa cider soda beer wine punch broth".split(),
    "sports": "tennis soccer golf hockey rugby boxing rowing skiing judo cricket polo chess".split(),
    "metals": "iron gold silver copper zinc tin lead nickel steel brass bronze cobalt".split(),
    "clothes": "hat coat shirt scarf glove sock shoe belt skirt dress jacket sweater".split(),
}
NUMBERS = {"two": 2, "three": 3, "four": 4}

GREETINGS = ["", "", "Hi! ", "Hello. ", "Hey, ", "Good morning. ", "Excuse me. ", "Quick question: ", "Hi there. ", "OK. "]
REQUESTS = ["name", "list", "tell me", "give me", "write down", "can you name", "could you list", "please name", "I need", "say"]
ENDINGS = ["", " please", " for me", " for my son", " for a quiz", " for a poem", " for school", " that I may know", " if you can"]
ENDINGS += [" for Tom", " for Ann", " for a game", " right now", " for my class", " for a story", " in one line", " today", " again"]


def row(i: int) -> dict:
    """Row number i, always the same: prompt (turns), chosen and rejected; a third are the second turn of a dialogue."""
    rng = random.Random(i)
    turns = []
    if rng.random() < 0.33:
        kind, number = _question(rng)
        turns += [_user(rng, kind, number), {"role": "assistant", "content": _listing(rng.sample(KINDS[kind], NUMBERS[number]))}]
    kind, number = _question(rng)
    turns.append(_user(rng, kind, number))
    good = bad = ""
    while judge(turns, good) == judge(turns, bad):
        good, bad = (_attempt(rng, kind, NUMBERS[number]) for _ in range(2))
    if judge(turns, good) < judge(turns, bad):
        good, bad = bad, good
    return {"prompt": turns, "chosen": good, "rejected": bad}


def judge(turns: list[dict], response: str) -> float:
    """Score of a response: 1 is perfect, 0 is worthless, below 0 is worse than silence.

    Every different word of the kind asked for counts +1, up to the number asked for; every other word counts -1; a missing
    full stop at the end counts -1; divided by the number asked for.
    """
    question = turns[-1]["content"].lower()
    kind = next((k for k in KINDS if k in question), None)
    wanted = next((n for word, n in NUMBERS.items() if word in question.split()), None)
    if kind is None or wanted is None:
        raise ValueError(f"not a toy question: {turns[-1]['content']!r}")
    words = [w for w in re.findall(r"[^\s,.]+", response.lower()) if w != "and"]
    right = min(len(set(words) & set(KINDS[kind])), wanted)
    wrong = len(words) - right
    return (right - wrong - (not response.strip().endswith("."))) / wanted


def _question(rng: random.Random) -> tuple[str, str]:
    return rng.choice(sorted(KINDS)), rng.choice(sorted(NUMBERS))


def _user(rng: random.Random, kind: str, number: str) -> dict:
    text = f"{rng.choice(GREETINGS)}{rng.choice(REQUESTS)} {number} {kind}{rng.choice(ENDINGS)}"
    return {"role": "user", "content": text[0].upper() + text[1:] + "."}


def _attempt(rng: random.Random, kind: str, number: int) -> str:
    """A response of mixed quality: three words in ten are of another kind, and one list in four has a wrong length."""
    length = number if rng.random() < 0.75 else max(1, number + rng.choice((-1, 1)))
    words = rng.sample(KINDS[kind], length)
    others = [w for k, ws in KINDS.items() if k != kind for w in ws]
    return _listing([rng.choice(others) if rng.random() < 0.3 else w for w in words])


def _listing(words: list[str]) -> str:
    return (", ".join(words[:-1]) + " and " if len(words) > 1 else "") + words[-1] + "."
