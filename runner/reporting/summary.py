"""The summary of a finished run: in the terminal, in summary.md, and as flat facts in summary.json.

Three layers. results.py reads the facts from the step folders. `sections` turns them into a list of Section: plain strings, no layout.
report.py lays this list out for a terminal (or a log) and for a file. None of them imports torch.
"""

import json
import math
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

from rich.console import Console

from runner.config.rates import lora_rate_key, rate_key
from runner.config.schema import PARENTS, STAGES, Model
from runner.durable.resume import ORIGIN
from runner.formatting import duration, num, pct, short, with_error
from runner.plan import Step
from runner.reporting.report import Section, bar, markdown, print_sections, sparkline
from runner.reporting.results import Trained, headline, spent, trained_of

STAGE_HEADER = ("stage", "state", "time", "steps", "train", "eval", "truncated", "dropped")
CHANGE_HEADER = ("", "before", "after", "change", "during training")
# With fewer pairs, prompts or steps than these, no verdict
CALIBRATION_PAIRS, SURE_PROMPTS, SFT_STEPS = 100, 32, 20
# Nats per token that chosen answers may lose in DPO before the summary warns. At 2 the tiny model babbled, at 97 % accuracy
FALLEN = 1.0
TRY_NEXT = {"sft": "sft.epochs=1,2,4", "reward": "reward.epochs=1,2", "dpo": "dpo.beta=0.03,0.1,0.3", "ppo": "ppo.kl_coef=0.02,0.05,0.1"}


def show_summary(
    name: str,
    steps: Sequence[Step],
    reused: set[str],
    run_dir: Path,
    overrides: Sequence[str] = (),
    *,
    took: float,
    flags: Sequence[str] = (),
    lacking: str | None = None,
    console: Console | None = None,
) -> None:
    """Print the summary of a run, and write run_dir/summary.md and run_dir/summary.json.

    Args:
        steps: all steps of the plan, in order; a step that is pinned or lacks a result is shown with "-".
        reused: the stages that were done before and not trained in this run.
        overrides, flags: what was typed after `run.py`; the suggested commands repeat it.
        took: seconds of this command so far; each stage counts its own, of a resumed one those of all commands.
        lacking: see lacking_for_ppo.
    """
    run_dir = Path(run_dir)
    trained = [trained_of(step, reused) for step in steps]
    parts = [*sections(name, trained, run_dir, took), next_section(trained, overrides, flags, lacking)]
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "summary.md").write_text(markdown(parts), encoding="utf-8")
    (run_dir / "summary.json").write_text(json.dumps(headline(name, trained, run_dir, overrides), indent=2) + "\n", encoding="utf-8")
    print_sections(parts, console or Console())


# --- sections ---------------------------------------------------------------------------------------------------------


def sections(name: str, trained: Sequence[Trained], run_dir: Path, took: float) -> list[Section]:
    parts = [stages_section(name, trained, took), *time_sections(trained)]
    # None: the SFT model was given (sft.use). 0: its folder is gone
    steps = next((t.result["steps"] if t.result else None for t in trained if t.step.stage == "sft"), 0)
    describe = {"sft": sft_sections, "reward": reward_sections, "dpo": dpo_sections, "ppo": partial(ppo_sections, sft_steps=steps)}
    for t in trained:
        parts += describe[t.step.stage](t) if t.result else []
    return [*parts, places_section(trained, run_dir)]


def stages_section(name: str, trained: Sequence[Trained], took: float) -> Section:
    rows, notes = [], []
    for t in trained:
        rows.append([t.step.stage, t.state, *(stage_cells(t) if t.result else "------")])
        notes += stage_notes(t)
    seconds = spent(trained)
    # A resumed stage counts the time of earlier commands too
    resumed = any(t.state == "trained" and t.result.get("resumed_from") for t in trained)
    outside = "including" if resumed or not 0 < seconds <= took else f"{duration(took - seconds)} of it outside the stages, for checks,"
    notes.append(f"This command took {duration(took)}, {outside} data preparation and start-up.")
    happened = f"trained in {duration(seconds)}" if seconds else "nothing new was trained"
    return Section(f"{name}: {happened}", header=STAGE_HEADER, rows=rows, notes=notes)


