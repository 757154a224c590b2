"""Where numbers go: always to metrics.jsonl, now and then to the console, and to W&B. Only rank 0 writes.

metrics.jsonl is the source of truth: one flat JSON object per line, flushed. Values that are not finite (the gradient norm of a step that
fp16 skipped) are left out: JSON cannot express them. A run that resumes drops the lines after its checkpoint.
Metric names are an API; README.md lists them.
"""

import json
import math
import os
import secrets
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from runner import flops, ranks
from runner.advice import advise
from runner.config.schema import Config
from runner.errors import UserError
from runner.files import write_text
from runner.formatting import clock
from runner.wandb_login import has_wandb_key
from runner.watch import heartbeat, stop

# Prefixes of the metrics that differ between two otherwise identical runs
CLOCK = ("time/", "perf/tokens", "perf/mfu", "perf/mbu", "perf/gpu_mem", "rollout/decode_ms")
# Seconds between two progress lines
QUIET = 5.0


class RunLog:
    """Log of one step. Use `phase` around parts of the loop, `log` once per optimizer step or iteration."""

    def __init__(self, cfg: Config, stage: str, folder: Path, parents: dict[str, str], device: torch.device):
        self.cfg, self.stage, self.folder, self.device = cfg, stage, folder, device
        self.writes = ranks.rank() == 0
        self.started = self._loop_started = self._last_line = time.monotonic()
        self.phases: dict[str, float] = defaultdict(float)
        self.step_phases: dict[str, float] = defaultdict(float)
        self._step_started, self.total, self.first = self.started, 0, 0
        self.broken: Counter[str] = Counter()  # broken invariants since the last row; see runner/stages/invariants.py
        self.wandb = self._start_wandb(parents) if self.writes else None
        self._told = 0  # lines of metrics.jsonl that W&B has from before an interruption

    # --- what the loops call ---

    def begin(self, first: int, total: int) -> None:
        """Announce a loop over steps first..total-1. Raises UserError if its checkpoint has taken more steps than that."""
        if first > total:
            raise UserError(
                f"the checkpoint has taken {first} steps, this configuration asks for {total} in all: its model would not be that of a "
                "shorter run. Type more steps, or resume=new to start over"
            )
        self.first, self.total, self._step_started = first, total, time.monotonic()
        self._loop_started = self._step_started
        heartbeat.status.update(step=first, total=total)
        if first:
            self.say(f"resumed at step {first} of {total}")

    def state(self) -> dict:
        """What a checkpoint must remember of the log: the length of metrics.jsonl, and the time spent."""
        path = self.folder / "metrics.jsonl"
        size = path.stat().st_size if self.writes and path.exists() else 0
        return {"bytes": size, "seconds": time.monotonic() - self.started, "phases": dict(self.phases)}

    def restore(self, state: dict) -> None:
        """Continue the clocks, and drop what was logged after the checkpoint, so that no line is missing or doubled."""
        self.started -= state["seconds"]
        self.phases |= state["phases"]
        path = self.folder / "metrics.jsonl"
        size = path.stat().st_size if path.exists() else 0
        if self.writes and size < state["bytes"]:
            self.say(f"metrics.jsonl has {size} bytes instead of the checkpoint's {state['bytes']}: earlier lines are lost")
        elif self.writes and size > state["bytes"]:
            # W&B already has these lines, and must not get them twice
            self._told = path.read_bytes()[state["bytes"] :].count(b"\n") if self.wandb and not self.wandb.offline else 0
            os.truncate(path, state["bytes"])

    def sync(self) -> None:
        """fsync metrics.jsonl: a checkpoint relies on its length."""
        if (path := self.folder / "metrics.jsonl").exists():
            with path.open("rb") as file:
                os.fsync(file.fileno())

    @contextmanager
    def phase(self, name: str):
        """Book the time inside on this phase. Waits for the GPU, or its time would be booked on the next one."""
        start = time.monotonic()
        heartbeat.status["phase"] = name
        yield  # no `finally`: after an error, `phase` says where it happened
        heartbeat.status["phase"] = ""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if name == "eval":
            stop.step_may_take(time.monotonic() - start)
        self.phases[name] += time.monotonic() - start
        self.step_phases[name] += time.monotonic() - start

    def log(
        self, step: int, metrics: dict[str, float], headline: str = "", tokens: float = 0, model_flops: float = 0, during: str | None = None
    ) -> None:
        """Record the metrics of a finished step (counted from 1).

        Args: tokens: without padding, over all ranks. model_flops: as runner/flops.py counts them, over all ranks. during: the phase that
        spent them; None for the whole step.
        """
        now = time.monotonic()
        heartbeat.status["step"] = step
        row = {"step": step, **metrics}
        seconds = now - self._step_started
        busy = seconds if during is None else self.step_phases[during]
        self.step_phases["other"] = max(0.0, seconds - sum(self.step_phases.values()))
        self.phases["other"] += self.step_phases["other"]
        row |= {f"time/{name}": value for name, value in self.step_phases.items()} | {"time/step": seconds}
        if tokens:
            row["perf/tokens_per_sec"] = tokens / seconds
        if model_flops and self.cfg.hardware.tflops:
            row["perf/mfu"] = flops.mfu(model_flops, busy, self.cfg.hardware.tflops, ranks.world())
        if self.device.type == "cuda":
            row["perf/gpu_mem_peak_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
            torch.cuda.reset_peak_memory_stats(self.device)
        self.step_phases.clear()
        self._step_started = now
        if not self.writes:
            return
        self._append(row)
        if headline and (now - self._last_line >= QUIET or step in (1, self.total)):
            self._last_line = now
            left = (now - self._loop_started) / max(1, step - self.first) * (self.total - step)
            self.say(f"step {step}/{self.total}  {headline}  {clock(left)} left", passing=True)

    def record(self, step: int, metrics: dict[str, float], headline: str = "") -> None:
        """Record metrics between two steps: evaluations."""
        if self.writes:
            self._append({"step": step, **metrics})
            if headline:
                self.say(f"step {step}/{self.total}  {headline}")
        # Keep the evaluation out of the next step's time, and of the estimate of the time left
        self._step_started, spent = time.monotonic(), time.monotonic() - self._step_started
        self._loop_started += spent
        self.step_phases.clear()

    def say(self, text: str, passing: bool = False) -> None:
        """A line on the console. passing: a terminal may overwrite it with the next one (see runner/launch.py)."""
        if self.writes:
            print(f"{'~' if passing else ''}[{self.stage}] {text}", flush=True)

    def samples(self, step: int, rows: list[dict]) -> None:
        """Sample dialogues: a file always, a table in W&B."""
        if not self.writes:
            return
        with (self.folder / "samples.jsonl").open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n")
        if self.wandb and rows:
            import wandb

            self.wandb.log({"samples": wandb.Table(columns=list(rows[0]), data=[list(r.values()) for r in rows]), "step": step})

    def histogram(self, step: int, name: str, values: list[float]) -> None:
        if self.writes and self.wandb:
            import wandb

            self.wandb.log({name: wandb.Histogram(values), "step": step})

    def result(self, facts: dict) -> None:
        """Write result.json, from which the summary is made, and close W&B."""
        if not self.writes:
            return
        seconds = time.monotonic() - self.started
        common = {"stage": self.stage, "seconds": seconds, "phases": dict(self.phases), "world_size": ranks.world()}
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        whole = self.phases | {"start": max(0.0, seconds - sum(self.phases.values()))}  # as the summary's table of times has it
        if advice := advise(self.cfg, self.stage, [row for row in rows if "time/step" in row], whole):
            common["advice"] = advice
            self.say(f"advice: {advice}")
        write_text(self.folder / "result.json", json.dumps(common | {"resumed_from": self.first} | facts, indent=2))
        if self.wandb:
            self.wandb.summary.update({k: v for k, v in facts.items() if isinstance(v, int | float)})
        self.close()

    def close(self) -> None:
        """Let W&B write what it has."""
        if self.wandb:
            self.wandb.finish()

    # --- where rows go ---

    def _append(self, row: dict) -> None:
        row |= {f"invariants/{name}": count for name, count in self.broken.items() if count}
        self.broken = Counter(dict.fromkeys(self.broken, 0))  # keep the names: each is reported once
        row = {k: float(v) if isinstance(v, torch.Tensor) else v for k, v in row.items()}
        row = {k: v for k, v in row.items() if not isinstance(v, float) or math.isfinite(v)}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        self._told -= 1
        if self.wandb and self._told < 0:
            self.wandb.log(row)

    def _start_wandb(self, parents: dict[str, str]):
        mode = self.cfg.wandb.mode
        if mode == "disabled":
            return None
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE")  # the launcher sets it where there is no network
            if mode not in ("offline", "disabled"):
                mode = "online" if has_wandb_key() else "offline"
        import wandb

        id_file = self.folder / "wandb_id"
        run_id = (id_file.read_text() if id_file.exists() else "") or secrets.token_hex(4)
        write_text(id_file, run_id)
        ids = {name: (Path(path).parent / "wandb_id") for name, path in parents.items()}
        facts = {"parents": {name: file.read_text() for name, file in ids.items() if file.exists()}, "git_commit": _git_commit()}
        run = wandb.init(
            mode=mode,
            dir=str(self.folder),
            project=self.cfg.wandb.project,
            entity=self.cfg.wandb.entity,
            group=self.cfg.name,
            job_type=self.stage,
            name=self.folder.name,
            id=run_id,
            resume="allow" if mode == "online" else None,
            config=asdict(self.cfg) | facts,
            # No git: W&B would upload the remote's URL, credentials included, and uncommitted changes
            settings=wandb.Settings(silent=True, console="off", disable_git=True),
        )
        axis = "episode" if self.stage == "ppo" else "step"
        run.define_metric(axis)
        run.define_metric("*", step_metric=axis)
        return run


def _git_commit() -> str | None:
    """The commit of this code, read from .git without starting a subprocess."""
    git = Path(__file__).parents[1] / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        return (git / head[5:]).read_text().strip() if head.startswith("ref: ") else head
    except OSError:
        return None
