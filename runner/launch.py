"""Start the workers of a step, show what they print, and explain why they failed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import deque
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf

from runner import faults
from runner.checks.secrets import kind_of_secret, redact
from runner.config.schema import STAGES, Config
from runner.deepspeed_config import engine_configs
from runner.durable.lock import lock
from runner.durable.manifest import steps_done
from runner.durable.resume import adopt, write_facts
from runner.errors import UserError
from runner.files import write_text
from runner.launch_command import command
from runner.plan import Step
from runner.watch import machine, stop
from runner.worker import ENVIRONMENT, LAUNCHER_PID, WORKERS_LOCK

ROOT = Path(__file__).parent.parent
# Set by a surrounding torchrun or srun: our workers must not inherit them
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
# Prefixes of the variables that workers need on every machine. Over ssh DeepSpeed passes on PYTHONPATH, NCCL's and little else
INHERITED = ("HF_", "TRANSFORMERS_", "TOKENIZERS_", "WANDB_", "OMP_", "GOMP_", "DS_ACCELERATOR", "GLOO_", "TORCH_", "PYTORCH_", "TRITON_")
INHERITED += ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")


def launch(cfg: Config, step: Step, inputs: dict | None, run_dir: Path) -> bool:
    """Train a step unless it is done. Returns True if it was trained here, False if it existed or another job trained it.

    Raises:
        UserError: the workers failed, also after `max_restarts` restarts; the message gives the cause.
        Stopped: a signal or the time limit stopped the step, which has saved its state.
    """
    if step.pinned:
        return False
    if step.done:  # no lock: the store may be somebody else's, and read-only
        _link(run_dir / step.stage, step.folder)
        with suppress(OSError):
            os.utime(step.folder / "DONE")  # runner/store.py says when a step was last used
        return False
    with lock(Path(cfg.store).absolute() / "locks" / step.folder.name, f"step {step.folder.name}") as held:
        _link(run_dir / step.stage, step.folder)
        if step.done:
            return False
        _await_orphans(step)
        if step.done:
            return False
        for restart in range(1, cfg.max_restarts + 2):
            stop.check(step.stage)
            _write_inputs(cfg, step, inputs)
            killed = machine.oom_kills()
            code, lines = _run(cfg, step, held)
            if step.done:
                return True
            _raise_if_stopped(step)
            kills = None if killed is None else machine.oom_kills() - killed
            fault = faults.explain(faults.Crash(cfg, step, code, lines, kills))
            if fault.repeats or restart > cfg.max_restarts or stop.heard():
                raise UserError(fault.text)
            print(f"{step.stage}: {fault.what}. Restart {restart} of {cfg.max_restarts}, from the newest checkpoint", file=sys.stderr)


def _await_orphans(step: Step) -> None:
    """Wait for workers of a killed launcher: they die with it, but one that is writing to disk dies only when that is done."""
    with lock(step.folder / WORKERS_LOCK, f"the workers of an earlier run of {step.folder.name}"):
        pass


def _raise_if_stopped(step: Step) -> None:
    """Rank 0 leaves a note when the stage was stopped: torchrun does not pass its exit code on."""
    note = step.folder / stop.NOTE
    if note.exists():
        facts = json.loads(note.read_text())
        at = f"at step {facts['step']} of {facts['total']}"
        if facts["reason"] == stop.reason(stop.TIME_IS_UP):
            raise stop.out_of_time(f"{at} of {step.stage}")
        raise stop.Stopped(f"{step.stage}: stopped by {facts['reason']} {at}; the same command resumes from there")


def _link(name: Path, target: Path) -> None:
    """runs/<name>/<time>/sft -> the step's folder in the store. A convenience: if it fails, nothing is lost."""
    with suppress(OSError):
        name.parent.mkdir(parents=True, exist_ok=True)
        name.symlink_to(target)


