"""Does a run survive anything? Random blows at random moments in every stage, and a resume after each; then nothing may be missing.

    python benchmarks/faults.py --blows 200 --jobs 2 --out faults.json        # about 30 minutes on 2 cores

A trial trains one stage to its end under a row of blows, with a plain `python run.py` after each. Its metrics.jsonl (all but what the
clock decides) and its exported weights must then be those of a run that nobody disturbed, bit for bit. Prints a Markdown table.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from runner.metrics import CLOCK

ROOT = Path(__file__).parent.parent
# Small and quick, with every part that has a state
COMMON = ["experiment=debug", "debug=false", "name=faults", "dataset.toy_rows=3000", "model.max_response_tokens=16", "seed=7"]
COMMON += ["checkpoint.every=1", "hardware.micro_batch={sft: 8, reward: 8, ppo: 4, rollout: 8, score: 8}"]
SFT = ["stage=sft", "sft.max_steps=10", "sft.eval_every=4", "sft.dropout=0.1"]
REWARD = ["stage=reward", "reward.max_steps=10", "reward.eval_every=4", "checkpoint.keep_best=1"]
PPO = ["ppo.max_steps=5", "ppo.eval_every=2", "ppo.rollout_batch=32", "ppo.eval_prompts=8", "ppo.calibration_prompts=8"]
PPO += ["ppo.ppo_epochs=2", "ppo.ema_decay=0.9"]
PPO += ["ppo.ptx_coef=0.5", "ppo.kl_target=1.0", "ppo.kl_horizon=100"]
TWO = ["hardware=cpu2", "hardware.zero={actor: 2, critic: 3}"]
CASES = {"sft": SFT, "reward": REWARD, "ppo": PPO, "sft, 2 ranks": [*SFT, *TWO], "ppo, 2 ranks": [*PPO, *TWO]}

BLOWS = ("SIGKILL to all workers", "SIGKILL to one worker", "SIGKILL to the launcher", "SIGKILL to everything", "SIGTERM to the launcher")
MOMENTS = ("start", "training", "save", "export")
# A blow whose moment does not come is no blow
PATIENCE = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blows", type=int, default=200, help="how many at least")
    parser.add_argument("--jobs", type=int, default=1, help="trials side by side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="write the trials as JSON")
    options = parser.parse_args()
    with TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        references = {case: undisturbed(Path(folder), case) for case in CASES}
        trials: list[Trial] = []
        number, cases = 0, list(CASES)
        while (missing := options.blows - sum(len(t.blows) for t in trials)) > 0:
            # Each trial brings four blows or so
            batch = range(number, number + max(options.jobs, missing // 4))
            number = batch.stop
            trials += pool.map(lambda n: trial(Path(folder), cases[n % len(cases)], references, options.seed, n), batch)
    print(table(trials))
    if options.out:
        Path(options.out).write_text(json.dumps([vars(t) for t in trials], indent=2))
    sys.exit(any(t.lost for t in trials))


# --- one run ----------------------------------------------------------------------------------------------------------


def start(store: Path, case: str, parents: list[str]) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "run.py"), *COMMON, *CASES[case], *parents, f"store={store}", f"hydra.run.dir={store}/run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = (store / "run.log").open("a")
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def step_folder(store: Path, case: str) -> Path | None:
    return next((p.parent for p in store.glob(f"{case.split(',')[0]}-*/step.json")), None)


def results(store: Path, case: str) -> dict:
    """What a finished run must leave: the lines of metrics.jsonl without times, and every exported weight, as text."""
    folder = step_folder(store, case)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {"metrics": json.dumps([{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in rows])}
    return found | {str(p.relative_to(folder)): p.read_bytes().hex() for p in sorted(folder.glob("*/model.safetensors"))}


def undisturbed(folder: Path, case: str) -> tuple[Path, dict, list[str]]:
    """(store, results, overrides that pin the parents) of a run that nobody disturbs."""
    store = folder / case.replace(", ", "-")
    store.mkdir()
    code = start(store, case, []).wait()
    assert code == 0, (store / "run.log").read_text()
    parents = [f"{stage}.use={p}/model" for stage in ("sft", "reward") for p in store.glob(f"{stage}-*")] if case.startswith("ppo") else []
    print(f"{case}: undisturbed run done", file=sys.stderr, flush=True)
    if parents:  # once more with pinned parents, whose names are in the results
        second = folder / (store.name + "-pinned")
        second.mkdir()
        share_inputs(store, second)
        assert start(second, case, parents).wait() == 0, (second / "run.log").read_text()
        store = second
    return store, results(store, case), parents


def share_inputs(source: Path, store: Path) -> None:
    """Tokenised data and shapes of random models: to make them anew would only take time."""
    for name in ("data", "base"):
        shutil.copytree(source / name, store / name)


# --- blows ------------------------------------------------------------------------------------------------------------


@dataclass
class Trial:
    case: str
    number: int
    blows: list[tuple[str, str]] = field(default_factory=list)  # (what, when)
    lost: list[str] = field(default_factory=list)  # what differs from the undisturbed run
    resumes: int = 0


def trial(folder: Path, case: str, references: dict, seed: int, number: int) -> Trial:
    rng = random.Random(seed * 1_000_003 + number)
    source, expected, parents = references[case]
    made, store = Trial(case, number), folder / f"trial-{number}"
    store.mkdir()
    share_inputs(source, store)
    for _ in range(rng.randint(3, 6)):
        what = rng.choice([b for b in BLOWS if "one worker" not in b or "2 ranks" in case])
        when = rng.choice(MOMENTS)
        process = start(store, case, parents)
        if wait_for(when, store, case, process, rng) and process.poll() is None:
            strike(what, process)
            made.blows.append((what, when))
            made.resumes += bool(checkpoints(store, case))
        code = end(process)
        if code == 0:
            break
    code = end(start(store, case, parents))
    if code != 0:
        made.lost = [f"exit code {code}: {(store / 'run.log').read_text()[-1500:]}"]
    else:
        found = results(store, case)
        made.lost = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    print(f"trial {number} ({case}): {len(made.blows)} blows, {made.lost or 'nothing lost'}", file=sys.stderr, flush=True)
    if not made.lost:
        shutil.rmtree(store)
    return made


def checkpoints(store: Path, case: str) -> list[Path]:
    folder = step_folder(store, case)
    return [p for p in (folder / "checkpoints").glob("step_*/manifest.json") if ".tmp" not in str(p)] if folder else []


def wait_for(when: str, store: Path, case: str, process: subprocess.Popen, rng: random.Random) -> bool:
    """Wait until the moment has come, and a little longer. Returns False if the run ended first."""
    if when == "start":
        time.sleep(rng.uniform(0, 8))
        return True
    lines, deadline = count_lines(step_folder(store, case)) + rng.randint(1, 5), time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        if has_come(when, step_folder(store, case), lines):
            time.sleep(rng.uniform(0, {"training": 0.3, "save": 0.02, "export": 0.1}[when]))
            return True
        time.sleep(0.001)
    return False


def has_come(when: str, folder: Path | None, lines: int) -> bool:
    if folder is None:
        return False
    if when == "training":
        return count_lines(folder) >= lines
    if when == "save":
        return any((folder / "checkpoints").glob("*.tmp"))
    return any(folder.glob("*.tmp")) or (folder / "model").exists()


def count_lines(folder: Path | None) -> int:
    path = folder / "metrics.jsonl" if folder else None
    return path.read_bytes().count(b"\n") if path and path.exists() else 0


def strike(what: str, process: subprocess.Popen) -> None:
    with suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(process.pid)
        below = launcher.children(recursive=True)
        workers = [p for p in below if is_worker(p)]
        victims = {
            "SIGKILL to all workers": workers,
            "SIGKILL to one worker": workers[-1:],
            "SIGKILL to the launcher": [launcher],
            "SIGKILL to everything": [launcher, *below],
            "SIGTERM to the launcher": [launcher],
        }[what]
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGTERM if "SIGTERM" in what else signal.SIGKILL)


def is_worker(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        words = process.cmdline()
        return "runner.worker" in words and "torch.distributed.run" not in words
    return False


def end(process: subprocess.Popen) -> int:
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


# --- the table --------------------------------------------------------------------------------------------------------


def table(trials: list[Trial]) -> str:
    counts = Counter((t.case, when) for t in trials for _, when in t.blows)
    whats = Counter(what for t in trials for what, _ in t.blows)
    lines = ["| | " + " | ".join(MOMENTS) + " | trials | differences |", "|---" * (len(MOMENTS) + 3) + "|"]
    for case in CASES:
        mine = [t for t in trials if t.case == case]
        cells = [str(counts[case, when]) for when in MOMENTS]
        lines.append(f"| {case} | {' | '.join(cells)} | {len(mine)} | {sum(bool(t.lost) for t in mine)} |")
    total, resumes = sum(len(t.blows) for t in trials), sum(t.resumes for t in trials)
    said = ", ".join(f"{n} x {what}" for what, n in whats.most_common())
    lost = sum(bool(t.lost) for t in trials)
    return (
        "\n".join(lines)
        + f"\n\n{total} blows ({said}), {resumes} of them on a step with a checkpoint; {lost} of {len(trials)} trials differ."
    )


if __name__ == "__main__":
    main()
