"""Stands in for runner.worker where no model is needed: `python worker.py <step folder> <how it ends>`, as hardware.launch starts it.

Imports no torch unless there are several ranks, so that a launch takes a fraction of a second.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from runner import worker
from runner.durable.manifest import MANIFEST
from runner.errors import UserError
from runner.watch import heartbeat, stop

stop.MARGIN = 1.0  # time limits are seconds here
heartbeat.SECONDS = 0.2  # and ranks wait for each other for less than two


def main(folder: Path, how: str, rank: int) -> None:
    stop.die_with_parent(signal.SIGKILL, os.getppid())
    stop.watch(folder)
    heartbeat.status.update(phase="train", step=7, total=9)  # first: a rank may die before its second sign of life
    heartbeat.start(folder, rank)
    (folder / f"pid_{rank}").write_text(str(os.getpid()))
    try:
        WAYS[how](folder, rank)
    except BaseException as error:
        worker.report(folder, rank, error)
        raise


def stops(folder: Path, rank: int) -> None:
    while not (reason := stop.asked()):
        time.sleep(0.02)
    saves(folder)
    (folder / stop.NOTE).write_text(json.dumps({"reason": reason, **heartbeat.status}))


def saves(folder: Path) -> None:
    (folder / "checkpoints" / "step_7").mkdir(parents=True)
    (folder / "checkpoints" / "step_7" / MANIFEST).touch()


def hangs(folder: Path, rank: int) -> None:
    time.sleep(60)


def saves_and_hangs(folder: Path, rank: int) -> None:
    saves(folder)
    time.sleep(60)


def crashes_once(folder: Path, rank: int) -> None:
    tries = folder / "tries"
    tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
    if tries.read_text() == "x":
        raise RuntimeError("a cosmic ray")
    (folder / "DONE").write_text("")


def refuses(folder: Path, rank: int) -> None:
    raise UserError("the data are of the wrong kind: type something else")


def module(folder: Path, rank: int) -> None:
    import no_such_module  # noqa: F401


def memory(folder: Path, rank: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    bytearray(2**32)


def dies(number: int):
    def die(folder: Path, rank: int) -> None:
        print("[sft] step 7/9  loss 1.234", flush=True)
        os.kill(os.getpid(), number)

    return die


def with_neighbours(act):
    """All ranks meet over and over; `act` is what rank 1 does after a while."""

    def run(folder: Path, rank: int) -> None:
        import torch
        import torch.distributed as dist

        from runner import ranks

        # Imports can take one rank seconds longer than the other, and these four seconds, as many heartbeats, are for what `act` does
        (folder / f"imported_{rank}").touch()
        while not (folder / f"imported_{1 - rank}").exists():
            time.sleep(0.01)
        ranks.start("cpu", timeout_minutes=0.07)
        group = dist.new_group()  # as DeepSpeed makes one
        for turn in range(1000):
            if rank == 1 and turn == 3:
                act()
            dist.all_reduce(torch.zeros(1), group=group)

    return run


WAYS = {
    "stops": stops,
    "hangs": hangs,
    "saves_and_hangs": saves_and_hangs,
    "crashes_once": crashes_once,
    "refuses": refuses,
    "module": module,
    "memory": memory,
    "kill": dies(signal.SIGKILL),
    "bus": dies(signal.SIGBUS),
    "rank_1_dies": with_neighbours(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "rank_1_is_late": with_neighbours(lambda: time.sleep(8)),
}

if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(os.environ.get("RANK", "0")))
