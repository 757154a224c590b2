"""Stopping cleanly: whoever asks (a signal, the launcher, the time limit), every rank stops at the same optimizer step.

The launcher listens for signals and tells rank 0 through a file, so that the workers and whatever started them (torchrun, srun, ssh)
need no signal. A worker that gets one anyway, because SLURM signals everyone, only notes it. Imports no torch, unless the workers
already have.
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

# Exit code of a command that was stopped cleanly: typing it again resumes. 75, "temporary failure" in sysexits.h
RESUME_ME = os.EX_TEMPFAIL
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# The time limit counts from here, some tenths of a second after Python has started: MARGIN is longer
STARTED = time.time()

# In the step folder: the launcher tells the workers, and rank 0 tells the launcher that it has stopped
STOP_FILE, LIMIT_FILE, NOTE = "logs/stop", "logs/deadline", "logs/stopped.json"
# The time limit, as if it were the number of a signal
TIME_IS_UP = 1000


class Stopped(Exception):
    """The stage was asked to stop and has saved its state. args[0] says what stopped it."""


def reason(number: int) -> str:
    return "the time limit" if number == TIME_IS_UP else signal.Signals(number).name


# --- the worker's side ------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """What a worker knows about stopping. Times in seconds, `deadline` and `last` as time.time()."""

    folder: Path | None = None
    deadline: float = float("inf")
    unknown_save: float = 0.0  # assumed duration of a save until one was measured
    number: int = 0  # of the signal that came
    last: float | None = None  # end of the last call of `asked`
    longest_step: float = 0.0
    longest_save: float = 0.0


_watch = Watch()
# Seconds between the end of the save and the time limit, for the workers to exit
MARGIN = 5.0


def watch(folder: Path) -> None:
    """Worker: from now on only note signals; give `asked` the step folder and the time limit."""
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
    """What asks the run to stop now, or None; the same answer on every rank. Collective, and cheap enough for every optimizer step."""
    if _watch.folder is None:
        return None
    now = time.time()
    if _watch.last is not None:
        _watch.longest_step = max(_watch.longest_step, now - _watch.last)
    number = _largest(max(_watch.number, _from_launcher(), _time_is_up(now)))
    _watch.last = time.time()
    return reason(number) if number else None


def saving_took(seconds: float) -> None:
    """Report how long a checkpoint took: that much time is reserved before the time limit."""
    _watch.longest_save = max(_watch.longest_save, seconds)
    if _watch.last is not None:
        _watch.last += seconds  # a save does not count as part of a step


def step_may_take(seconds: float) -> None:
    """Report how long an evaluation took: it comes between two steps, and must not run past the limit."""
    _watch.longest_step = max(_watch.longest_step, seconds)


def _largest(number: int) -> int:
    """The largest of all ranks' numbers. On the CPU, through gloo: does not wait for the GPU."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return number
    import torch
    import torch.distributed as dist

    shared = torch.tensor(number)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared)


def _from_launcher() -> int:
    """The number in the stop file. Only rank 0 looks: on a shared disk that is one look per step instead of hundreds."""
    if os.environ.get("RANK", "0") != "0":
        return 0
    with suppress(OSError, ValueError):
        return int((_watch.folder / STOP_FILE).read_text())
    return 0


def _time_is_up(now: float) -> int:
    """TIME_IS_UP if one more step and a save would no longer fit, else 0."""
    needed = _watch.longest_step + (_watch.longest_save or _watch.unknown_save) + MARGIN
    return TIME_IS_UP if now + needed > _watch.deadline else 0


def die_with_parent(number: int, parent: int) -> None:
    """Have the kernel send this process signal `number` when its parent ends, however it ends. Does nothing outside Linux.

    parent: its process id as the caller saw it. If it has changed, the parent died before the kernel knew.
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
    before: frozenset[Path] = frozenset()  # what was already saved when they started
    number: int = 0  # of the first signal
    deadline: float | None = None
    progressed: bool = False  # whether earlier workers of this command saved something to resume from


_launcher = Launcher()


def listen() -> None:
    """Launcher: the first signal stops the running step cleanly, or ends the command if none runs. The second ends it at once."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, _heard)


