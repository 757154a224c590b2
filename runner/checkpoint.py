"""Checkpoints of a step: engines, random numbers of every rank, and the stage's own state.

A checkpoint is written beside its final place and moved there by one rename when every rank is done: it is complete or
absent. The number of steps done is the position of the data; see runner/data/batches.py.
"""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from runner import ranks
from runner.errors import UserError


def due(every: int, done: int, total: int) -> bool:
    """Whether a checkpoint is saved after step `done`: every so many steps, and after the last one."""
    return done == total or (every > 0 and done % every == 0)


def save(folder: Path, step: int, engines: dict, state: dict, tensors: dict | None, keep_last: int) -> None:
    """Write checkpoints/step_<step>. Collective.

    Args: engines: name -> DeepSpeed engine. state: JSON facts, the same on every rank. tensors: this rank's own (EMA, say).
    """
    final = folder / "checkpoints" / f"step_{step}"
    work = final.with_suffix(".tmp")
    if ranks.rank() == 0:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    dist.barrier()
    for name, engine in engines.items():
        # Frozen weights come back from the parent's checkpoint, which the step's key pins
        engine.save_checkpoint(str(work), tag=name, save_latest=False, exclude_frozen_parameters=True)
    torch.save({"random": _random_state(), "tensors": tensors or {}}, work / f"rank_{ranks.rank()}.pt")
    dist.barrier()
    if ranks.rank() == 0:
        facts = {
            "step": step,
            "world_size": ranks.world(),
            "zero": {n: e.zero_optimization_stage() for n, e in engines.items()},
            "state": state,
        }
        (work / "state.json").write_text(json.dumps(facts))
        _flush(work)
        if final.exists():
            shutil.rmtree(final)
        os.rename(work, final)
        for old in complete(folder)[:-keep_last]:
            shutil.rmtree(old)
    dist.barrier()


def complete(folder: Path) -> list[Path]:
    """Finished checkpoints of a step folder, the oldest first."""
    found = (folder / "checkpoints").glob("step_*")
    return sorted((p for p in found if (p / "state.json").exists() and not p.suffix), key=lambda p: int(p.name[5:]))


def restore(folder: Path, engines: dict) -> tuple[int, dict, dict]:
    """Load the newest checkpoint, if there is one. Returns (steps done, stage state, this rank's tensors). Collective."""
    found = complete(folder)
    if not found:
        return 0, {}, {}
    path = found[-1]
    facts = json.loads((path / "state.json").read_text())
    zero = {n: e.zero_optimization_stage() for n, e in engines.items()}
    if facts["world_size"] != ranks.world() or facts["zero"] != zero:
        raise UserError(
            f"{path} was written by {facts['world_size']} ranks with ZeRO {facts['zero']}; this run has {ranks.world()} with {zero}. "
            f"Go on with the same hardware settings, or delete {folder / 'checkpoints'} to start the step anew"
        )
    for name, engine in engines.items():
        loaded, _ = engine.load_checkpoint(str(path), tag=name, load_module_strict=False)
        if loaded is None:
            raise UserError(f"{path / name} cannot be loaded: delete {path} to go on from the checkpoint before it")
    mine = torch.load(path / f"rank_{ranks.rank()}.pt", weights_only=True)
    _set_random_state(mine["random"])
    return facts["step"], facts["state"], mine["tensors"]


def _random_state() -> dict:
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    state = {"torch": torch.get_rng_state(), "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss]}
    state["python"] = [version, list(internal), gauss_next]
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _flush(folder: Path) -> None:
    """Push files to the disk, so that the rename never overtakes what it names."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
