"""One table over the jobs of a multirun: what each one changed and what came of it. conf/config.yaml names it under hydra.callbacks.

A Hydra callback, and not a list in run.py, because the jobs may run anywhere (joblib, submitit): each leaves a summary.json in its
folder, or error.txt if it fails, and Hydra calls this on the machine that started them. A folder with neither: the
job was stopped or killed.
"""

import atexit
import csv
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write
from rich.console import Console

from runner.checks.secrets import redact
from runner.cli.hydra_callback import jobs_of, lists_its_jobs
from runner.errors import UserError
from runner.files import remove_unused
from runner.formatting import duration, num, pct, short
from runner.reporting.report import Section, clip, markdown, print_sections
from runner.reporting.summary import override_key

# header, keys in summary.json (before -> after), how a value is written
COLUMNS = (
    ("SFT ppl", ("sft/perplexity_after",), num),
    ("RM acc", ("reward/accuracy",), pct),
    ("DPO acc", ("dpo/accuracy",), pct),
    ("chosen logp", ("dpo/chosen_logratio",), partial(num, sign="+")),
    ("score", ("ppo/before/score", "ppo/after/score"), num),
    ("KL", ("ppo/after/kl",), num),
    ("length", ("ppo/after/length",), num),
    ("judge", ("ppo/after/judge",), num),
)
# How many the columns rest on, and the key in summary.json
COUNTED = {"RM on {} pairs": "reward/eval_pairs", "DPO on {} pairs": "dpo/eval_pairs", "PPO on {} prompts": "ppo/eval_prompts"}
# In the folder of a failed job
ERROR = "error.txt"
ERROR_LIMIT = 300  # characters of it under the table


class SweepTable(Callback):
    def on_multirun_start(self, config: DictConfig, **kwargs) -> None:
        keep_together(config)
        # When a job has failed Hydra raises its error and skips on_multirun_end: then the table comes as the process exits
        atexit.register(self.on_multirun_end, config=config)

    def on_multirun_end(self, config: DictConfig, **kwargs) -> None:
        atexit.unregister(self.on_multirun_end)
        if OmegaConf.select(config, "dry_run"):
            remove_unused(Path(config.hydra.sweep.dir).absolute())
        else:
            show_sweep(Path(config.hydra.sweep.dir))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs) -> None:
        """Keep the error of a failed job: Hydra raises that of the first one alone, when all have ended."""
        folder = Path(config.hydra.runtime.output_dir)
        if job_return.status != JobStatus.FAILED or not folder.is_dir():  # a dry run has removed it
            return
        error = job_return._return_value  # the property would raise it
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        (folder / ERROR).write_text(redact(text) + "\n", encoding="utf-8")


def keep_together(config: DictConfig) -> None:
    """One folder for all jobs, also of a sweep over `name`, or over experiments that set it: Hydra would ask each job for its own."""
    folder = str(config.hydra.sweep.dir).replace("\\", "\\\\").replace("'", "\\'")
    with read_write(config):
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{folder}'")


@dataclass(frozen=True)
class Job:
    number: str
    folder: Path
    facts: dict | None  # None: not done
    overrides: dict[str, str]
    error: str | None  # the first line; None: done or stopped

    @property
    def state(self) -> str:
        if self.facts:
            return "done"
        return "stopped" if self.error is None else "failed"


