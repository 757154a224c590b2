"""A lock between processes: one makes the thing, the others wait and then find it made.

The kernel releases it when its holder dies, however it dies, so there are no stale locks. The launcher passes the lock's file
descriptor to the process it starts, but torchrun's children do not inherit it. So the workers also share a lock of their own (`share`),
which the next launcher waits for.
"""

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runner.errors import UserError


@contextmanager
def lock(path: Path, what: str) -> Iterator[int]:
    """Hold the lock at `path`, waiting for it if need be. Yields its file descriptor."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # watch/machine.py explains these
            raise
        if error.errno != errno.ELOOP:
            raise UserError(
                f"the lock {path} cannot be created ({error.strerror}): look at what is there, or type store=/a/folder/of/yours"
            ) from error
        raise UserError(f"the lock {path} is a symlink: refusing to write through it. Delete it") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            print(f"waiting for {what}: {owner} is working on it", file=sys.stderr, flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether some process holds the lock at `path` now."""
    if not path.exists():
        return False
    descriptor = os.open(path, os.O_RDONLY)  # it may be somebody else's
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def share(path: Path) -> int:
    """Hold the lock at `path` together with others that share it, until this process ends. Returns its file descriptor."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor
