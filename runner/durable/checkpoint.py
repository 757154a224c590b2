"""Checkpoints of a step: complete or absent at any moment, verified when read, and readable by any number of ranks.

    checkpoints/step_12/           (step_12_3: in the middle of a PPO iteration, after 3 of its optimizer steps)
      actor.rank_0.safetensors   shards of weights and AdamW moments (runner/durable/shards.py), one file per engine and rank
      shared.safetensors         tensors that are the same on all ranks: an unfinished rollout
      rank_0.json                random states of the rank, and the hashes of its files
      manifest.json              written last: step, state of the stage, hashes of all files

A checkpoint is written to step_12.tmp; when every rank is done, rank 0 writes the manifest and renames the folder. Nothing is
pickled. The position in the data is the number of steps done; see runner/data/batches.py.
"""

import errno
import json
import random
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from runner import ranks
from runner.config.schema import Config
from runner.durable.manifest import SHARED, complete, damage, read_manifest, remove, scored, sealed, write_manifest
from runner.durable.shards import MOMENTS, Shard, make_moments, publish, scaler_state, set_scaler_state, shards, steps_taken
from runner.errors import UserError
from runner.files import put_in_place
from runner.metrics import RunLog
from runner.watch import stop
from runner.watch.stop import Stopped

# Kept free on the disk for logs and exports
SPARE_BYTES = 64 << 20


