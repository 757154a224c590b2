"""Why the workers ended, in one paragraph: what happened, the probable cause, what to type, the failing rank's last lines.

The launcher calls `explain`. It reads what the ranks left in logs/ (error_rankN.json, rank_N.alive, rank_N.log) and takes the first
fault of the table FAULTS that fits. Imports no torch.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import NamedTuple

from runner.batch_sizes import micro_batch
from runner.config.rates import lower_rate
from runner.config.schema import Config
from runner.durable.manifest import steps_done
from runner.forecast import fit
from runner.plan import Step
from runner.watch import heartbeat
from runner.watch.machine import MORE_SPACE, disk_full, gb, memory_limit


@dataclass(frozen=True)
class Fault:
    what: str  # half a sentence, for the line that announces a restart
    text: str  # the paragraph
    repeats: bool  # would happen again: the launcher does not restart


@dataclass
class Crash:
    """How the workers of a step ended."""

    cfg: Config
    step: Step
    code: int  # of the launch command, negative for a signal
    lines: list[str]  # the last ones it printed
    oom_kills: int | None  # by the kernel, while it ran; None where they are not counted

    @cached_property
    def notes(self) -> list[dict]:
        """The notes of the ranks that could still write one, the earliest first."""
        notes = []
        for path in (self.step.folder / "logs").glob("error_rank*.json"):
            with suppress(OSError, json.JSONDecodeError):  # on a full disk they are missing or empty
                notes.append(json.loads(path.read_text()))
        return sorted(notes, key=lambda note: note["time"])

    @cached_property
    def beats(self) -> list[dict]:
        return heartbeat.read(self.step.folder)

    @cached_property
    def culprit(self) -> tuple[int, int, dict | None]:
        """(rank, exit code, note) of the rank that failed first, not of those that failed because of it."""
        rank, code = _torchrun_says(self.lines) or (0, _as_popen_says(self.code))
        if code < 0:
            return rank, code, None
        causes = [note for note in self.notes if not CONSEQUENCE.search(note["message"])]
        silent = set(range(self.cfg.hardware.world_size)) - {note["rank"] for note in self.notes}
        if self.notes and not causes and silent:  # all complain about a rank that died without a note
            return min(silent, key=lambda r: next((b["time"] for b in self.beats if b["rank"] == r), 0)), code, None
        note = next(iter(causes or self.notes), None)
        return (note["rank"], 1, note) if note else (rank, code, None)

    @cached_property
    def said(self) -> str:
        """The text that FAULTS searches."""
        note = self.culprit[2]
        return f"{note['kind']}: {note['message']}" if note else "\n".join(self.last_lines(200))

    def says(self, pattern: str) -> bool:
        return re.search(pattern, self.said) is not None

    def died_of(self, number: int) -> bool:
        """Whether signal `number` ended the rank that failed first."""
        return self.culprit[1] == -number

    @cached_property
    def who(self) -> str:
        """'rank 1, in phase update after step 12,'; 'the worker' where there is only one."""
        rank, _, note = self.culprit
        name = f"rank {rank}" if self.cfg.hardware.world_size > 1 else "the worker"
        if note:
            return f"{name}, {place(note)},"
        seen = next((beat for beat in self.beats if beat["rank"] == rank), None)
        return f"{name}, last seen {place(seen)} or later," if seen else name  # a heartbeat is up to a second old

    def last_lines(self, count: int) -> list[str]:
        """The last lines of the failing rank, without torchrun's report about it."""
        rank, _, note = self.culprit
        if note:
            lines = note["traceback"].strip().splitlines()
        elif rank:
            path = self.step.folder / "logs" / f"rank_{rank}.log"
            lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        else:
            lines = list(takewhile(lambda line: not TORCHRUN.search(line), self.lines))
        return lines[-count:]


# What a rank says when another one has died
CONSEQUENCE = re.compile(
    r"Connection (closed|reset)|Broken pipe|remote process exited|communicator was aborted|Socket (closed|error)", re.I
)
TORCHRUN = re.compile(r"torch/distributed/(elastic|run)|torch\.distributed\.elastic|ChildFailedError")
ROOT_CAUSE = re.compile(r"Root Cause.*?rank\s*: (\d+) \(local_rank: \d+\)\s*exitcode\s*: (-?\d+)", re.DOTALL)