def stage_cells(t: Trained) -> list[str]:
    data = t.result["data"]
    time = "-" if t.state == "reused" else duration(t.result["seconds"])  # another command spent it
    counts = (data["train"], data["eval"], data["truncated"], sum(data["dropped"].values()))
    return [time, num(t.result["steps"]), *map(num, counts)]


def stage_notes(t: Trained) -> list[str]:
    """Why rows were dropped, which repeat others, and where the stage was resumed."""
    notes = []
    if t.result and t.result["data"]["dropped"]:
        dropped = [f"{num(n)} {why.replace('_', ' ')}" for why, n in t.result["data"]["dropped"].items()]
        notes.append(f"{t.step.stage} dropped: {', '.join(dropped)}")
    if t.result and (repeated := t.result["data"].get("repeated")):  # older results do not count them
        notes.append(f"{t.step.stage} trains on {num(repeated)} exact copies of other rows: they count more than once")
    if t.state == "trained" and t.result["resumed_from"]:
        notes.append(f"{t.step.stage} was resumed from its checkpoint at step {num(t.result['resumed_from'])}")
    if origin := t.step.facts.get(ORIGIN):
        place, changed = f"{origin['step']} at step {origin['at']}", ", ".join(origin["changed"])
        notes.append(f"{t.step.stage} was forced to continue from {place}, trained with {changed}")
    return notes


def time_sections(trained: Sequence[Trained]) -> list[Section]:
    """For stages trained in this run: where the time went, how well the machine was used, and the largest possible speed-up."""
    rows, notes = [], []
    for t in trained:
        if t.state != "trained":
            continue
        seconds, phases = t.result["seconds"], t.result["phases"]
        spans = phases | {"start": seconds - sum(phases.values())}
        longest = sorted(((s, phase) for phase, s in spans.items() if s >= 0.01 * seconds), reverse=True)
        for s, phase in longest:
            rows.append([t.step.stage if phase == longest[0][1] else "", phase, bar(s / seconds), pct(s / seconds, digits=0), duration(s)])
        if used := usage(t.curves):
            notes.append(f"{t.step.stage}: {used}")
        if advice := t.result.get("advice"):
            notes.append(f"{t.step.stage} could be faster: {advice}")
    return [Section("Where the time went", header=("stage", "phase", "", "share", "time"), rows=rows, notes=notes)] if rows else []


def usage(curves: dict[str, list[float]]) -> str:
    """Medians of the steps' utilisation metrics, without the first step, which warms up."""
    shares = {"perf/mfu": "MFU {}", "perf/mbu": "decoding at {} of the memory bandwidth", "perf/padding_fraction": "{} padding"}
    seen = {name: median(curves[name][1:]) for name in shares if len(curves.get(name, ())) > 1}
    found = [shares[name].format(pct(share, digits=0)) for name, share in seen.items() if share >= 0.005]
    if peak := max(curves.get("perf/gpu_mem_peak_gb", ()), default=0.0):
        found.append(f"{num(peak)} GB at most")
    return ", ".join(found)


def change_row(label: str, before: float | None, after: float | None, curve: Sequence[float], show=num, errors=(None, None)) -> list[str]:
    change = "-" if None in (before, after) else with_error(show(after - before, "+"), both(errors))
    return [label, show(before), show(after), change, sparkline(curve)]


def both(errors: Sequence[float | None]) -> float | None:
    """The standard error of a difference, from those of its two numbers. Mostly too large: both are of the same prompts."""
    return None if None in errors else math.hypot(*errors)


