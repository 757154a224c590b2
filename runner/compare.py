"""Compare models on the same prompts, by a reward model's scores: `python -m runner.compare SFT DPO PPO --reward REWARD`.

Each model answers each prompt once, with the same random numbers, so that differences come from the models. Their unit is the standard
deviation of the first model's scores. The prompts are the held-out pairs of the reward model, or those of a file; answers that are
known, the chosen ones of the pairs, are scored too.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from runner.errors import UserError
from runner.exported import REWARD, as_trained, context_of, find, load_actor, load_reward
from runner.files import read_json
from runner.formatting import duration, num, pct, with_error
from runner.reporting.report import Section, print_sections

if TYPE_CHECKING:  # they import torch, which takes its time
    import torch

    from runner.rollout.record import Rollout

COMPARE = "python -m runner.compare"
KNOWN = "known answers"
HEADER = ("model", "score", "difference", "better (95 %)", "length", "truncated")
SAMPLES = 3


@dataclass(frozen=True)
class Question:
    prompt: list[int]  # token ids
    answer: list[int] | None = None  # a known one, with EOS


@dataclass
class Answers:
    """One model's answers to all questions."""

    name: str
    texts: list[str]
    scores: "torch.Tensor"  # (N,) as the reward model gives them
    lengths: "torch.Tensor"  # (N,) tokens, EOS included
    truncated: "torch.Tensor"  # (N,) bool


def compare(args: argparse.Namespace) -> tuple[list[Section], list[dict]]:
    """The report, and a row for each prompt. Raises UserError."""
    # 1. The models, by what was typed
    paths = named([find(typed, COMPARE) for typed in args.models])
    args.max_new_tokens = args.max_new_tokens or trained_to_write(next(iter(paths.values())))
    judge = find(args.reward, f"{COMPARE} {shlex.join(args.models)} --reward", REWARD)
    tokenizer, reward = load_reward(judge, f"{COMPARE} --reward")

    # 2. The questions
    questions, whence = asked_in(args.prompts, tokenizer) if args.prompts else held_out_of(judge, tokenizer)
    questions, left_out = that_fit(questions, args.max_new_tokens, paths | {"the reward model": judge})
    questions = picked(questions, args.count)

    # 3. Each model answers; one is in memory at a time
    rollouts = {}
    for name, path in paths.items():
        started = time.monotonic()
        rollouts[name] = answered(path, name, tokenizer, questions, args)
        print(f"{name}: {len(questions)} answers in {duration(time.monotonic() - started)}", file=sys.stderr)
    if all(question.answer for question in questions):
        rollouts[KNOWN] = known(questions, tokenizer)

    # 4. Scores and report
    found = [scored(name, rollout, tokenizer, reward, args.max_new_tokens) for name, rollout in rollouts.items()]
    how = "likeliest tokens" if args.greedy else f"temperature {args.temperature:g}"
    title = f"{num(len(questions))} prompts of {whence}: {how}, at most {args.max_new_tokens} tokens"
    prompts = [tokenizer.decode(question.prompt, skip_special_tokens=True).strip() for question in questions]
    told = in_units(found)
    return [table(title, told, left_out), *samples(prompts, told)], list(rows_of(prompts, found))


def named(paths: list[str]) -> dict[str, str]:
    """Each path under the name of its step's folder, or of its own; under the path itself where that is not enough."""
    folders = [Path(path).resolve() for path in paths]
    if twice := next((path for path, folder in zip(paths, folders, strict=True) if folders.count(folder) > 1), None):
        raise UserError(f"{twice} is given twice: give different models")
    short = [
        (folder.parent if folder.name == "model" else folder).name if folder.exists() else path
        for path, folder in zip(paths, folders, strict=True)
    ]
    return {path if short.count(name) > 1 or name == KNOWN else name: path for name, path in zip(short, paths, strict=True)}


def trained_to_write(path: str) -> int:
    """Tokens of an answer at most, as a model's generation_config.json has it; 256 if it says nothing."""
    file = Path(path) / "generation_config.json"
    return (read_json(file) if file.exists() else {}).get("max_new_tokens") or 256


# --- questions --------------------------------------------------------------------------------------------------------


def held_out_of(judge: str, tokenizer) -> tuple[list[Question], str]:
    """The held-out pairs of the step that trained the reward model: no stage has trained on their prompts. And their name."""
    from runner.data import cache

    file = Path(judge).resolve().parent / "step.json"
    data = Path(read_json(file)["data"]) if file.exists() else None
    if data is None or not data.is_dir():
        why = "the data of its training is gone" if data else "it was not trained here"
        raise UserError(f"{judge} has no held-out prompts, as {why}: type --prompts FILE (a row needs a prompt, and may have an answer)")
    _, held, _ = cache.load(data)
    split = [(row["chosen_ids"], row["prompt_length"]) for row in held]
    return [Question(ids[:n], ids[n:]) for ids, n in split], f"the held-out pairs of {file.parent.name}"


