"""The toy task: describing things kindly, with a judge that scores any response, so that learning can be measured.

"Please describe the river for Ann." deserves "The river is calm, bright and fresh." Demonstrations also hold unkind words,
repetitions and wrong counts; preferences follow the judge; so an actor that follows the preferences beats the one that
copies the demonstrations.
"""

import random
import re
from functools import cache

# Part of the cache key: increase it when the rows change
VERSION = 4

KIND = "calm bright fresh lovely gentle warm pretty fine charming neat pleasant graceful splendid nice cheerful sweet".split()
UNKIND = "dull ugly dirty awful nasty dreary horrid shabby gloomy rotten boring grim lousy foul bleak messy".split()
WANTED = 3
KIND_SET, JUDGED, WORD = frozenset(KIND), frozenset(KIND + UNKIND), re.compile(r"[a-z]+")

THINGS = "river garden house street lake bridge castle forest village market harbor island museum park tower valley".split()
THINGS += "beach kitchen library mountain meadow palace station temple theater vineyard windmill workshop canal cottage".split()
GREETINGS = ["", "", "Hi! ", "Hello. ", "Hey, ", "Good morning. ", "Excuse me. ", "Quick question: ", "Hi there. ", "OK. "]
REQUESTS = ["describe", "tell me about", "what do you think of", "please describe", "talk about", "say something about", "how do you like"]
REQUESTS += ["can you describe", "could you describe", "give me a word on"]
ENDINGS = ["", " please", " for me", " for my son", " for a quiz", " for a poem", " for school", " in one line", " if you can"]
ENDINGS += [" for Tom", " for Ann", " for a game", " right now", " for my class", " for a story", " today", " again"]


@cache
def row(i: int) -> dict:
    """Row number i, always the same: prompt (turns), chosen and rejected; a third are the second turn of a dialogue."""
    rng = random.Random(i)
    turns = []
    if rng.random() < 0.33:
        thing = rng.choice(THINGS)
        turns += [_question(rng, thing), {"role": "assistant", "content": _answer(thing, rng.sample(KIND, WANTED))}]
    thing = rng.choice(THINGS)
    turns.append(_question(rng, thing))
    good = bad = ""
    # People would not notice a difference of one word either: it takes three
    while abs(judge(good) - judge(bad)) < 3 / WANTED - 1e-9:
        good, bad = (_attempt(rng, thing) for _ in range(2))
    if judge(good) < judge(bad):
        good, bad = bad, good
    return {"prompt": turns, "chosen": good, "rejected": bad}


def judge(response: str) -> float:
    """Score of a response: 1 is perfect, 0 is worth as much as silence, below 0 is worse.

    Every different kind word counts +1, three at most; every other one of the kind and unkind words, repetitions and surplus
    included, counts -1; a missing full stop at the end counts -1; divided by three.
    """
    words = [w for w in WORD.findall(response.lower()) if w in JUDGED]
    right = min(len(KIND_SET.intersection(words)), WANTED)
    wrong = len(words) - right
    unfinished = bool(response.strip()) and not response.strip().endswith(".")
    return (right - wrong - unfinished) / WANTED


def _question(rng: random.Random, thing: str) -> dict:
    text = f"{rng.choice(GREETINGS)}{rng.choice(REQUESTS)} the {thing}{rng.choice(ENDINGS)}"
    return {"role": "user", "content": text[0].upper() + text[1:] + "."}


def _attempt(rng: random.Random, thing: str) -> str:
    """A response of mixed quality: a third of the words unkind, some repeated, and one answer in three of a wrong length."""
    words: list[str] = []
    for _ in range(rng.choice((1, 2, 3, 3, 3, 3, 4, 5))):
        repeat = words and rng.random() < 0.15
        words.append(rng.choice(words) if repeat else rng.choice(UNKIND if rng.random() < 0.33 else KIND))
    return _answer(thing, words)


def _answer(thing: str, words: list[str]) -> str:
    listed = (", ".join(words[:-1]) + " and " if len(words) > 1 else "") + words[-1]
    return f"The {thing} is {listed}."