def sft_sections(t: Trained) -> list[Section]:
    r = t.result
    rows = [
        change_row("perplexity", r["perplexity_before"], r["perplexity_after"], t.curves.get("eval/perplexity", ())),
        change_row("loss", r["loss_before"], r["loss_after"], t.curves.get("eval/loss", ())),
    ]
    worse = r["loss_after"] > r["loss_before"]
    smaller = f"Try a smaller {actor_rate(t.step)}, or fewer sft.epochs if it fell first."
    notes = [f"Training made it worse: the held-out loss rose. {smaller}"] if worse else []
    return [Section("SFT on held-out answers", header=CHANGE_HEADER, rows=rows, notes=notes)]


def reward_sections(t: Trained) -> list[Section]:
    below = "Choosing the longer answer does better: PPO against this reward model teaches length."
    return [pair_section("Reward model", "reward model", t, [*verdict(t.result, below), *calibration_notes(t.result)])]


def dpo_sections(t: Trained) -> list[Section]:
    below = "Choosing the longer answer does better: more pairs or more training may help."
    return [pair_section("DPO", "implicit reward", t, [*verdict(t.result, below), *dpo_notes(t.result, actor_rate(t.step))])]


def actor_rate(step: Step) -> str:
    """The key of the learning rate at which most of the actor trained: its adapters', where it has some."""
    actor = step.facts.get("model", {}).get("actor", {})  # a model that was given has none of it
    return (lora_rate_key if actor.get("lora", {}).get("dim") else rate_key)(step.stage, "actor")


def dpo_notes(r: dict, rate: str) -> list[str]:
    """How far the actor has moved: ranking pairs well says nothing about what it writes itself. rate: the key of its learning rate."""
    chosen, rejected = r["chosen_logratio"], r["rejected_logratio"]
    notes = [f"The log-probability of a chosen answer moved by {num(chosen, '+')} nats, that of a rejected one by {num(rejected, '+')}."]
    if chosen < -FALLEN * r["chosen_tokens"]:
        notes.append(f"Chosen answers have become unlikely too: read what it writes. Try a smaller {rate} or a larger dpo.beta.")
    return notes


def pair_section(name: str, scorer: str, t: Trained, notes: list[str]) -> Section:
    """How often the chosen response of a held-out pair scored higher."""
    r = t.result
    lines = [(scorer, r["accuracy"]), ("longer is better (baseline)", r["longer_is_better"])]
    if len(r["accuracy_by_source"]) > 1:
        lines += [(f"on {source} ({num(n)} pairs)", accuracy) for source, (accuracy, n) in r["accuracy_by_source"].items()]
    rows = [[label, bar(accuracy), pct(accuracy), ""] for label, accuracy in lines]
    rows[0][3] = f"{pct(r['accuracy_low'])} to {pct(r['accuracy_high'])}"
    if curve := sparkline(t.curves.get("train/accuracy", ())):
        rows.append(["during training", curve, "", ""])
    title = f"{name} on {num(r['eval_pairs'])} held-out pairs"
    return Section(title, header=("", "", "accuracy", "95 % interval"), rows=rows, notes=notes)


def verdict(r: dict, below: str) -> list[str]:
    """On the accuracy. below: what to say if choosing the longer answer does better. Older results lack the counts: nothing is said."""
    if "beats_longer" not in r:
        return []
    won, lost = r["beats_longer"], r["loses_to_longer"]
    if sign_test(won, lost) > 0.05:
        return ["It cannot be told from choosing the longer answer: more pairs or more training may help."]
    return ["It beats choosing the longer answer." if won > lost else below]


def sign_test(won: int, lost: int) -> float:
    """Two-sided p-value of the exact sign test: how often a fair coin falls at least as unevenly."""
    n = won + lost
    return min(1.0, sum(math.comb(n, k) for k in range(min(won, lost) + 1)) / 2 ** (n - 1)) if n else 1.0


def calibration_notes(r: dict) -> list[str]:
    notes, bins = [], r["calibration"]
    total = sum(b["n"] for b in bins)
    if total >= CALIBRATION_PAIRS:
        surest = max(bins, key=lambda b: b["confidence"])
        error = sum(abs(b["confidence"] - b["accuracy"]) * b["n"] for b in bins) / total
        sure, right = pct(surest["confidence"], digits=0), pct(surest["accuracy"], digits=0)
        notes.append(f"Calibration: when it is {sure} sure, it is right {right} of the time; off by {100 * error:.1f} points on average.")
    return notes