def asked_in(path: str, tokenizer) -> tuple[list[Question], str]:
    """The prompts of a data file, with the answers that its rows have. And its name."""
    from runner.config.schema import Source
    from runner.data.adapters import adapt
    from runner.data.dialogue import BadRow, Dropped, Unmapped
    from runner.data.file_formats import BrokenRow
    from runner.data.sources import rows
    from runner.models.tokenizer import encode_prompts, encode_responses

    examples = []
    for where, row in rows(Source(path), toy_rows=0):
        try:
            if isinstance(row, BrokenRow):
                raise row
            try:
                examples.append(adapt("fields", row, {}))
            except Unmapped:  # no answer
                examples.append(adapt("prompts", row, {}))
        except Dropped:
            continue
        except (BrokenRow, BadRow) as error:
            raise UserError(f"{where}: {error}") from error
    if not examples:
        raise UserError(f"{path} holds no prompts")
    answers = iter(encode_responses(tokenizer, [example.chosen for example in examples if example.chosen]))
    prompts = encode_prompts(tokenizer, [example.prompt for example in examples])
    return [Question(ids, next(answers) if e.chosen else None) for ids, e in zip(prompts, examples, strict=True)], path


def that_fit(questions: list[Question], answer: int, paths: dict[str, str]) -> tuple[list[Question], str]:
    """The questions that all models can read with an answer; and, if there are others, how many, in words."""
    limits = {name: limit for name, path in paths.items() if (limit := context_of(path, COMPARE))}
    name = min(limits, key=limits.get, default=None)
    if name is None:
        return questions, ""
    kept = [q for q in questions if len(q.prompt) + max(answer, len(q.answer or ())) <= limits[name]]
    if not kept:
        raise UserError(f"{name} reads {limits[name]} tokens, and no prompt leaves room for an answer of {answer}: lower --max-new-tokens")
    dropped = len(questions) - len(kept)
    words = f"Left out: {num(dropped)} prompts that {name} cannot read with an answer, as it reads {num(limits[name])} tokens."
    return kept, words if dropped else ""


def picked(questions: list[Question], count: int) -> list[Question]:
    """At most `count` of them, always the same ones."""
    from runner.data.batches import subset

    return [questions[n] for n in subset(len(questions), count)]


# --- answers ----------------------------------------------------------------------------------------------------------


def answered(path: str, name: str, tokenizer, questions: list[Question], args: argparse.Namespace) -> "Rollout":
    """A model's answers, on the CPU. Raises UserError for one whose tokens are not the reward model's."""
    from runner.families import check_family
    from runner.models.tokenizer import same_tokens
    from runner.models.wrappers import Actor
    from runner.rollout import graph
    from runner.rollout.collect import RolloutSettings, respond
    from runner.rollout.record import CPU
    from runner.rollout.stops import Stops

    own, model = load_actor(path, COMPARE)
    check_family(path, model.config.model_type)
    if not same_tokens(own, tokenizer):
        raise UserError(f"{name} and the reward model do not have the same tokenizer and chat template: it could not read the answers")
    sampling = {"top_k": 1} if args.greedy else {"temperature": args.temperature}
    actor = Actor(model, model.config.model_type, 0, **sampling, vocabulary=max(own.get_vocab().values()) + 1)
    sizes = (args.max_new_tokens, args.batch, args.batch)
    settings = RolloutSettings(own.pad_token_id, own.eos_token_id, *sizes, model.device)
    if graph.why_not(model, model.device):
        settings.engine = "hf"
    if strings := as_trained(path)[1]:
        settings.stops = Stops.of(own, strings, model.config.vocab_size, model.device)
    return respond(actor, settings, [q.prompt for q in questions], args.seed, list(range(len(questions)))).to(CPU)


def known(questions: list[Question], tokenizer) -> "Rollout":
    """The answers that were known before."""
    import torch

    from runner.data.batches import pad
    from runner.rollout.record import Rollout

    prompts, prompt_mask = pad([q.prompt for q in questions], tokenizer.pad_token_id, left=True)
    responses, mask = pad([q.answer for q in questions], tokenizer.pad_token_id)
    return Rollout(prompts, prompt_mask.sum(1), responses, mask.sum(1), torch.ones(len(questions), dtype=torch.bool))


