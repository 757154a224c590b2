"""Real model shapes with random weights through all three stages on one GPU: does it work, how fast, how much memory.

    python benchmarks/shapes.py hardware=h200 dataset.path=/data/hh_helpful_pairs.jsonl.gz --out results.json

No hub is needed: weights are made up on the spot and the tokenizer is trained on the data. Prints one row per shape and stage.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
RANDOM = ["model.actor.init=random", "model.reward.init=random"]
# LLaMA has no small hub model; this is the width and depth of OPT-350M with grouped-query attention
SMALL_LLAMA = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8}
SHAPES = {
    "opt1.3b": ["model=opt1.3b"],
    "bloom560m": ["model=bloom560m"],
    "llama350m": ["model=llama7b", *(f"model.{part}.shape.{k}={v}" for part in ("actor", "reward") for k, v in SMALL_LLAMA.items())],
    "pythia410m": ["model=pythia410m"],
}
SHORT = [
    "sft.max_steps=6",
    "reward.max_steps=6",
    "ppo.max_steps=3",
    "sft.eval_examples=32",
    "reward.eval_examples=32",
    "ppo.eval_prompts=32",
]
COMMON = ["dataset=jsonl", "stage=ppo", "wandb.mode=disabled", "checkpoint.every=0", "name=shapes", *RANDOM, *SHORT]


def main(arguments: list[str]) -> None:
    out = Path(arguments[arguments.index("--out") + 1]) if "--out" in arguments else None
    names = [a for a in arguments if a in SHAPES] or list(SHAPES)
    overrides = [a for a in arguments if "=" in a]
    print(f"{'shape':<12}{'stage':<8}{'tokens/s':>10}{'peak GB':>9}{'s/step':>8}{'s in all':>9}   phases of the median step, s", flush=True)
    rows = []
    for name in names:
        for row in measure(name, overrides):
            rows.append(row)
            numbers = f"{row['tokens_per_sec']:>10.0f}{row['peak_gb']:>9.1f}{row['step']:>8.2f}{row['seconds']:>9.0f}"
            print(f"{row['shape']:<12}{row['stage']:<8}{numbers}   {row['phases']}", flush=True)
    if out:
        out.write_text(json.dumps(rows, indent=2))


def measure(name: str, overrides: list[str]) -> list[dict]:
    """Run the three stages of one shape; the medians leave out the first step, which warms up."""
    with tempfile.TemporaryDirectory() as store:
        command = [sys.executable, str(ROOT / "run.py"), *SHAPES[name], *COMMON, f"store={store}", *overrides]
        done = subprocess.run(command, text=True, capture_output=True)
        if done.returncode:
            print(f"{name} failed:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}", flush=True)
            return []
        return [summarise(name, folder) for stage in ("sft", "reward", "ppo") for folder in Path(store).glob(f"{stage}-*")]


def summarise(name: str, folder: Path) -> dict:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "perf/tokens_per_sec" in line][1:]

    def median(key: str) -> float:
        return statistics.median(line[key] for line in steps if key in line)

    phases = {key.removeprefix("time/"): round(median(key), 2) for key in steps[0] if key.startswith("time/") and key != "time/step"}
    return {
        "shape": name,
        "stage": folder.name.split("-")[0],
        "tokens_per_sec": median("perf/tokens_per_sec"),
        "peak_gb": max(line["perf/gpu_mem_peak_gb"] for line in steps) if "perf/gpu_mem_peak_gb" in steps[0] else 0.0,
        "step": median("time/step"),
        "seconds": json.loads((folder / "result.json").read_text())["seconds"],
        "phases": phases,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