def ppo_sections(t: Trained, sft_steps: int | None) -> list[Section]:
    before, after, prompts = t.result["before"], t.result["after"], t.result["eval_prompts"]
    lines = [
        ("score", "score", "eval/score", num),
        ("KL to SFT", "kl", "objective/kl", num),
        ("length (tokens)", "length", "rollout/response_length_mean", num),
        ("truncated", "truncated_rate", "rollout/truncated_rate", pct),
        ("judge", "judge", "eval/judge", num),
    ]
    rows = [
        change_row(label, before[key], after[key], t.curves.get(curve, ()), show, errors_of(key, before, after))
        for label, key, curve, show in lines
    ]
    if before["judge"] is None and after["judge"] is None:
        rows.pop()  # only the toy data set has a judge
    notes = ["Held-out scores are without ppo.score_clip and ppo.missing_eos_penalty; the progress lines include both."]
    if both(errors_of("score", before, after)):
        notes.append("± is one standard error, over the held-out prompts.")
    notes += ppo_notes(before, after, prompts, sft_steps, actor_rate(t.step))
    return [Section(f"PPO on {num(prompts)} held-out prompts", header=CHANGE_HEADER, rows=rows, notes=notes), *sample_sections(t.result)]


def errors_of(key: str, before: dict, after: dict) -> list[float | None]:
    return [facts.get(f"{key}_se") for facts in (before, after)]


def change_of(key: str, before: dict, after: dict, prompts: int) -> float:
    """after - before; 0 if chance explains it: within two standard errors, or on few prompts if no error is known."""
    if None in (before[key], after[key]):  # the judge, which only the toy data set has
        return 0.0
    change, error = after[key] - before[key], both(errors_of(key, before, after))
    sure = prompts >= SURE_PROMPTS if error is None else abs(change) > 2 * error
    return change if sure else 0.0


def ppo_notes(before: dict, after: dict, prompts: int, sft_steps: int | None, rate: str) -> list[str]:
    """What an experienced eye would see in these numbers."""
    score, judge, length = (change_of(key, before, after, prompts) for key in ("score", "judge", "length"))
    notes = []
    if score < 0:
        fall = with_error(num(-score), both(errors_of("score", before, after)))
        notes.append(f"The score fell by {fall}: try a smaller {rate} or ppo.kl_coef, or more iterations.")
    if score > 0 > judge:
        notes.append("The score rose while the judge fell: the actor exploits the reward model. Try a larger ppo.kl_coef.")
    if score > 0 and length > 0.5 * before["length"]:
        notes.append("The answers grew much longer along with the score: read the samples before you trust it.")
    few = sft_steps is not None and sft_steps < SFT_STEPS
    if after["truncated_rate"] > (0.5 if few else 0.2):  # after a few steps of SFT, some are no news
        why = f", after only {num(sft_steps)} SFT step{'s' * (sft_steps > 1)}" if few and sft_steps else ""
        notes.append(f"Many answers never end{why}: raise ppo.missing_eos_penalty or model.max_response_tokens.")
    return notes


def sample_sections(result: dict) -> list[Section]:
    def head(sample: dict, who: str) -> str:
        judge = sample[f"{who}_judge"]
        return f"{who.upper()}: score {num(sample[f'{who}_score'])}" + (f", judge {num(judge)}" if judge is not None else "")

    def asked(sample: dict) -> str:
        earlier = len(json.loads(sample.get("earlier", "[]")))  # older results do not have them
        return f"Prompt (after {earlier} earlier turn{'s' * (earlier > 1)}): " if earlier else "Prompt: "

    return [
        Section(
            f"Sample {number}",
            intro=asked(sample) + sample["prompt"],
            header=(head(sample, "sft"), head(sample, "ppo")),
            rows=[[sample["sft"], sample["ppo"]]],
        )
        for number, sample in enumerate(result["samples"], start=1)
    ]


