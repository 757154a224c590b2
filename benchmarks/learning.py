"""Does it learn, not only run? Toy: 5 seeds, ppo_epochs 1 and 4, against the judge. HH dialogues: 3 seeds, as they come.

    python benchmarks/learning.py toy                                              # about 30 minutes on 2 cores
    python benchmarks/learning.py hh --data /data/hh_helpful_pairs.jsonl.gz        # about 30 minutes on 2 cores

Every run is a plain `python run.py`; results are read from its step folders. Prints a Markdown table and, for toy, whether
the judge's score after PPO beats SFT for every seed, reward accuracy is above 0.9 and the KL stays under 30.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["toy", "hh"])
    parser.add_argument("--data", help="hh: preference pairs, .jsonl.gz")
    parser.add_argument("--seeds", type=int, help="number of seeds: toy 5, hh 3 unless told")
    parser.add_argument("--store", default="runs/store")
    parser.add_argument("--out", help="write the rows as JSON")
    parser.add_argument("overrides", nargs="*", help="more overrides for run.py")
    options = parser.parse_intermixed_args()
    seeds = range(1, 1 + (options.seeds or {"toy": 5, "hh": 3}[options.task]))
    task = ["dataset=toy"] if options.task == "toy" else [*HH, f"dataset.path={options.data}"]
    epochs = (1, 4) if options.task == "toy" else (1,)
    rows = [run(options, [*task, f"seed={seed}", f"ppo.ppo_epochs={n}"], seed, n) for seed in seeds for n in epochs]
    print(table(rows))
    if options.task == "toy":
        print(verdict(rows))
    if options.out:
        Path(options.out).write_text(json.dumps(rows, indent=2))


# Real dialogues; one evaluation of 128 prompts is enough to see the direction
HH = ["dataset=jsonl", "ppo.eval_prompts=128", "ppo.calibration_prompts=128"]


def run(options, overrides: list[str], seed: int, epochs: int) -> dict:
    command = [
        sys.executable,
        str(ROOT / "run.py"),
        "name=learning",
        "wandb.mode=disabled",
        f"store={options.store}",
        *overrides,
        *options.overrides,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    print(f"seed {seed} epochs {epochs}: exit code {done.returncode}", file=sys.stderr, flush=True)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return {"seed": seed, "ppo_epochs": epochs, "failed": True}
    summary = max((ROOT / "runs" / "learning").glob("*/summary.json"), key=lambda p: p.stat().st_mtime)
    facts = json.loads(summary.read_text())
    kls = [
        json.loads(line).get("objective/kl", 0.0) for line in (Path(facts["ppo/model"]).parent / "metrics.jsonl").read_text().splitlines()
    ]
    return {"seed": seed, "ppo_epochs": epochs, "failed": False, "kl_max": max(kls), **facts}


COLUMNS = {
    "SFT perplexity": "{sft/perplexity_before:.0f} -> {sft/perplexity_after:.2f}",
    "RM accuracy (95 %)": "{reward/accuracy:.3f} ({reward/accuracy_low:.3f}-{reward/accuracy_high:.3f})",
    "longer is better": "{reward/longer_is_better:.3f}",
    "score": "{ppo/before/score:+.2f} -> {ppo/after/score:+.2f}",
    "KL (most)": "{ppo/after/kl:.1f} ({kl_max:.1f})",
    "length": "{ppo/before/length:.0f} -> {ppo/after/length:.0f}",
    "judge": "{ppo/before/judge:+.3f} -> {ppo/after/judge:+.3f}",
}


def table(rows: list[dict]) -> str:
    columns = {k: v for k, v in COLUMNS.items() if k != "judge" or any(r.get("ppo/after/judge") is not None for r in rows)}
    lines = ["| seed | ppo_epochs | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for row in rows:
        cells = ["failed"] if row["failed"] else [_fill(pattern, row) for pattern in columns.values()]
        lines.append(f"| {row['seed']} | {row['ppo_epochs']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _fill(pattern: str, row: dict) -> str:
    """str.format without its reading of '/' and dots in names."""
    names = {key.replace("/", "_"): value for key, value in row.items()}
    return pattern.replace("/", "_").format(**names)


def verdict(rows: list[dict]) -> str:
    good = [r for r in rows if not r["failed"]]
    beats = sum(r["ppo/after/judge"] > r["ppo/before/judge"] for r in good)
    return (
        f"\nno failure: {len(good)} of {len(rows)}; judge after PPO beats SFT: {beats} of {len(rows)}; lowest RM accuracy: "
        f"{min(r['reward/accuracy'] for r in good):.3f}; largest KL: {max(r['kl_max'] for r in good):.1f}"
    )


if __name__ == "__main__":
    main()
