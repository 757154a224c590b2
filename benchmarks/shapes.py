"""Real model shapes with random weights through all three stages on one GPU: does it work, how fast, how much memory.

    python benchmarks/shapes.py hardware=h200 dataset.path=/data/hh_helpful_pairs.jsonl.gz --out results.json
    python benchmarks/shapes.py opt1.3b --stages sft,reward --limit 300 hardware=h200 dataset.path=...

No hub is needed: weights are made up on the spot and the tokenizer is trained on the data. Prints the row of a stage as soon as its
steps are done, and writes it to --out at once. What comes after the last wanted stage's steps (checkpoint, evaluation, export:
minutes for 1.3B) is cut off. --limit: seconds per shape; what has been measured until then is printed.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
STAGES = ("sft", "reward", "ppo")
RANDOM = ["model.actor.path=null", "model.reward.path=null"]
# LLaMA has no small hub model; this is the width and depth of OPT-350M with grouped-query attention
SMALL_LLAMA = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8}
SHAPES = {
    "opt1.3b": ["model=opt1.3b"],
    "bloom560m": ["model=bloom560m"],
    "llama350m": ["model=llama7b", *(f"model.{part}.shape.{k}={v}" for part in ("actor", "reward") for k, v in SMALL_LLAMA.items())],
    "pythia410m": ["model=pythia410m"],
}
STEPS = {"sft": 20, "reward": 20, "ppo": 6}
SHORT = [*(f"{stage}.max_steps={n}" for stage, n in STEPS.items()), *(f"{stage}.eval_every=0" for stage in STEPS)]
SHORT += ["sft.eval_examples=8", "reward.eval_examples=8", "ppo.eval_prompts=8", "ppo.calibration_prompts=8"]
COMMON = ["dataset=jsonl", "wandb.mode=disabled", "checkpoint.every=0", "checkpoint.minutes=0", "name=shapes", *RANDOM, *SHORT]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help=f"shapes ({', '.join(SHAPES)}; default: all) and overrides for run.py")
    parser.add_argument("--stages", default=",".join(STAGES), help="stages to measure, comma-separated")
    parser.add_argument("--limit", type=float, default=900, help="seconds per shape")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    args = parser.parse_intermixed_args()
    # `timeout` must not leave the workers behind
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    stages = args.stages.split(",")
    if unknown := set(stages) - set(STAGES):
        parser.error(f"--stages {args.stages}: {', '.join(unknown)} is none of {', '.join(STAGES)}")
    shapes = [w for w in args.words if "=" not in w] or list(SHAPES)
    if unknown := set(shapes) - set(SHAPES):
        parser.error(f"unknown shape {', '.join(unknown)}: type some of {', '.join(SHAPES)}")
    print(f"{'shape':<12}{'stage':<8}{'tokens/s':>10}{'peak GB':>9}{'s/step':>8}{'s so far':>9}   phases of the median step, s", flush=True)
    rows = []
    for shape in shapes:
        for row in measure(shape, stages, [w for w in args.words if "=" in w], args.limit):
            rows.append(row)
            numbers = f"{row['tokens_per_sec']:>10.0f}{row['peak_gb']:>9.1f}{row['step']:>8.2f}{row['seconds']:>9.0f}"
            print(f"{row['shape']:<12}{row['stage']:<8}{numbers}   {row['phases']}", flush=True)
            if args.out:
                args.out.write_text(json.dumps(rows, indent=2))


def measure(shape: str, stages: list[str], overrides: list[str], limit: float) -> Iterator[dict]:
    """The rows of a shape, each as soon as it is known."""
    deadline = time.monotonic() + limit
    # PPO needs the exports of the other two; without it each stage is cut off after its last step
    for target, wanted in [("ppo", stages)] if "ppo" in stages else [(stage, [stage]) for stage in stages]:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as store:
            command = [sys.executable, str(ROOT / "run.py"), *SHAPES[shape], f"stage={target}", *COMMON, f"store={store}", *overrides]
            if target != "ppo":
                # Blocks that stage=sft does not have
                command = [w for w in command if w.partition(".")[0] not in set(STAGES) - {target}]
            yield from follow(shape, command, wanted, Path(store), deadline)


def follow(shape: str, command: list[str], wanted: list[str], store: Path, deadline: float) -> Iterator[dict]:
    """Run the command and give the row of each wanted stage when its steps are logged; kill it after the last one, or at the deadline."""
    started, left = time.monotonic(), list(wanted)
    with (store / "output").open("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while left:
                over = process.poll() is not None or time.monotonic() > deadline
                for stage in list(left):
                    steps = logged(store, stage)
                    if len(steps) >= STEPS[stage] or (over and len(steps) > 1):
                        left.remove(stage)
                        yield summarise(shape, stage, steps, time.monotonic() - started)
                if over and left:
                    output.seek(0)
                    why = f"ended with code {process.poll()}" if process.poll() is not None else "ran into --limit"
                    print(f"{shape}: {why} without {', '.join(left)}. Its last lines:\n{output.read()[-3000:]}", flush=True)
                    return
                time.sleep(0.5)
        finally:
            process.kill()  # the workers die with it
            process.wait()


def logged(store: Path, stage: str) -> list[dict]:
    """The rows of metrics.jsonl of the stage's finished steps; a line that is being written does not count yet."""
    lines = [line for path in store.glob(f"{stage}-*/metrics.jsonl") for line in path.read_text().split("\n")[:-1]]
    return [row for row in map(json.loads, lines) if "perf/tokens_per_sec" in row]


def summarise(shape: str, stage: str, steps: list[dict], seconds: float) -> dict:
    """Medians of the second half: every new number of tokens loads kernels and memory, and the first steps are full of them."""
    steps = steps[len(steps) // 2 :]

    def median(key: str) -> float:
        return statistics.median(step[key] for step in steps if key in step)

    phases = {key.removeprefix("time/"): round(median(key), 2) for key in steps[0] if key.startswith("time/") and key != "time/step"}
    return {
        "shape": shape,
        "stage": stage,
        "tokens_per_sec": median("perf/tokens_per_sec"),
        "peak_gb": max(step.get("perf/gpu_mem_peak_gb", 0.0) for step in steps),
        "step": median("time/step"),
        "seconds": seconds,
        "phases": phases,
    }


if __name__ == "__main__":
    main()
