"""Starting the workers of a step, showing what they print, and saying why they ended when they failed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf

from runner.config import Config
from runner.errors import UserError
from runner.lock import lock
from runner.plan import Step, command, engine_configs
from runner.resume import adopt, write_facts

ROOT = Path(__file__).parent.parent
# Set by a surrounding torchrun or srun: a worker must not take them for its own
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def launch(cfg: Config, step: Step, inputs: dict | None, run_dir: Path) -> bool:
    """Train a step unless it is done. Returns True if it was trained here, False if it was there or another job made it.

    Raises UserError when the workers fail, with the cause.
    """
    if step.pinned:
        return False
    with lock(Path(cfg.store).expanduser().absolute() / "locks" / step.folder.name, f"step {step.folder.name}") as held:
        _link(run_dir / step.stage, step.folder)
        if step.done:
            return False
        _write_inputs(cfg, step, inputs)
        code = _run(command(cfg, step.folder), step, _environment(cfg), held)
        if code != 0 or not step.done:
            raise UserError(explain(step, code, cfg.debug))
    return True


def _link(name: Path, target: Path) -> None:
    """runs/<name>/<time>/sft -> the step's folder in the store: a convenience, and no reason to fail."""
    with suppress(OSError):
        name.parent.mkdir(parents=True, exist_ok=True)
        name.symlink_to(target)


def _write_inputs(cfg: Config, step: Step, inputs: dict) -> None:
    """The worker's whole knowledge: config.yaml, step.json, ds_config.json."""
    logs = step.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    if step.earlier and cfg.resume == "force":
        adopt(step.folder, step.key, step.earlier)
    write_facts(step.folder, cfg.name, step.key, step.facts)
    for old in logs.glob("error_rank*.json"):
        old.unlink()
    OmegaConf.save(OmegaConf.create(asdict(cfg)), step.folder / "config.yaml")
    facts = {"stage": step.stage, "key": step.key, "parents": step.parents, **inputs}
    (step.folder / "step.json").write_text(json.dumps(facts, indent=2))
    (step.folder / "ds_config.json").write_text(json.dumps(engine_configs(cfg, step.stage), indent=2))


def _environment(cfg: Config) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # ninja and torchrun of this environment, also when its python was called by its full path
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    # More threads than cores slow gloo ranks down five- to tenfold
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // cfg.hardware.gpus)))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    if cfg.hardware.accelerator == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def _run(shell_command: str, step: Step, environment: dict[str, str], held: int) -> int:
    """Run the workers; their lines go to logs/rank_0.log and to our console. Returns the exit code, negative for a signal."""
    process = subprocess.Popen(
        ["bash", "-c", f"exec {shell_command}"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=(held,),
        start_new_session=True,
    )
    try:
        with (step.folder / "logs" / "rank_0.log").open("a") as log:
            _relay(process.stdout, log)
        return process.wait()
    finally:
        if process.poll() is None:  # we are leaving: take the whole group of workers along
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def _relay(lines, log) -> None:
    """Copy the workers' own lines to the console; those of libraries go to the log only.

    A line that begins with '~' reports progress: on a terminal each overwrites the one before.
    """
    live, columns = sys.stdout.isatty(), shutil.get_terminal_size().columns
    pending = False
    for line in lines:
        log.write(line)
        log.flush()
        progress = line.startswith("~[")
        if not progress and not line.startswith("["):
            continue
        text = line.removeprefix("~").rstrip("\n")
        if not text.startswith(("[sft]", "[reward]", "[ppo]")):
            continue
        if live:
            print(f"\r\x1b[K{text[: columns - 1] if progress else text}", end="" if progress else "\n", flush=True)
        else:
            print(text, flush=True)
        pending = progress
    if live and pending:
        print()


# --- why it failed ----------------------------------------------------------------------------------------------------

SIGNALS = {
    9: "was killed (-9), most likely by the kernel for want of memory: lower hardware.micro_batch, or offload less to the CPU",
    7: "died of a bus error (-7): shared memory is too small; in Docker add --shm-size=8g",
    11: "died of a segmentation fault (-11)",
    15: "was told to stop (SIGTERM); the same command goes on from the last checkpoint",
}


def explain(step: Step, code: int, full: bool) -> str:
    """One paragraph on why a step failed: the first error that a rank reported, or what the exit code means."""
    reports = [json.loads(path.read_text()) for path in sorted((step.folder / "logs").glob("error_rank*.json"))]
    if reports:
        first = min(reports, key=lambda r: r["time"])
        if first["user"] and not full:
            return f"{step.stage}: {first['message']}"
        tail = first["traceback"] if full else "\n".join(first["traceback"].strip().splitlines()[-3:])
        return f"stage {step.stage} failed on rank {first['rank']}: {first['message']}\n{tail}\nAll of it: {step.folder / 'logs'}"
    number = -code if code < 0 else code - 128
    what = SIGNALS.get(number, f"ended with exit code {code}" if code else "ended without finishing")
    last = _tail(step.folder / "logs" / "rank_0.log")
    return f"stage {step.stage}: a worker {what}.\nIts last lines:\n{last}\nAll of it: {step.folder / 'logs'}"


def _tail(path: Path, lines: int = 8) -> str:
    return "\n".join("  " + line for line in path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else "  (none)"
