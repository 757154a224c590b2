"""A last look at the composed configuration before Hydra saves it: a preset may hold what overrides.py refuses on the command line.

A Hydra callback, because Hydra makes the run folder and saves the configuration there before it calls run.py's main. All jobs of a sweep
are checked here, so that a mistake in the last one is reported now and not after a night.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from runner.checks import secrets
from runner.config.limits import check_name
from runner.config.loading import load
from runner.errors import UserError
from runner.plan import plan

SHOWN = 8  # errors of a sweep's jobs
MANY = 30  # jobs, at three to the second, that are not checked without a word


class CheckBeforeSaving(Callback):
    def on_run_start(self, config: DictConfig, **kwargs) -> None:
        refuse_to_save(config)
        make_folder(config, "run")

    def on_multirun_start(self, config: DictConfig, **kwargs) -> None:
        """The same for a sweep and each of its jobs; and refuse resume=force, since no job could tell which checkpoint is its own."""
        if config.resume == "force":
            sys.exit("error: resume=force continues the last interrupted step, which in a sweep may be any job's: force one run at a time")
        refuse_to_save(config)
        if lists_its_jobs(config.hydra):
            _add_keys(config)
            try:
                refuse_jobs(config)
            except (HydraException, OmegaConfBaseException):  # words that it cannot read are refused by the sweeper itself
                return
        make_folder(config, "sweep")


def refuse_to_save(config: DictConfig) -> None:
    """Exit when a secret would be saved, the run's name leads out of runs/, or relative paths would start from another folder."""
    try:
        if config.hydra.job.chdir:
            raise UserError("hydra.job.chdir=true: store and dataset.path are relative to the folder that you are in. Leave it out")
        secrets.refuse_in_config(OmegaConf.to_container(config))
        with suppress(OmegaConfBaseException):  # an unknown interpolation is reported where its value is needed
            secrets.refuse_in_config({"name": config.name})
            check_name(str(config.name))
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")  # Hydra turns every other exception into a warning


def make_folder(config: DictConfig, mode: str) -> None:
    """Make the folder of this command, as Hydra is about to do, and exit where that is impossible. mode: run or sweep.

    A folder named after the time is of one command: another one that starts in the same second waits for the next.
    """
    dated = "${now:" in OmegaConf.to_container(config.hydra[mode])["dir"]
    try:
        while True:
            folder = Path(config.hydra[mode].dir)
            try:
                folder.mkdir(parents=True, exist_ok=not dated)
                break
            except FileExistsError:
                if not dated:
                    raise
            time.sleep(0.2)
            OmegaConf.clear_cache(config)  # where OmegaConf keeps the time
        with TemporaryFile(dir=folder) as file:
            file.write(bytes(2**16))  # about what Hydra will write there
    except OmegaConfBaseException:  # an unknown interpolation: Hydra says so
        return
    except OSError as error:
        what = f"{error.filename or folder} cannot be created here ({error.strerror})"
        sys.exit(f"error: {what}: call run.py from a folder of yours, or type hydra.{mode}.dir=/a/folder/of/yours")


def _add_keys(config: DictConfig) -> None:
    """Write ++ before the keys of hydra.sweeper.params, as overrides.py does on the command line: a preset leaves out what has a default.

    A key that does not exist is refused by `load`.
    """
    groups = GlobalHydra.instance().config_loader().list_groups("")
    typed = {word.partition("=")[0].lstrip("+") for word in config.hydra.overrides.task}
    params = {}
    for key, value in (config.hydra.sweeper.get("params") or {}).items():
        if key in typed:  # and so overridden, which Hydra would not see behind the ++
            continue
        as_it_is = key in groups or "/" in key or key.startswith(("+", "~", "hydra."))
        params[key if as_it_is else f"++{key}"] = value
    with open_dict(config):
        config.hydra.sweeper.params = params


def lists_its_jobs(hydra: DictConfig) -> bool:
    """Whether the sweep is by Hydra's own sweeper; another one chooses its values as it goes. hydra: that block of the configuration."""
    return str(hydra.sweeper.get("_target_")).endswith(".BasicSweeper")


def jobs_of(params: Mapping, words: Sequence[str], loader=None) -> list[list[str]]:
    """The overrides of each job of a sweep that lists them. params: hydra.sweeper.params; words: hydra.overrides.task."""
    every = [*(f"{key}={value}" for key, value in params.items()), *words]
    (jobs,) = BasicSweeper.split_arguments(OverridesParser.create(loader).parse_overrides(every), None)
    return jobs


def refuse_jobs(config: DictConfig) -> None:
    """Exit when a job of the sweep has a secret, or what `load` or the plan refuses: nothing has been started yet."""
    loader = GlobalHydra.instance().config_loader()
    words = OmegaConf.to_container(config.hydra.overrides.task)  # interpolations as they are: each job has its own values for them
    jobs = jobs_of(config.hydra.sweeper.get("params") or {}, words, loader)
    if len(jobs) >= MANY:
        print(f"checking {len(jobs)} jobs", file=sys.stderr, flush=True)
    refused = {}  # message -> the numbers of its jobs
    for number, job in enumerate(jobs):
        if error := refusal(loader, config, job):
            refused.setdefault(error, []).append(number)
    bad = sum(map(len, refused.values()))
    if len(refused) == 1 and bad == len(jobs):
        sys.exit(f"error: {next(iter(refused))}")
    if refused:
        lines = [f"  {error} ({numbered(numbers)})" for error, numbers in refused.items()]
        more = [f"  and {len(lines) - SHOWN} more errors"] if len(lines) > SHOWN else []
        some = f"{bad} of the {len(jobs)} jobs of this sweep cannot run, so none was started"
        head = f"error: {some if bad < len(jobs) else 'no job of this sweep can run'}:"
        sys.exit("\n".join([head, *lines[:SHOWN], *more]))


def refusal(loader, config: DictConfig, job: list[str]) -> str | None:
    """Why a job cannot run; None if nothing is known against it."""
    try:
        whole = loader.load_sweep_config(config, job)
        secrets.refuse_in_config(OmegaConf.to_container(whole))
        plan(load(OmegaConf.masked_copy(whole, [key for key in whole if key != "hydra"])))
    except (UserError, OSError) as error:
        # Of hydra.job.num, say, Hydra knows the value only when the job starts
        return None if isinstance(error.__cause__, InterpolationResolutionError) else str(error)
    except (HydraException, OmegaConfBaseException):  # what cannot be composed is refused by the sweeper itself
        return None
    return None


def numbered(jobs: list[int]) -> str:
    """'job 3', 'jobs 0, 1, 2 and 27 more'"""
    more = f" and {len(jobs) - 3} more" if len(jobs) > 3 else ""
    return f"job{'s' * (len(jobs) > 1)} {', '.join(map(str, jobs[:3]))}{more}"