def _torchrun_says(lines: list[str]) -> tuple[int, int] | None:
    """(rank, exit code) of the first failure that torchrun saw."""
    found = ROOT_CAUSE.search("\n".join(lines))
    return (int(found[1]), int(found[2])) if found else None


def place(facts: dict) -> str:
    """Where a rank was, from its note or its last heartbeat."""
    if not facts["phase"] and not facts["step"]:
        return "while starting"
    return (f"in phase {facts['phase']} " if facts["phase"] else "") + f"after step {facts['step']}"


def explain(crash: Crash) -> Fault:
    """Explain the fault. debug=true shows the whole traceback, otherwise only its last lines."""
    note = crash.culprit[2]
    if note and note["user"] and not crash.cfg.debug:
        return Fault("", f"{crash.step.stage}: {note['message']}", repeats=True)
    rule = next(rule for rule in FAULTS if rule.fits(crash))
    what, advice = rule.explain(crash)
    count = 3 if note else 8
    lines = crash.last_lines(10**6 if note and crash.cfg.debug else count)
    last = "\n".join(f"  {line.removeprefix('~')}" for line in lines) or "  (none)"
    text = f"{crash.step.stage}: {what}. {advice} {kept(crash.step)}\nIts last lines:\n{last}\nFull logs: {crash.step.folder / 'logs'}"
    return Fault(what, text, rule.repeats or bool(note and note["user"]))


def kept(step: Step) -> str:
    """What survives of a step."""
    at = steps_done(step.folder)
    if at is None:
        return "There is no checkpoint yet: the same command starts the stage from the beginning"
    return f"The checkpoint of step {at} is intact: the same command resumes from it"


# --- memory -----------------------------------------------------------------------------------------------------------


def _gpu_full(crash: Crash) -> tuple[str, str]:
    note = crash.culprit[2] or {}
    asked_for = re.search(r"Tried to allocate ([\d.]+ \w+)", crash.said)
    what = f"{crash.who} ran out of GPU memory"
    if asked_for:
        what += f" when it asked for {asked_for[1]}"
    if memory := note.get("memory"):
        what += " ({allocated:.1f} GB allocated by us, {free:.1f} GB free of {total:.1f} GB)".format(**memory)
    return what, f"Type {less_memory(crash.cfg, crash.step.stage, note.get('phase', ''), note.get('traceback', ''))}."


def _as_popen_says(code: int) -> int:
    """An exit code as subprocess gives it, with signals negative.

    A shell says 128 + signal. DeepSpeed's launcher exits with -signal, of which the system keeps 256 - signal. 255 is ssh's own error.
    """
    if 128 < code <= 192:
        return 128 - code
    return code - 256 if 192 < code < 255 else code