def places_section(trained: Sequence[Trained], run_dir: Path) -> Section:
    places, note = [("this summary", short(run_dir / "summary.md"))], "Next to each model: config.yaml, metrics.jsonl, logs/, checkpoints/."
    for t in trained:
        # Where they are now: the store may have been moved since
        exports = {part: t.step.folder / Path(path).name for part, path in t.result.get("exports", {}).items() if path}  # PPO's
        beside = {part: t.step.folder / part for part in ("model_best", "adapter") if (t.step.folder / part).exists()}
        models = {"given": t.step.model} if t.step.pinned else exports or {"model": t.step.model} | beside
        places += [(f"{t.step.stage} {part.replace('_', ' ')}", short(path)) for part, path in models.items()]
    return Section("Where it is", notes=[note] if any(t.result for t in trained) else (), literal=places)


def next_section(trained: Sequence[Trained], overrides: Sequence[str], flags: Sequence[str], lacking: str | None) -> Section:
    steps = {t.step.stage: t.step for t in trained}
    last, commands, notes = trained[-1].step.stage, [], []
    talker = steps.get("ppo") or steps.get("dpo") or steps.get("sft")
    if talker:
        commands.append(("talk to it", f"python -m runner.chat {shlex.quote(short(talker.model))}"))
    if not steps[last].pinned:  # nothing would train what a sweep varies
        kept = [o for o in read_by(last, overrides) if override_key(o) != "resume"]  # a sweep refuses resume=force
        swept = repeat(kept, to_try(last, overrides))
        commands.append(("change something", command_line(*flags, "-m", *swept)))
    if last in ("sft", "reward") and feeds_the_rest(trained):
        if lacking:
            notes.append(f"To train the rest, stage=ppo, also type {lacking}=...: reward model and actor must have the same tokenizer.")
        else:
            commands.append(("train the rest", command_line(*flags, *repeat(read_by("ppo", overrides), "stage=ppo"))))
    for step in steps.values():
        if not step.pinned and any(step.folder.glob("wandb/offline-run-*")):
            commands.append((f"{step.stage} to W&B", f"wandb sync {shlex.quote(short(step.folder))}/wandb/offline-run-*"))
    return Section("Next", notes=notes, literal=commands)


def to_try(stage: str, overrides: Sequence[str]) -> str:
    """What a sweep may vary next: not the epochs, where max_steps ends the training before them."""
    most = next((o.partition("=")[2] for o in overrides if override_key(o) == f"{stage}.max_steps"), "")
    return f"{stage}.max_steps={most},{2 * int(most)}" if most.isdigit() and ".epochs=" in TRY_NEXT[stage] else TRY_NEXT[stage]


def read_by(stage: str, overrides: Sequence[str]) -> list[str]:
    """Overrides as they were typed, without those for blocks that this stage does not have: a job of a sweep over stages may hold some."""
    others = {other for other in STAGES if other not in (stage, *PARENTS[stage])}
    return [o.removeprefix("++") for o in overrides if "." not in override_key(o) or override_key(o).partition(".")[0] not in others]


def lacking_for_ppo(model: Model) -> str | None:
    """The key of the random one of two models of which the other is pretrained: a tokenizer that the data trains is not the other's."""
    random = [part for part in ("actor", "reward") if getattr(model, part).random]
    return f"model.{random[0]}.path" if len(random) == 1 else None


def feeds_the_rest(trained: Sequence[Trained]) -> bool:
    """Whether the data has rows for reward model and PPO, as far as this run has counted them."""
    counted = [t.result["data"]["owned"] for t in trained if t.result]
    return all(owned.get("reward") and owned.get("ppo") for owned in counted)


def repeat(overrides: Sequence[str], *new: str) -> list[str]:
    """The overrides of this run, with new ones replacing those for the same keys."""
    keys = {override_key(n) for n in new}
    return [o for o in overrides if override_key(o) not in keys] + list(new)


def override_key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def command_line(*words: str) -> str:
    return shlex.join(["python", short(Path(__file__).parents[2] / "run.py"), *words])
