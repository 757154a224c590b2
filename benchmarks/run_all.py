"""All speed benchmarks in one command: writes rows.jsonl, and redraws the tables and the plot of RESULTS.md.

    python benchmarks/run_all.py                 # on a GPU, about ten minutes
    python benchmarks/run_all.py --only decode   # the other rows stay as they are
    python benchmarks/run_all.py --only          # draws again what rows.jsonl holds
    python benchmarks/run_all.py --tiny --folder /tmp/try

Each benchmark is a process of its own, with --limit seconds; what it has measured by then counts.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from draw import insert, plot, tables

HERE = Path(__file__).parent
BENCHMARKS = ("ppo_step", "decode", "sft", "reward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(BENCHMARKS), choices=BENCHMARKS, help="which to run; none: draw only")
    parser.add_argument("--folder", type=Path, default=HERE, help="where rows.jsonl, RESULTS.md and speed.svg lie")
    parser.add_argument("--limit", type=float, default=400, help="seconds for each benchmark")
    parser.add_argument("--tiny", action="store_true", help="see ppo_step.py")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    path = args.folder / "rows.jsonl"
    failed = [name for name in args.only if not run(name, path, args)]
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    (args.folder / "speed.svg").write_text(plot(rows))
    insert(args.folder / "RESULTS.md", tables(rows) + "\n\n![decoding and PPO](speed.svg)")
    if failed:
        sys.exit(f"error: {', '.join(failed)} did not end well; what they had measured is kept")


def run(name: str, path: Path, args) -> bool:
    """New rows of a benchmark in place of its old ones. Without a new one the old ones stay."""
    fresh = path.with_name(f"{name}.rows")
    fresh.unlink(missing_ok=True)
    print(f"--- {name}", flush=True)
    command = [sys.executable, str(HERE / f"{name}.py"), "--out", str(fresh), *(["--tiny"] if args.tiny else [])]
    try:
        well = subprocess.run(command, timeout=args.limit).returncode == 0
    except subprocess.TimeoutExpired:
        well = False
    if fresh.exists():
        old = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in old if json.loads(line)["benchmark"] != name]
        path.write_text("\n".join([*kept, *fresh.read_text().splitlines()]) + "\n")
        fresh.unlink()
    return well


if __name__ == "__main__":
    main()