def less_memory(cfg: Config, stage: str, phase: str, traceback: str) -> str:
    """The cheapest override that lowers the GPU memory of a phase, given what is set now: its micro batch, then the forecast's savings."""
    if knob := _knob(stage, phase, traceback):
        any_size = knob in ("rollout", "score")
        now = getattr(cfg.hardware.micro_batch, knob) if any_size else micro_batch(cfg, knob)
        if sizes := range(now // 2, 0, -1) if any_size else fit.smaller_sizes(cfg, knob):
            return f"hardware.micro_batch.{knob}={sizes[0]} (now {now})"
    for saving, effect in fit.SAVINGS.items():
        helps = effect and (saving is not fit.recomputed_layers or phase in ("train", "update"))
        if helps and (overrides := saving(cfg, stage)):
            return f"{fit.typed(overrides)}: {effect}"
    return "model= with a smaller one, or hardware= with more or larger GPUs"


def _knob(stage: str, phase: str, traceback: str) -> str | None:
    """The micro batch that bounds the memory of a phase; None where none does (building, saving)."""
    if stage == "ppo" and phase in ("rollout", "eval"):
        return "score" if re.search(r"collect\.py.*in score\b", traceback) else "rollout"
    return {"train": stage, "reference": stage, "eval": stage, "scoring": "score", "update": "ppo"}.get(phase)


def _memory_refused(crash: Crash) -> tuple[str, str]:
    return (
        f"{crash.who} was refused CPU memory (the machine allows {gb(memory_limit())})",
        f"A limit of the shell or the batch system may be lower (`ulimit -v`, SLURM's --mem). {LESS_CPU_MEMORY}",
    )


def _host_full(crash: Crash) -> tuple[str, str]:
    kills = f"{crash.oom_kills} such kill{'s' * (crash.oom_kills > 1)} meanwhile"
    what = f"{crash.who} was killed (-9) by the kernel because CPU memory ran out ({kills}, limit {gb(memory_limit())})"
    return what, LESS_CPU_MEMORY


LESS_CPU_MEMORY = (
    "Lower hardware.micro_batch, offload less where that is on (hardware.offload.optimizer=false, hardware.offload.params=false), take a "
    "smaller model or adapters (model.actor.lora.dim=16), or ask for more memory."
)


def _killed(crash: Crash) -> tuple[str, str]:
    if crash.oom_kills is None:
        return f"{crash.who} was killed (-9)", f"Most likely by the kernel because CPU memory ran out. {LESS_CPU_MEMORY}"
    return f"{crash.who} was killed (-9)", "Somebody sent the signal: the kernel did not report running out of memory."


def _bus_error(crash: Crash) -> tuple[str, str]:
    try:
        size = shutil.disk_usage("/dev/shm")
        shm = f"/dev/shm has {gb(size.total)}, {gb(size.free)} of them free"
    except OSError:
        shm = "there is no /dev/shm"
    return f"{crash.who} died of a bus error (-7); {shm}", "Shared memory is too small for the ranks' exchange: docker run --shm-size=8g."


# --- other ranks, the machine, the network ----------------------------------------------------------------------------


# Seconds without a heartbeat after which a rank counts as dead or stopped
SILENT = 5.0


def _least_waiting(beat: dict, crash: Crash) -> tuple[bool, bool, bool, int]:
    """A key that sorts heartbeats: the rank that most probably kept the others waiting comes first."""
    said = next((note["message"] for note in crash.notes if note["rank"] == beat["rank"]), "")
    # It has waited, whatever its last heartbeat says: that was made while it failed. NCCL's watchdog ends a rank without a note
    waited = bool(re.search(TIMEOUT, said)) or beat["rank"] == crash.culprit[0]
    return (
        waited,
        _silence(beat, crash) < SILENT,  # a silent rank is dead, or was stopped
        beat["where"] == heartbeat.WAITING,  # a rank at work has not come to the collective yet
        beat["step"],  # of ranks that all wait, the one farthest behind
    )


def _silence(beat: dict, crash: Crash) -> float:
    """Seconds for which a rank's heart had stopped when the last one did; 0 of a rank whose note says why."""
    if beat["rank"] in {note["rank"] for note in crash.notes}:
        return 0.0
    return max(other["time"] for other in crash.beats) - beat["time"]


def _late(crash: Crash) -> tuple[str, str]:
    """Name the rank that kept the others waiting."""
    minutes = f"{crash.cfg.hardware.timeout_minutes:g}"
    what = f"the ranks waited for each other longer than hardware.timeout_minutes={minutes}"
    if crash.beats:
        late = min(crash.beats, key=lambda beat: _least_waiting(beat, crash))
        at = late["where"] if late["where"] == heartbeat.WAITING else f"at {late['where'] or 'unknown code'}"
        what += f"; rank {late['rank']} is late, {place(late)}, {at}"
        if (silence := _silence(late, crash)) >= SILENT:
            what += f", its last sign of life {silence:.0f} s before the others'"
    return what, (
        "If that rank was only slow, raise hardware.timeout_minutes. If it hangs, look at its machine (nvidia-smi, dmesg); "
        "NCCL_DEBUG=INFO before the command shows which network NCCL chose."
    )


def _missing_module(crash: Crash) -> tuple[str, str]:
    found = re.search(r"No module named '?([\w.]+)", crash.said)
    name = found[1] if found else crash.said
    install = f"{sys.executable} -m pip install -c constraints.txt -e ."
    return f"{crash.who} lacks the Python module {name}", f"Type {install}, or `make run`, which installs what pyproject.toml names."


def _no_kernels(crash: Crash) -> tuple[str, str]:
    return (
        f"{crash.who} could not compile Triton's kernels",
        "The log has the C compiler's error; most often Python's headers are missing: apt-get install python3-dev.",
    )


def _disk_full(crash: Crash) -> tuple[str, str]:
    return f"{crash.who} could not write: {disk_full(crash.step.folder)}", MORE_SPACE


def _is_disk_full(crash: Crash) -> bool:
    if crash.says(r"No space left on device|Disk quota exceeded"):
        return True
    # torch.save does not say why
    writing = "inline_container" in crash.said or "file write failed" in crash.said
    return writing and shutil.disk_usage(crash.step.folder).free < 100e6


def _hub(crash: Crash) -> tuple[str, str]:
    return (
        f"{crash.who} could not reach the Hugging Face hub",
        "Behind a proxy set HTTPS_PROXY; for a mirror, HF_ENDPOINT; with everything in the local cache, HF_HUB_OFFLINE=1. Without network "
        "download first: hf download MODEL --local-dir FOLDER, then model.actor.path=FOLDER (or model.reward.path).",
    )


def _loss_scale(crash: Crash) -> tuple[str, str]:
    return (
        f"{crash.who} found infinite gradients at every loss scale of fp16, down to the smallest",
        "Training has diverged, or overflows in fp16. Try hardware.precision=bf16 where the GPU supports it, a lower learning rate "
        f"({lower_rate(crash.cfg, crash.step.stage)}), or a longer warmup.",
    )


def _died_of_a_signal(crash: Crash) -> bool:
    return crash.culprit[1] < 0


def _signal(crash: Crash) -> tuple[str, str]:
    names = {4: "an illegal instruction", 6: "an abort", 8: "an arithmetic error", 11: "a segmentation fault", 15: "SIGTERM"}
    number = -crash.culprit[1]
    return f"{crash.who} died of {names.get(number, 'signal')} (-{number})", "A fault of a library, a driver or the machine."


def _could_not_be_started(crash: Crash) -> bool:
    """By the exit codes of the shell that runs the launch command."""
    return crash.code in (126, 127)


def _no_command(crash: Crash) -> tuple[str, str]:
    what = "is not there" if crash.code == 127 else "cannot be run"
    program = crash.cfg.hardware.launch.split()[0]
    return f"the launch command {what}: it begins with {program}", "Install what is missing, or type another hardware.launch=..."


def _left_a_note(crash: Crash) -> bool:
    return crash.culprit[2] is not None


def _exception(crash: Crash) -> tuple[str, str]:
    note = crash.culprit[2]
    return (
        f"{crash.who} failed: {note['kind']}: {(note['message'].strip() or '(no message)').splitlines()[0]}",
        "debug=true shows the whole traceback.",
    )


def _unknown(crash: Crash) -> tuple[str, str]:
    ended = f"ended with exit code {crash.code}" if crash.code else "ended without finishing"
    return f"{crash.who} {ended}", "The launch command or its log may say why."


# --- the table --------------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    fits: Callable[[Crash], bool]
    explain: Callable[[Crash], tuple[str, str]]  # what happened, half a sentence; then probable cause and what to type
    repeats: bool  # would happen again


GPU_FULL = r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|OutOfMemoryError"
NO_HUB = r"LocalEntryNotFoundError|OfflineModeIsEnabled|Max retries exceeded|couldn't connect to 'http|Couldn't reach"
TIMEOUT = r"(?i)timed out (waiting|after)|wait timeout|collective operation timeout|heartbeat monitor timed out"
# The first rule that fits counts
FAULTS = (
    Rule(lambda crash: crash.died_of(9) and bool(crash.oom_kills), _host_full, repeats=True),
    Rule(lambda crash: crash.died_of(9), _killed, repeats=False),
    Rule(lambda crash: crash.died_of(7), _bus_error, repeats=True),
    Rule(lambda crash: crash.says(GPU_FULL), _gpu_full, repeats=True),
    Rule(lambda crash: crash.says(r"ModuleNotFoundError|No module named "), _missing_module, repeats=True),
    Rule(lambda crash: crash.says(r"CalledProcessError.*(cuda_utils|launcher)\.c"), _no_kernels, repeats=True),
    Rule(_is_disk_full, _disk_full, repeats=True),
    Rule(lambda crash: crash.says(r"loss scale already at minimum"), _loss_scale, repeats=True),
    Rule(lambda crash: crash.says(NO_HUB), _hub, repeats=False),
    Rule(lambda crash: crash.says(TIMEOUT), _late, repeats=False),
    Rule(lambda crash: crash.says(r"MemoryError|can't allocate memory|Cannot allocate memory|bad_alloc"), _memory_refused, repeats=True),
    Rule(_died_of_a_signal, _signal, repeats=False),
    Rule(_left_a_note, _exception, repeats=False),
    Rule(_could_not_be_started, _no_command, repeats=True),
    Rule(lambda crash: True, _unknown, repeats=False),
)
