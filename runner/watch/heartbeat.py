"""Heartbeats: each rank notes every second where it is, so that the launcher can say which one is late or dead.

logs/rank_N.alive holds one JSON object: rank, phase, step, total, time, and the line at which the main thread is. A thread
writes it, so that a rank that waits for others still shows that it is alive, and where it waits.
"""

import json
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

SECONDS = 1.0

# phase: of the loop, "" between two phases. step: optimizer steps (PPO: iterations) done
status = {"phase": "", "step": 0, "total": 0}


def start(folder: Path, rank: int) -> None:
    """Beat until the process ends."""
    path, main = folder / "logs" / f"rank_{rank}.alive", threading.main_thread().ident
    work = path.with_suffix(".tmp")

    def beat() -> None:
        while True:
            with suppress(OSError, KeyError):  # a full disk is reported elsewhere
                work.write_text(json.dumps({"rank": rank, **status, "time": time.time(), "where": where(sys._current_frames()[main])}))
                os.replace(work, path)
            time.sleep(SECONDS)

    threading.Thread(target=beat, daemon=True).start()


def where(frame) -> str:
    """'waiting for other ranks' inside a collective, otherwise the innermost line of our own code."""
    ours = Path(__file__).parents[1]
    while frame:
        file = Path(frame.f_code.co_filename)
        if file.parts[-3:-1] == ("torch", "distributed"):
            return WAITING
        if ours in file.parents:
            return f"{file.relative_to(ours.parent)}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return ""


WAITING = "waiting for other ranks"


def read(folder: Path) -> list[dict]:
    """The last heartbeats of all ranks, by rank."""
    beats = [json.loads(path.read_text()) for path in (folder / "logs").glob("rank_*.alive")]
    return sorted(beats, key=lambda beat: beat["rank"])