def show_sweep(sweep_dir: Path, console: Console | None = None) -> None:
    """Print the table of all jobs under sweep_dir, and write it to sweep.md (as printed) and sweep.csv (six decimals)."""
    jobs = read_jobs(sweep_dir)
    if not jobs:
        return
    parts = [sweep_section(sweep_dir, jobs)]
    (sweep_dir / "sweep.md").write_text(markdown(parts), encoding="utf-8")
    with (sweep_dir / "sweep.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(csv_rows(jobs))
    print_sections(parts, console or Console())


def read_jobs(sweep_dir: Path) -> list[Job]:
    folders = [
        f for f in sweep_dir.glob("*") if (f / "summary.json").exists() or (f / ".hydra").exists() or (f.is_dir() and f.name.isdigit())
    ]
    return [read_job(f) for f in sorted(folders, key=lambda f: (int(f.name) if f.name.isdigit() else 10**9, f.name))]


def read_job(folder: Path) -> Job:
    """A job's facts and overrides; those of one that is not done are known from the list that Hydra itself has saved."""
    summary, saved, failure = folder / "summary.json", folder / ".hydra" / "overrides.yaml", folder / ERROR
    facts, overrides, error = None, [], None
    if summary.exists():
        facts = json.loads(summary.read_text(encoding="utf-8"))
        overrides = facts["overrides"]
    elif saved.exists():
        overrides = OmegaConf.to_container(OmegaConf.load(saved))
    if not facts and failure.exists():
        error = failure.read_text(encoding="utf-8").partition("\n")[0]
    return Job(folder.name, folder, facts, {override_key(o): o.partition("=")[2] for o in overrides}, error)


def swept(jobs: Sequence[Job]) -> list[str]:
    """The overrides that are not the same in all jobs: what the sweep is about."""
    keys = dict.fromkeys(key for job in jobs for key in job.overrides)
    return [key for key in keys if len({job.overrides.get(key) for job in jobs}) > 1]


def columns_with_values(jobs: Sequence[Job]) -> list[tuple]:
    """The columns in which some job has something to say; SFT, mostly shared, only where it differs or is all that a job has."""
    done = [job.facts for job in jobs if job.facts]
    seen = {keys: [facts.get(keys[-1]) for facts in done] for _, keys, _ in COLUMNS}
    some = [column for column in COLUMNS if any(value is not None for value in seen[column[1]])]
    others = [column for column in some if not column[1][0].startswith("sft/")]
    if any(all(facts.get(keys[-1]) is None for _, keys, _ in others) for facts in done):
        return some
    return [column for column in some if column in others or len(set(seen[column[1]]) - {None}) > 1]


def sweep_section(sweep_dir: Path, jobs: Sequence[Job]) -> Section:
    keys, columns = swept(jobs), columns_with_values(jobs)
    rows, cells = [], [column_cells(jobs, keys_of, show) for _, keys_of, show in columns]
    for job, *values in zip(jobs, *cells, strict=True):
        facts = job.facts or {}
        time = duration(facts.get("seconds") or None) if job.facts else job.state  # "-": all was trained before
        rows.append([job.number, *(job.overrides.get(key, "-") for key in keys), *values, time])
    left = [job for job in jobs if not job.facts]
    states = Counter(job.state for job in left)
    wanted = max(len(jobs), wanted_jobs(sweep_dir))
    if wanted > len(jobs):
        states["not started"] = wanted - len(jobs)
    title = ", ".join([f"Sweep of {wanted} job{'s' * (wanted != 1)}", *(f"{n} {state}" for state, n in sorted(states.items()))])
    places = [("table", short(sweep_dir / "sweep.md")), ("numbers", short(sweep_dir / "sweep.csv"))]
    places += [(f"job {job.number} {job.state}", short(job.folder)) for job in left]
    header = ("job", *short_names(keys), *(name for name, _, _ in columns), "time")
    errors = [f"job {job.number}: {clip(job.error, ERROR_LIMIT)}" for job in left if job.error]
    return Section(title, header=header, rows=rows, notes=[*held_out(jobs), *units(jobs), *errors], literal=places)


def wanted_jobs(sweep_dir: Path) -> int:
    """How many jobs the sweep was to have, by the multirun.yaml that Hydra leaves. 0: unknown, another sweeper chooses as it goes."""
    saved = sweep_dir / "multirun.yaml"
    if not saved.exists():
        return 0
    hydra = OmegaConf.load(saved).hydra
    if not lists_its_jobs(hydra):
        return 0
    sweeper, words = (OmegaConf.to_container(part) for part in (hydra.sweeper, hydra.overrides.task))  # interpolations are the jobs' own
    return len(jobs_of(sweeper["params"] or {}, words))


def column_cells(jobs: Sequence[Job], keys: Sequence[str], show: Callable) -> list[str]:
    """The cells of a column, with up to two further digits where rows that differ would otherwise read alike."""
    ways = [[shown(job.facts or {}, keys, partial(show, more=more)) for job in jobs] for more in range(3)]
    return max(ways, key=lambda cells: len(set(cells)))


def held_out(jobs: Sequence[Job]) -> list[str]:
    """On how many held-out pairs or prompts the columns rest."""
    counts = {name: {job.facts[key] for job in jobs if job.facts and job.facts.get(key)} for name, key in COUNTED.items()}
    said = [name.format(" to ".join(dict.fromkeys((num(min(n)), num(max(n)))))) for name, n in counts.items() if n]
    return [f"Held out: {', '.join(said)}."] if said else []


def units(jobs: Sequence[Job]) -> list[str]:
    """That scores do not compare where jobs have other SFT or reward models: a broken one may well gain the most over itself."""
    scales = {(job.facts["ppo/score_mean"], job.facts["ppo/score_std"]) for job in jobs if job.facts and "ppo/score_std" in job.facts}
    if len(scales) < 2:
        return []
    return ["Scores are relative to each job's own SFT and reward model: compare jobs that share both, or read the judge and the samples."]


def shown(facts: dict, keys: Sequence[str], show: Callable) -> str:
    return " -> ".join(show(facts.get(key)) for key in keys) if any(facts.get(key) is not None for key in keys) else "-"


def short_names(keys: Sequence[str]) -> list[str]:
    """Keys by their last parts where these are not ambiguous: ppo.kl_coef -> kl_coef."""
    last = [key.rpartition(".")[2] for key in keys]
    return [name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)]


def csv_rows(jobs: Sequence[Job]) -> list[list]:
    keys, columns = swept(jobs), columns_with_values(jobs)
    metrics = [key for _, keys_of, _ in columns for key in keys_of]
    rows = [["job", *keys, *metrics, "seconds", "state", "error"]]
    for job in jobs:
        facts = job.facts or {}
        values = [rounded(facts.get(key, "")) for key in (*metrics, "seconds")]
        rows.append([job.number, *(job.overrides.get(key, "") for key in keys), *values, job.state, job.error or ""])
    return rows


def rounded(value):
    """Round away noise around zero, such as a KL of 3.7e-09."""
    return round(value, 6) if isinstance(value, float) else value
