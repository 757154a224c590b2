"""Stopping in good order: whoever asks (a signal, the launcher, the time limit), every rank hears of it at the same optimizer step.

The launcher listens for signals and tells rank 0 through a file, so that the workers and whatever started them (torchrun, srun,
ssh) need no signal. A worker that gets one itself, because SLURM signals everyone, only takes note of it. Imports no torch
before the workers have.
"""

import atexit
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from runner.errors import UserError

# Exit code of a command that was stopped in good order: typing it again goes on. 75, "temporary failure" in sysexits.h
RESUME_ME = os.EX_TEMPFAIL
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# The time limit counts from here: run.py imports this module first
STARTED = time.time()

# In the step folder: the launcher tells the workers, and rank 0 tells the launcher that it has stopped
STOP_FILE, LIMIT_FILE, NOTE = "logs/stop", "logs/deadline", "logs/stopped.json"
# Among the numbers of signals, that of the time limit
TIME_IS_UP = 1000


class Stopped(Exception):
    """The stage was asked to stop and has saved its state. args[0] says who asked."""


def reason(number: int) -> str:
    return "the time limit" if number == TIME_IS_UP else signal.Signals(number).name


# --- the worker's side ------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """What a worker knows about stopping. Times in seconds, `deadline` and `last` as time.time()."""

    folder: Path | None = None
    deadline: float = float("inf")
    unknown_save: float = 0.0  # what a save may take, as long as none was seen
    number: int = 0  # of the signal that came
    last: float | None = None  # end of the last call of `asked`
    longest_step: float = 0.0
    longest_save: float = 0.0


_watch = Watch()
# Kept free between the end of the save and the time limit, for the workers to leave
MARGIN = 5.0


def watch(folder: Path) -> None:
    """Worker: from now on signals are only noted, and `asked` knows the step folder and the time limit."""
    global _watch
    _watch = Watch(folder)
    limit = folder / LIMIT_FILE
    if limit.exists():
        _watch.deadline = float(limit.read_text())
        _watch.unknown_save = min(300.0, 0.05 * max(0.0, _watch.deadline - time.time()))
    for number in SIGNALS:
        signal.signal(number, _note)


def _note(number: int, frame: object) -> None:
    _watch.number = number


def asked() -> str | None:
    """Why the run should stop now, or None: the same answer on every rank. Collective; cheap enough for every optimizer step."""
    if _watch.folder is None:
        return None
    now = time.time()
    if _watch.last is not None:
        _watch.longest_step = max(_watch.longest_step, now - _watch.last)
    number = _largest(max(_watch.number, _from_launcher(), _time_is_up(now)))
    _watch.last = time.time()
    return reason(number) if number else None


def saving_took(seconds: float) -> None:
    """Tell how long a checkpoint took: as long is kept free at the end of the time limit."""
    _watch.longest_save = max(_watch.longest_save, seconds)
    if _watch.last is not None:
        _watch.last += seconds  # a save is no part of a step


def step_may_take(seconds: float) -> None:
    """Tell how long a step can become: an evaluation comes between two steps, and later than the limit is too late."""
    _watch.longest_step = max(_watch.longest_step, seconds)


def _largest(number: int) -> int:
    """The largest of all ranks' numbers. On the CPU, through gloo: the GPU is not waited for."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return number
    import torch
    import torch.distributed as dist

    shared = torch.tensor(number)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared)


def _from_launcher() -> int:
    """The number in the stop file. Rank 0 alone looks: with many ranks on a shared disk that is one look per step, not hundreds."""
    if os.environ.get("RANK", "0") != "0":
        return 0
    with suppress(OSError, ValueError):
        return int((_watch.folder / STOP_FILE).read_text())
    return 0


def _time_is_up(now: float) -> int:
    """Whether one more step and a save would no longer fit."""
    needed = _watch.longest_step + (_watch.longest_save or _watch.unknown_save) + MARGIN
    return TIME_IS_UP if now + needed > _watch.deadline else 0


def die_with_parent(number: int, parent: int) -> None:
    """Let the kernel send this process signal `number` when its parent ends, however it ends. Linux only; elsewhere nothing.

    parent: the process id that the caller saw. If it has changed, the parent died before the kernel could be told.
    """
    if _libc is None:
        return
    _libc.prctl(1, number)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


# Loaded here, because between fork and exec nothing should be imported
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


# --- the launcher's side ----------------------------------------------------------------------------------------------


@dataclass
class Launcher:
    folder: Path | None = None  # of the step whose workers run
    before: frozenset[Path] = frozenset()  # what was saved of it when they were started
    number: int = 0  # of the first signal
    deadline: float | None = None
    got_on: bool = False  # whether earlier workers of this command have left something to go on from


_launcher = Launcher()


def listen() -> None:
    """Launcher: the first signal stops the running step in good order, or ends the command where none runs. The second ends it at once."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, _heard)