def _write_inputs(cfg: Config, step: Step, inputs: dict) -> None:
    """Write everything the workers read: config.yaml, step.json, environment.json. ds_config.json is for people."""
    logs = step.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for old in (*logs.glob("error_rank*.json"), *logs.glob("rank_*.alive"), step.folder / stop.NOTE):
        old.unlink(missing_ok=True)
    if step.earlier and cfg.resume == "force" and steps_done(step.folder) is None:
        adopt(step.folder, step.key, step.earlier)
    write_facts(step.folder, cfg.name, step.facts)
    facts = {"stage": step.stage, "key": step.key, "parents": step.parents, **inputs}
    write_text(step.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(asdict(cfg))))
    write_text(step.folder / "step.json", json.dumps(facts, indent=2))
    write_text(step.folder / ENVIRONMENT, json.dumps(inherited(_environment(cfg)), indent=2))
    write_text(step.folder / "ds_config.json", json.dumps(engine_configs(cfg, step.stage), indent=2))


def inherited(environment: dict[str, str]) -> dict[str, str]:
    """The part of an environment that workers on all machines get, without anything that looks like a secret: it is written to a file."""
    wanted = {name: value for name, value in environment.items() if name.startswith(INHERITED) and not name.endswith(SECRET)}
    return {name: value for name, value in wanted.items() if not kind_of_secret(f"{name}={value}")}


def _environment(cfg: Config) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    # The workers' code is the launcher's, whatever is called `runner` in the folder that we were called from
    environment["PYTHONSAFEPATH"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Find ninja and torchrun of this environment even when its python was called by its full path
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    # With more threads than cores, gloo ranks are 5 to 10 times slower
    environment.setdefault("OMP_NUM_THREADS", str(max(1, machine.cores() // cfg.hardware.gpus)))
    machine.share_cores(environment)
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    # torchrun passes these signals on and gives the workers 600 s to save. By default: no SIGUSR1, and 30 s
    environment["PET_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    environment["PET_SHUTDOWN_TIMEOUT"] = "600"
    if cfg.hardware.launch.startswith(("{python}", "env ")):  # not through srun, ssh or a container, where process ids differ
        environment[LAUNCHER_PID] = str(os.getpid())
    if cfg.hardware.accelerator == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def _run(cfg: Config, step: Step, held: int) -> tuple[int, list[str]]:
    """Run the workers; their output goes to logs/rank_0.log and the console. Returns exit code (negative: a signal) and last lines."""
    # On several nodes the command is srun or ssh, which needs a chance to end its remote processes
    last_wish = signal.SIGKILL if cfg.hardware.nodes == 1 else signal.SIGTERM
    launcher = os.getpid()

    def prepare_child() -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until it installs its own handler
        stop.die_with_parent(last_wish, launcher)

    with stop.running(step.folder):
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command(cfg, step.folder)}"],
            env=_environment(cfg),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=(held,),
            start_new_session=True,
            preexec_fn=prepare_child,
        )
        try:
            with (step.folder / "logs" / "rank_0.log").open("a") as log:
                last = _relay(process.stdout, log)
            return process.wait(), last
        finally:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    """End the workers with us, also those that merely note a SIGTERM. Those of torchrun die with it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(2)


def _relay(lines, log) -> list[str]:
    """Copy all lines to the log, and our own ones ("[sft] ...") to the console. Returns the last lines.

    A line that starts with '~' reports progress: on a terminal each overwrites the one before.
    """
    live, columns = sys.stdout.isatty(), shutil.get_terminal_size().columns
    pending, last = False, deque(maxlen=200)
    for line in map(redact, lines):
        last.append(line.rstrip("\n"))
        with suppress(OSError):  # on a full disk the workers fail; we must live on to say so
            log.write(line)
            log.flush()
        progress = line.startswith("~[")
        text = line.removeprefix("~").rstrip("\n")
        if not text.startswith(tuple(f"[{stage}]" for stage in STAGES)):
            continue
        try:
            if live:
                print(f"\r\x1b[K{text[: columns - 1] if progress else text}", end="" if progress else "\n", flush=True)
            else:
                print(text, flush=True)
        except BrokenPipeError:  # the same Ctrl-C ended `| tee`, and the workers have yet to save
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        pending = progress
    if live and pending:
        print()
    return list(last)