def limit(seconds: float | None) -> None:
    """Launcher: end the command `seconds` after it started. Workers save in time by themselves; those that did not are ended."""
    if seconds is None:
        return
    _launcher.deadline = STARTED + seconds
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, _too_late)
        signal.setitimer(signal.ITIMER_REAL, max(0.001, _time_left() - MARGIN / 2))
        atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)  # no alarm while we exit: it would change the exit code


def check(stage: str) -> None:
    """Raise Stopped if a stage should not start: a signal has come, or too little time is left."""
    if _launcher.number:
        raise Stopped(f"stopped by {reason(_launcher.number)} before stage {stage}; the same command resumes from there")
    if _launcher.deadline is not None and _time_left() < min(60.0, 0.05 * (_launcher.deadline - STARTED)) + MARGIN:
        raise out_of_time(f"before stage {stage}")


def out_of_time(where: str) -> Exception:
    """What to raise at the time limit: Stopped; or UserError if nothing was saved, or a script that repeats the command would never end."""
    if _progressed():
        return Stopped(f"stopped by the time limit {where}; the same command resumes from there")
    return UserError(
        f"the time limit was reached {where}, and nothing was saved since this command started: the same command would get no further. "
        "Type a longer time_limit"
    )


def _progressed() -> bool:
    """Whether this command has saved a checkpoint or finished a step."""
    return _launcher.progressed or (_launcher.folder is not None and not _saved(_launcher.folder) <= _launcher.before)


def _saved(folder: Path) -> frozenset[Path]:
    """The files that complete a step and its checkpoints."""
    return frozenset([*folder.glob("checkpoints/step_*/manifest.json"), *folder.glob("DONE")])


def heard() -> bool:
    """Whether a signal has come."""
    return _launcher.number > 0


@contextmanager
def running(folder: Path) -> Iterator[None]:
    """Run the workers of the step in `folder` inside this block: a signal is passed on to them."""
    listen()
    (folder / STOP_FILE).unlink(missing_ok=True)
    (folder / LIMIT_FILE).unlink(missing_ok=True)
    if _launcher.deadline is not None:
        (folder / LIMIT_FILE).write_text(str(_launcher.deadline))
    _launcher.folder, _launcher.before = folder, _saved(folder)
    try:
        yield
    finally:
        _launcher.progressed = _progressed()
        _launcher.folder = None


def _heard(number: int, frame: object) -> None:
    name = signal.Signals(number).name
    if _launcher.folder is None and not _launcher.number:
        _say(f"stopped by {name}; the same command resumes from there")
        _leave(number, RESUME_ME)
    elif not _launcher.number:
        _launcher.number = number
        (_launcher.folder / STOP_FILE).write_text(str(number))
        _say(f"{name}: stopping after this optimizer step, with a checkpoint; a second signal ends it at once")
    elif number != signal.SIGUSR1:  # SLURM may repeat that one; nobody sends it by hand
        _say(f"ended by a second signal ({name}); the same command resumes from the last checkpoint")
        _leave(number, 128 + number)


def _leave(number: int, code: int) -> None:
    """Exit through an exception, so that the workers are ended too."""
    raise KeyboardInterrupt(code) if number == signal.SIGINT else SystemExit(code)


def _too_late(number: int, frame: object) -> None:
    end = out_of_time("before a checkpoint could be saved")
    _say(str(end) if isinstance(end, Stopped) else f"error: {end}")
    raise SystemExit(RESUME_ME if isinstance(end, Stopped) else 1)


def _time_left() -> float:
    return _launcher.deadline - time.time()


def _say(text: str) -> None:
    """Write to stderr from a signal handler, where print() may not be called: it may have been interrupted itself."""
    with suppress(OSError):  # the same Ctrl-C ended `2>&1 | tee`
        os.write(2, f"\n{text}\n".encode())
