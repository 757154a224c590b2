"""A last look at the composed configuration before Hydra saves it: a preset may hold what suggest.py refuses on the command line.

A Hydra callback, because Hydra makes the run folder and saves the configuration there before it calls run.py's main. Of a sweep all
jobs are looked at here: what the last one would be refused for is not learnt after a night.
"""

import sys
from contextlib import suppress
from itertools import product

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runner.checks import secrets
from runner.door import load
from runner.errors import UserError
from runner.limits import check_name

SHOWN = 8  # errors of a sweep's jobs


class Gate(Callback):
    def on_run_start(self, config: DictConfig, **kwargs) -> None:
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

    def on_multirun_start(self, config: DictConfig, **kwargs) -> None:
        """The same for a sweep and each of its jobs; and refuse resume=force, since no job could tell which checkpoint is its own."""
        if config.resume == "force":
            sys.exit("error: resume=force continues the last interrupted step, which in a sweep may be any job's: force one run at a time")
        self.on_run_start(config)
        # Another sweeper chooses its values as it goes
        if str(config.hydra.sweeper.get("_target_")).endswith(".BasicSweeper"):
            with suppress(HydraException, OmegaConfBaseException):  # what cannot be composed is refused by the sweeper itself
                refuse_jobs(config)


def refuse_jobs(config: DictConfig) -> None:
    """Exit when a job of the sweep has a key or value that the door refuses: nothing has been started yet."""
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    values = {}  # of each key, as words; the command line wins over a sweep's preset
    for override in OverridesParser.create().parse_overrides([*params, *config.hydra.overrides.task]):
        key, swept = override.get_key_element(), override.is_discrete_sweep()
        values[key] = list(override.sweep_string_iterator()) if swept else [override.get_value_element_as_str()]
    jobs = [[f"{key}={value}" for key, value in zip(values, row, strict=True)] for row in product(*values.values())]
    refused = {}  # message -> the numbers of its jobs
    for number, words in enumerate(jobs):
        try:
            whole = compose(config.hydra.job.config_name, [*config.hydra.overrides.hydra, *words], return_hydra_config=True)
            secrets.refuse_in_config(OmegaConf.to_container(whole))
            load(OmegaConf.masked_copy(whole, [key for key in whole if key != "hydra"]))
        except UserError as error:
            refused.setdefault(str(error), []).append(number)
    if len(refused) == 1 and jobs_of(refused) == len(jobs):
        sys.exit(f"error: {next(iter(refused))}")
    if refused:
        lines = [f"  {error} ({numbered(numbers)})" for error, numbers in refused.items()]
        more = [f"  and {len(lines) - SHOWN} more errors"] if len(lines) > SHOWN else []
        some = f"{jobs_of(refused)} of the {len(jobs)} jobs of this sweep cannot run, so none was started"
        head = f"error: {some if jobs_of(refused) < len(jobs) else 'no job of this sweep can run'}:"
        sys.exit("\n".join([head, *lines[:SHOWN], *more]))


def jobs_of(refused: dict[str, list[int]]) -> int:
    return sum(map(len, refused.values()))


def numbered(jobs: list[int]) -> str:
    """'job 3', 'jobs 0, 1, 2 and 27 more'"""
    more = f" and {len(jobs) - 3} more" if len(jobs) > 3 else ""
    return f"job{'s' * (len(jobs) > 1)} {', '.join(map(str, jobs[:3]))}{more}"
