"""A last look at the composed configuration before Hydra saves it: a preset may hold what suggest.py refuses on the command line.

A Hydra callback, because Hydra makes the run folder and saves the configuration there before it calls run.py's main.
"""

import sys
from contextlib import suppress

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runner.checks import secrets
from runner.errors import UserError
from runner.limits import check_name


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
        """The same for a sweep; and refuse resume=force, since no job could tell which checkpoint is its own."""
        if config.resume == "force":
            sys.exit("error: resume=force continues the last interrupted step, which in a sweep may be any job's: force one run at a time")
        self.on_run_start(config)
