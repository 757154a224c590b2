"""A last look at the composed configuration before Hydra writes it down: presets may hold what the command line may not.

A Hydra callback, because Hydra makes the run folder and saves the configuration there before it calls run.py's main.
"""

import sys
from contextlib import suppress

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runner.checks import secrets
from runner.checks.limits import check_name
from runner.errors import UserError


class Gate(Callback):
    def on_run_start(self, config: DictConfig, **kwargs) -> None:
        """End the command when a secret would be saved, the name of the run leads out of runs/, or paths would count from elsewhere."""
        try:
            if config.hydra.job.chdir:
                raise UserError("hydra.job.chdir=true: store and dataset.path count from the folder that you are in. Leave it out")
            secrets.refuse_in_config(OmegaConf.to_container(config))
            with suppress(OmegaConfBaseException):  # an unknown interpolation is reported by those who need its value
                secrets.refuse_in_config({"name": config.name})
                check_name(str(config.name))
        except (UserError, ValueError) as error:
            sys.exit(f"error: {error}")  # Hydra makes warnings of all exceptions but this one

    def on_multirun_start(self, config: DictConfig, **kwargs) -> None:
        """The same for a sweep, and end it when no job could know which checkpoint is its own."""
        if config.resume == "force":
            sys.exit("error: resume=force goes on from what was worked at last, which in a sweep may be any job's: force one run at a time")
        self.on_run_start(config)