def scored(name: str, rollout: "Rollout", tokenizer, reward, most: int) -> Answers:
    """The answers as text, with the reward model's scores."""
    import torch

    from runner.models.tokenizer import decode_response
    from runner.rollout.collect import final_scores, micro_batches

    scores = torch.zeros(len(rollout))
    with torch.no_grad():
        for rows, part in micro_batches(rollout, torch.arange(len(rollout)), size=16):
            scores[rows] = final_scores(reward, part.as_judged(tokenizer.eos_token_id, most)).cpu()
    told = zip(rollout.responses.tolist(), rollout.lengths.tolist(), strict=True)
    return Answers(name, [decode_response(tokenizer, ids[:n]) for ids, n in told], scores, rollout.lengths.float(), ~rollout.finished)


# --- report -----------------------------------------------------------------------------------------------------------


def in_units(found: Sequence[Answers]) -> list[Answers]:
    """Scores in standard deviations of the first model's, from its mean."""
    first = found[0].scores
    unit = max(float(first.std()), 1e-3) if len(first) > 1 else 1.0  # of a single score torch gives NaN
    return [replace(one, scores=(one.scores - first.mean()) / unit) for one in found]


def table(title: str, found: Sequence[Answers], left_out: str = "") -> Section:
    """Scores, and how often each model's answer is scored higher than the first one's."""
    first = found[0]
    notes = [f"Scores are the reward model's, in standard deviations of {first.name}'s, from its mean. ± is one standard error."]
    if len(found) > 1:
        notes.append(
            f"Difference and better: against {first.name}'s answer to the same prompt, with the 95 % interval; a tie counts as half."
        )
    notes += [left_out] if left_out else []
    return Section(title, header=HEADER, rows=[table_row(one, first) for one in found], notes=notes)


def table_row(one: Answers, first: Answers) -> list[str]:
    from runner.stages.heldout import standard_error
    from runner.stages.pairs import wilson_interval

    n, margin = len(one.scores), one.scores - first.scores
    better = float(((margin > 0) + 0.5 * (margin == 0)).sum())
    low, high = wilson_interval(better, n)

    def mean_of(values: "torch.Tensor", sign: str = "") -> str:
        return with_error(num(float(values.mean()), sign), standard_error(values))

    against = (
        [mean_of(margin, "+"), f"{pct(better / n, digits=0)} ({100 * low:.0f} to {100 * high:.0f})"] if one is not first else ["-"] * 2
    )
    return [one.name, mean_of(one.scores), *against, num(float(one.lengths.mean())), pct(float(one.truncated.float().mean()))]


def samples(prompts: list[str], found: Sequence[Answers]) -> list[Section]:
    return [
        Section(
            f"Sample {n + 1}",
            intro=prompts[n],
            header=("model", "score", "answer"),
            rows=[[one.name, num(float(one.scores[n])), one.texts[n]] for one in found],
        )
        for n in range(min(SAMPLES, len(prompts)))
    ]


def rows_of(prompts: list[str], found: Sequence[Answers]) -> Iterator[dict]:
    """For --out: each prompt with all answers. Scores as the reward model gives them."""
    for n, prompt in enumerate(prompts):
        answers = {
            one.name: {
                "answer": one.texts[n],
                "score": float(one.scores[n]),
                "tokens": int(one.lengths[n]),
                "truncated": bool(one.truncated[n]),
            }
            for one in found
        }
        yield {"prompt": prompt, "answers": answers}


def main() -> None:
    parser = argparse.ArgumentParser(prog=COMPARE, description="Compare models on the same prompts, by a reward model's scores.")
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="folder of an SFT, DPO or PPO model, of its step, or of a run (the newest)"
    )
    parser.add_argument(
        "--reward", required=True, metavar="MODEL", help="folder of a reward model, of its step, or of a run that trained one"
    )
    parser.add_argument("--prompts", metavar="FILE", help="data file; default: the held-out pairs of the reward model's training")
    parser.add_argument("--count", type=int, default=256, metavar="N", help="prompts at most, default 256")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer; default: what the first model was trained with")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="default 1, at which PPO trains")
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the sampling, default 1")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="answers at a time, default 64")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all answers and scores to this file, as JSON lines")
    args = parser.parse_args()
    if (
        not 0 < args.temperature < float("inf")
        or min(args.count, 1 if args.max_new_tokens is None else args.max_new_tokens, args.batch) < 1
        or args.seed < 0
    ):
        parser.error("--temperature must be above 0 (for the likeliest token: --greedy); --count, --max-new-tokens and --batch at least 1")
    try:
        parts, rows = compare(args)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print_sections(parts, Console())
    except UserError as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        sys.exit("error: the GPU's memory is full: lower --batch or --max-new-tokens")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