class Checkpoints:
    """Saves and restores one step. Every method is collective.

    Args: folder: of the step. engines: name -> DeepSpeed engine. average: the averaged actor, whose shards are saved too.
    """

    def __init__(self, folder: Path, key: str, cfg: Config, engines: dict, log: RunLog, average=None):
        self.folder, self.key, self.cfg, self.engines, self.log, self.average = folder, key, cfg, engines, log, average
        self.saved: str | None = None  # name of the newest checkpoint, saved or being written
        self.scores: list[float] = []  # of the evaluations so far; after a restart, of those whose checkpoints were kept
        self._writer: Writer | None = None
        self._last = time.monotonic()  # when a save began

    # --- saving ---

    def after(self, done: int, total: int, state: dict, score: float | None = None) -> None:
        """Call after every step: saves when due. If someone asked to stop, saves and raises Stopped.

        Args: state: JSON facts of the stage, the same on every rank. score: of an evaluation at this step; higher is better.
        """
        settings, reason = self.cfg.checkpoint, stop.asked()
        best = score is not None and self._is_among_best(score)
        often = settings.every > 0 and done % settings.every == 0
        # Rank 0's clock decides for all
        in_time = ranks.rank() > 0 or time.monotonic() - self._last <= 60 * settings.minutes
        late = settings.minutes > 0 and not ranks.all_true(in_time)
        if reason or best or often or late or done == total:
            self.save(f"step_{done}", done, state, score)
        else:
            self._poll()
        if reason:
            self.finish()
            raise Stopped(reason)

    def leave(self, reason: str, name: str, step: int, state: dict, shared: dict[str, Tensor] | None = None) -> None:
        """Save under `name` in the middle of a step, and raise Stopped."""
        self.save(name, step, state, shared=shared)
        self.finish()
        raise Stopped(reason)

    def save(self, name: str, step: int, state: dict, score: float | None = None, shared: dict[str, Tensor] | None = None) -> None:
        """Write checkpoints/<name>, in the background if the config says so. shared: tensors that are the same on every rank."""
        if self.saved == name:
            return
        self.finish()
        started = self._last = time.monotonic()
        with self.log.phase("checkpoint"):
            files = self._snapshot(shared or {})
            self._make_room(sum(t.nbytes for tensors in files.values() for t in tensors.values()))
            facts = {"step": step, "key": self.key, "world_size": ranks.world(), "score": score, "state": state}
            facts |= {"steps_taken": {n: steps_taken(e) for n, e in self.engines.items()}, "log": self.log.state()}
            facts |= {"scalers": {n: scaler_state(e) for n, e in self.engines.items()}, "precision": self.cfg.hardware.precision}
            self._writer = Writer(self.folder / "checkpoints" / name, files, facts, started)
            self.saved = name
        if not self.cfg.checkpoint.background:
            self.finish()

    def _snapshot(self, shared: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Copies of this rank's part, on the CPU: file name -> key -> tensor. What all ranks hold is divided among them."""
        named = {name: shards(engine) for name, engine in self.engines.items()}
        if self.average:
            named["average"] = self.average.shards()
        files = {}
        for name, parts in named.items():
            mine = [s for i, s in enumerate(parts) if not s.everywhere or i % ranks.world() == ranks.rank()]
            files[f"{name}.rank_{ranks.rank()}.safetensors"] = {
                f"{s.name}|{kind}|{s.start}": t.detach().to("cpu", copy=True).contiguous() for s in mine for kind, t in s.tensors.items()
            }
        if shared and ranks.rank() == 0:
            files[SHARED] = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in shared.items()}
        return files

    def _make_room(self, mine: int) -> None:
        """Refuse a checkpoint that the disk cannot hold. Older ones are deleted first, but never the newest."""
        needed = int(ranks.all_reduce_sum({"bytes": mine}, self.log.device)["bytes"]) + SPARE_BYTES
        free = ranks.from_rank0(lambda: self._free_after_pruning(needed))
        if free < needed:
            safe = complete(self.folder)
            kept = f"The last good one, {safe[-1]}, is intact" if safe else "There is none yet"
            raise UserError(
                f"the disk is full: a checkpoint needs {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free at {self.folder}. {kept}. "
                "Free some space, or move the store and type store=/another/disk; the same command then resumes"
            )

    def _free_after_pruning(self, needed: int) -> int:
        """Free bytes, after deleting older checkpoints if necessary. On rank 0."""
        for old in complete(self.folder)[:-1]:
            if shutil.disk_usage(self.folder).free >= needed:
                break
            remove(old)
        return shutil.disk_usage(self.folder).free

    def _poll(self) -> None:
        """Publish a checkpoint as soon as all ranks have written it."""
        if self._writer and ranks.all_true(not self._writer.thread.is_alive()):
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and publish it."""
        if not self._writer:
            return
        writer, self._writer = self._writer, None
        with self.log.phase("checkpoint"):
            writer.thread.join()
            errors = [e for e in ranks.all_gather(writer.error) if e]
            if errors:
                self.saved = None
                shutil.rmtree(writer.work, ignore_errors=True)  # it may be what filled the disk
                raise OSError(*errors[0]) if errors[0][0] else RuntimeError(errors[0][1])
            if ranks.rank() == 0:
                self.log.sync()
                writer.publish()
                self._prune()
            ranks.barrier()
        stop.saving_took(time.monotonic() - writer.started)

    def _prune(self) -> None:
        """Keep the newest and the best checkpoints."""
        found, settings = complete(self.folder), self.cfg.checkpoint
        best = [path for _, path in scored(found)[-settings.keep_best :]] if settings.keep_best else []
        for path in found[: -settings.keep_last]:
            if path not in best:
                remove(path)
        for aside in (self.folder / "checkpoints").glob("*.damaged"):
            shutil.rmtree(aside)

    # --- resuming ---

    def restore(self) -> tuple[int, dict, dict[str, Tensor]]:
        """Load the newest valid checkpoint, if there is one. Returns (steps done, state of the stage, shared tensors)."""
        path = self._newest_valid()
        if not path:
            self.log.restore({"bytes": 0, "seconds": 0.0, "phases": {}})
            return 0, {}, {}
        manifest = read_manifest(path)
        if manifest["key"] != self.key:
            raise UserError(
                f"{path} belongs to step {manifest['key']}, this is {self.key}: a checkpoint can only be resumed with its own configuration"
            )
        if manifest["precision"] != self.cfg.hardware.precision:
            self.log.say(f"{path.name} was written in {manifest['precision']} and is read in {self.cfg.hardware.precision}")
        for name, engine in self.engines.items():
            self._load_engine(path, manifest, name, engine)
        if self.average:
            self._load_average(path, manifest)
        self._restore_random(path, manifest)
        self.log.restore(manifest["log"])
        self.saved = path.name
        # As rank 0 sees it, so that all ranks decide alike
        self.scores = ranks.from_rank0(lambda: [score for score, _ in scored(complete(self.folder))])
        shared = path / SHARED
        tensors = load_file(shared) if shared.exists() else {}
        return manifest["step"], manifest["state"], tensors

    def _is_among_best(self, score: float) -> bool:
        """Whether a new score makes its checkpoint one of the `keep_best` best."""
        most = self.cfg.checkpoint.keep_best
        best = sorted(self.scores)[-most:] if most else []
        self.scores.append(score)
        return most > 0 and (len(best) < most or score > best[0])

    def load_best(self, score: float) -> bool:
        """Give the engines the weights of the best kept checkpoint, if it scored higher than `score`. Returns whether it did."""
        if not self.cfg.checkpoint.keep_best:
            return False
        better = [path for found, path in reversed(scored(self._finished())) if found > score]
        path = next(filter(self._is_whole, better), None)
        if path is None:
            return False
        for name, engine in self.engines.items():
            fill(path, read_manifest(path), name, shards(engine), kinds=("weight",))
            publish(engine)
        return True

    def _newest_valid(self) -> Path | None:
        """The newest checkpoint whose files are what its manifest says; damaged ones are named and skipped."""
        if ranks.rank() == 0:
            whole = complete(self.folder)
            for left in (self.folder / "checkpoints").glob("step_*"):
                if left not in whole and left.suffix != ".damaged":
                    shutil.rmtree(left, ignore_errors=True)
        for path in reversed(self._finished()):
            if self._is_whole(path):
                return path
            if ranks.rank() == 0:
                aside = path.with_suffix(".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        return None

    def _finished(self) -> list[Path]:
        """The finished checkpoints as rank 0 sees them: a network disk may show other ranks something else."""
        return [self.folder / "checkpoints" / name for name in ranks.from_rank0(lambda: [p.name for p in complete(self.folder)])]

    def _is_whole(self, path: Path) -> bool:
        """Whether a checkpoint is intact; logs it if not. Each rank reads its share of the files. Collective."""
        problems = [p for p in ranks.all_gather(damage(path, ranks.rank(), ranks.world())) if p]
        if problems:
            self.log.say(f"checkpoint {path.name} is damaged and skipped: {problems[0]}")
        return not problems

    def _load_engine(self, path: Path, manifest: dict, name: str, engine) -> None:
        steps = manifest["steps_taken"][name]
        if steps:
            make_moments(engine, steps)
        fill(path, manifest, name, shards(engine), kinds=("weight", *MOMENTS) if steps else ("weight",))
        publish(engine)
        set_scaler_state(engine, manifest["scalers"][name])

    def _load_average(self, path: Path, manifest: dict) -> None:
        """Load the average; a run that started without one and was forced to continue with one has none yet."""
        if any(name.startswith("average.rank_") for name in manifest["files"]):
            return fill(path, manifest, "average", self.average.shards(), kinds=("weight",))
        self.average.restart()
        self.log.say(f"{path.name} has no averaged weights: the average starts from its weights")

    def _restore_random(self, path: Path, manifest: dict) -> None:
        """Random states as they were; fresh ones for another number of ranks (only dropout uses them)."""
        if manifest["world_size"] == ranks.world():
            set_random_state(json.loads((path / f"rank_{ranks.rank()}.json").read_text())["random"])
            return
        self.log.say(f"{path.name} was written by a world of size {manifest['world_size']} and is read by one of {ranks.world()}")
        seeds = np.random.SeedSequence([self.cfg.seed, manifest["step"], ranks.rank()])
        torch.manual_seed(int(seeds.generate_state(1)[0]))


class Writer:
    """Writes one checkpoint to disk in a thread: files and hashes. Then `publish` gives it its name."""

    def __init__(self, final: Path, files: dict[str, dict[str, Tensor]], facts: dict, started: float):
        self.final, self.work, self.files, self.facts, self.started = final, final.with_suffix(".tmp"), files, facts, started
        self.random = random_state()
        self.error: tuple[int, str] | None = None
        if ranks.rank() == 0:
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir(parents=True)
        ranks.barrier()
        self.thread = threading.Thread(target=self._write, name="checkpoint")
        self.thread.start()

    def _write(self) -> None:
        try:
            made = {}
            for name, tensors in self.files.items():
                save_file(tensors, self.work / name)
                made[name] = sealed(self.work / name)
            text = json.dumps({"random": self.random, "files": made})
            (self.work / f"rank_{ranks.rank()}.json").write_text(text)
            sealed(self.work / f"rank_{ranks.rank()}.json")
        except Exception as error:  # whatever safetensors and the file system raise; `finish` raises it on all ranks
            full = "No space left" in str(error)
            self.error = (errno.ENOSPC if full else getattr(error, "errno", None) or 0, f"{type(error).__name__}: {error}")
        finally:
            self.files = {}

    def publish(self) -> None:
        """Write the manifest and rename the folder. On rank 0, after all ranks have written."""
        files = {}
        for rank in range(self.facts["world_size"]):  # by name: a network disk may list a stale folder
            part = self.work / f"rank_{rank}.json"
            files |= json.loads(part.read_text())["files"] | {part.name: sealed(part)}
        write_manifest(self.work, self.facts | {"files": files})
        put_in_place(self.work, self.final)


# --- tensors ----------------------------------------------------------------------------------------------------------


def fill(path: Path, manifest: dict, name: str, wanted: list[Shard], kinds: tuple[str, ...]) -> None:
    """Copy from the files of all ranks that wrote, however many, into the shards of this one."""
    pieces: dict[tuple[str, str], list] = {}
    files = [safe_open(path / f, framework="pt") for f in manifest["files"] if f.startswith(f"{name}.rank_")]
    for file in files:
        for key in file.keys():  # noqa: SIM118  a safe_open is not a mapping
            parameter, kind, start = key.rsplit("|", 2)
            pieces.setdefault((parameter, kind), []).append((int(start), file.get_slice(key)))
    for shard in wanted:
        for kind in kinds:
            target, copied = shard.tensors[kind], 0
            for start, piece in pieces.get((shard.name, kind), ()):
                low, high = max(start, shard.start), min(start + piece.get_shape()[0], shard.start + len(target))
                if low < high:
                    target[low - shard.start : high - shard.start].copy_(piece[low - start : high - start])
                    copied += high - low
            if copied != len(target):
                raise UserError(
                    f"{path} has {copied} of {len(target)} elements of {name}'s {shard.name} ({kind}): it belongs to another model"
                )


def random_state() -> dict:
    """States of all generators of this process, as JSON."""
    kind, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state().tolist(), "numpy": [kind, keys.tolist(), *rest], "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().tolist()
    return state


def set_random_state(state: dict) -> None:
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
