"""A last look at the composed configuration before Hydra writes it down: presets may hold what the command line may not.

A Hydra callback, because Hydra makes the run folder and saves the configuration there before it calls run.py's main.
"""

import sys
from contextlib import suppress

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runner.checks import secrets
from runner.config import check_name
from runner.errors import UserError


class Gate(Callback):
    def on_run_start(self, config: DictConfig, **kwargs) -> None:
        """End the command when a secret would be saved, or the name of the run leads out of runs/."""
        try:
            secrets.refuse_in_config(OmegaConf.to_container(config))
            with suppress(OmegaConfBaseException):  # an unknown interpolation is reported by those who need its value
                secrets.refuse_in_config({"name": config.name})
                check_name(str(config.name))
        except (UserError, ValueError) as error:
            sys.exit(f"error: {error}")  # Hydra makes warnings of all exceptions but this one

    on_multirun_start = on_run_start
