"""The entry: `python run.py model=opt1.3b hardware=a6000`. Hydra composes conf/, we check it, plan it, and run each step.

Imports neither torch nor transformers, so that --help, --cfg, completion and dry_run answer at once; the training happens
in worker processes (runner/worker.py). README.md tells what to type.
"""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig

from runner.config import load
from runner.errors import UserError
from runner.plan import plan, show
from runner.suggest import check_overrides

CONF = Path(__file__).parent / "conf"


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> None:
    try:
        run(composed)
    except UserError as error:
        # In a sweep the other jobs go on, so the message must not wait for the end
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        if composed.get("debug"):
            raise
        raise Told from error


def run(composed: DictConfig) -> None:
    """One run: check, plan, prepare, train what is missing, sum up."""
    cfg = load(composed)
    steps = plan(cfg)
    show(cfg, steps, details=cfg.dry_run)
    if cfg.dry_run:
        return

    from runner.launch import launch
    from runner.prepare import prepare
    from runner.summary import show_summary

    hydra_facts = HydraConfig.get()
    run_dir = Path(hydra_facts.runtime.output_dir)
    inputs = prepare(cfg, steps)
    reused = {step.stage for step in steps if not launch(cfg, step, inputs.get(step.stage), run_dir)}
    show_summary(cfg.name, steps, reused, run_dir, list(hydra_facts.overrides.task))


class Told(Exception):
    """A UserError whose message has been printed."""


if __name__ == "__main__":
    wants_traceback = "HYDRA_FULL_ERROR" in os.environ or "debug=true" in sys.argv
    # Hydra would print a shortened traceback of its own and exit; we want the exception
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        check_overrides(sys.argv[1:], CONF)
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on from the last checkpoint")
    except Exception as error:
        if wants_traceback or not isinstance(error, Told | UserError | HydraException):
            raise
        if not isinstance(error, Told):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
