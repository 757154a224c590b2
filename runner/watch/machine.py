"""The cores, memory and disks of this machine. Linux; elsewhere the answers are "unknown"."""

import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path

from runner.errors import UserError


def oom_kills() -> int | None:
    """Processes that the kernel has killed so far because memory ran out: in our control group, or else on the machine."""
    for path in (*_cgroup_files("memory.events"), *_cgroup_files("memory.oom_control"), Path("/proc/vmstat")):
        with suppress(OSError):
            if found := re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE):
                return int(found[1])
    return None


def memory_limit() -> int:
    """Bytes of CPU memory that we may use: the control group's limit, or the machine's memory."""
    machine = sys.maxsize
    with suppress(OSError):
        machine = 1024 * int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    for path in (*_cgroup_files("memory.max"), *_cgroup_files("memory.limit_in_bytes")):
        with suppress(OSError, ValueError):  # "max": none
            return min(machine, int(path.read_text()))
    return machine


def share_cores(environment: MutableMapping[str, str]) -> None:
    """Threads of OpenMP wait spinning, which takes the cores from another run on this machine: have them sleep soon.

    benchmarks/NOTES.md has the times. Before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", "1000")


def cores() -> int:
    """CPU cores that we may use, at least one: those that SLURM or taskset allow us, or the control group's quota."""
    allotted = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for path in _cgroup_files("cpu.max"):  # of version 2
        with suppress(OSError, ValueError):  # "max 100000": none
            quota, period = map(int, path.read_text().split())
            return min(allotted, max(1, quota // period))
    return allotted


def _cgroup_files(name: str) -> list[Path]:
    """Where a file of our memory control group may be: version 2, version 1, and both as a container sees them."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds in ("", "memory"):
                root = Path("/sys/fs/cgroup") / kinds
                files = [root / path.lstrip("/") / name, root / name]
                if found := [file for file in files if file.exists()]:
                    return found
    return []


def gb(number: int) -> str:
    """Of what was measured: three digits, also where little is left. An estimate needs fewer, see forecast/fit.py."""
    return f"{number / 1e9:.3g} GB"


def disk_full(path: Path) -> str:
    """How full the disk is, in half a sentence."""
    while not path.exists():
        path = path.parent
    size = shutil.disk_usage(path)
    return f"the disk is full: {gb(size.free)} of {gb(size.total)} are free at {path}"


@contextmanager
def naming_full_disks(store: str) -> Iterator[None]:
    """Explain a full disk when the launcher itself writes: data, configurations, summaries."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        full = disk_full(Path(error.filename or store).absolute())
        raise UserError(f"{full}. {MORE_SPACE} What was saved is intact: the same command resumes from it") from error


MORE_SPACE = "Delete old steps there, or type store=/a/larger/disk."