def limit(seconds: float | None) -> None:
    """Launcher: end `seconds` after the start of the command. Workers save in time by themselves; who has not, is ended."""
    if seconds is None:
        return
    _launcher.deadline = STARTED + seconds
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, _too_late)
        signal.setitimer(signal.ITIMER_REAL, max(0.001, _time_left() - MARGIN / 2))
        atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)  # the exit code is ours, also in the last moments


def check(stage: str) -> None:
    """Raise Stopped if a stage should not be started: a signal has come, or too little time is left."""
    if _launcher.number:
        raise Stopped(f"stopped by {reason(_launcher.number)} before stage {stage}; the same command goes on from there")
    if _launcher.deadline is not None and _time_left() < min(60.0, 0.05 * (_launcher.deadline - STARTED)) + MARGIN:
        raise out_of_time(f"before stage {stage}")


def out_of_time(where: str) -> Exception:
    """What ends a command at its time limit: Stopped; or UserError if it has saved nothing, as a script that repeats it would for ever."""
    if _got_on():
        return Stopped(f"stopped by the time limit {where}; the same command goes on from there")
    return UserError(
        f"the time limit came {where}, and nothing was saved since this command began: the same command would come no further. "
        "Type a longer time_limit"
    )


def _got_on() -> bool:
    """Whether this command has left a new checkpoint or a finished step."""
    return _launcher.got_on or (_launcher.folder is not None and not _saved(_launcher.folder) <= _launcher.before)


def _saved(folder: Path) -> frozenset[Path]:
    """The files that are written last: of a step, and of its checkpoints."""
    return frozenset([*folder.glob("checkpoints/step_*/manifest.json"), *folder.glob("DONE")])


def heard() -> bool:
    """Whether a signal has come."""
    return _launcher.number > 0


@contextmanager
def running(folder: Path) -> Iterator[None]:
    """The workers of the step in `folder` run inside this block: they are told when a signal comes."""
    listen()
    (folder / STOP_FILE).unlink(missing_ok=True)
    (folder / LIMIT_FILE).unlink(missing_ok=True)
    if _launcher.deadline is not None:
        (folder / LIMIT_FILE).write_text(str(_launcher.deadline))
    _launcher.folder, _launcher.before = folder, _saved(folder)
    try:
        yield
    finally:
        _launcher.got_on = _got_on()
        _launcher.folder = None


def _heard(number: int, frame: object) -> None:
    name = signal.Signals(number).name
    if _launcher.folder is None and not _launcher.number:
        _say(f"stopped by {name}; the same command goes on from there")
        _leave(number, RESUME_ME)
    elif not _launcher.number:
        _launcher.number = number
        (_launcher.folder / STOP_FILE).write_text(str(number))
        _say(f"{name}: stopping after this optimizer step, with a checkpoint; once more ends it at once")
    elif number != signal.SIGUSR1:  # which nobody sends by hand
        _say(f"ended by a second signal ({name}); the same command goes on from the last checkpoint")
        _leave(number, 128 + number)


def _leave(number: int, code: int) -> None:
    """Through the doors that errors take, so that the workers go too."""
    raise KeyboardInterrupt(code) if number == signal.SIGINT else SystemExit(code)


def _too_late(number: int, frame: object) -> None:
    end = out_of_time("before a checkpoint could be saved")
    _say(str(end) if isinstance(end, Stopped) else f"error: {end}")
    raise SystemExit(RESUME_ME if isinstance(end, Stopped) else 1)


def _time_left() -> float:
    return _launcher.deadline - time.time()


def _say(text: str) -> None:
    """print() may not be called from a signal handler that has interrupted another one."""
    with suppress(OSError):  # `2>&1 | tee` has ended by the same Ctrl-C
        os.write(2, f"\n{text}\n".encode())
