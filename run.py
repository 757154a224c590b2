"""The entry point: `python run.py model=opt1.3b hardware=a6000`. Hydra composes conf/; we check it, plan it and run each step.

In this order: runner/cli/overrides.py checks the words typed; Hydra composes conf/ with them; runner/cli/hydra_callback.py looks at the
result before Hydra saves it; `load` makes it the Config, `plan` the steps; `prepare` gets data and tokenizers ready, `launch` runs each
step in processes of its own, and a summary ends the run.

Imports neither torch nor transformers, so that --help, --cfg, completion and dry_run answer at once; training happens in worker
processes (runner/worker.py). README.md says what to type.
"""

import logging
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from runner.cli.overrides import check_overrides, hydra_error_message
from runner.config.loading import load
from runner.config.schema import Config
from runner.durable.resume import refuse_changed_config
from runner.errors import UserError
from runner.files import remove_unused
from runner.forecast.fit import refuse_the_impossible
from runner.forecast.show import show_forecast
from runner.formatting import short
from runner.plan import Step, plan
from runner.plan_view import show, show_details
from runner.watch import stop

CONF = Path(__file__).parent / "conf"
WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0") or "debug=true" in sys.argv
# Without it Hydra prints a shortened traceback of its own and exits; we want the exception itself
os.environ["HYDRA_FULL_ERROR"] = "1"


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> None:
    try:
        run(composed)
    except UserError as error:
        # Now, not at the end: in a sweep the other jobs still run
        print_error(f"error: {error}")
        if WANTS_TRACEBACK or composed.get("debug"):
            raise
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise Reported(*error.args) from error
        sys.exit(1)
    except stop.Stopped as stopped:
        print_error(str(stopped))
        sys.exit(stop.RESUME_ME)  # ends a whole sweep
    except BrokenPipeError:
        discard_stdout()
    finally:
        if HydraConfig.get().mode == RunMode.RUN or composed.get("dry_run") is True:
            remove_unused(Path(HydraConfig.get().runtime.output_dir))


def run(composed: DictConfig) -> None:
    """One run: check, plan, prepare, train what is missing, sum up."""
    started = time.monotonic()
    cfg = load(composed)
    stop.limit(cfg.time_limit_seconds)
    steps = plan(cfg)
    show(cfg, steps)
    changed = [step for step in steps if step.earlier and cfg.resume == "auto" and HydraConfig.get().mode == RunMode.RUN]
    if cfg.dry_run:
        show_forecast(cfg, steps, {})
        show_details(cfg, steps)
        return note_refusal(cfg, changed)
    refuse_the_impossible(cfg, [step.stage for step in steps if not step.done])
    for step in changed:
        refuse_changed_config(cfg, step.stage, step.earlier)

    # Not at the top: --help and dry_run can do without
    from runner.launch import launch
    from runner.prepare import prepare
    from runner.reporting.summary import lacking_for_ppo, show_summary
    from runner.watch.machine import naming_full_disks

    hydra_facts = HydraConfig.get()
    run_dir = Path(hydra_facts.runtime.output_dir)
    with naming_full_disks(cfg.store):
        inputs = prepare(cfg, steps)
        show_forecast(cfg, steps, inputs)
        reused = set()
        for step in steps:
            if not launch(cfg, step, inputs.get(step.stage), run_dir):
                reused.add(step.stage)
        took = time.monotonic() - started
        sources = hydra_facts.runtime.config_sources
        flags = [f"--config-dir={short(source.path)}" for source in sources if source.provider == "command-line"]
        overrides, lacking = list(hydra_facts.overrides.task), lacking_for_ppo(cfg.model)
        show_summary(cfg.name, steps, reused, run_dir, overrides, took=took, flags=flags, lacking=lacking)


def note_refusal(cfg: Config, changed: list[Step]) -> None:
    """For dry_run: that the run itself would be refused, because it interrupts another configuration."""
    try:
        for step in changed:
            refuse_changed_config(cfg, step.stage, step.earlier)
    except UserError as error:
        print(f"\nnote: this is only a plan. Without dry_run it is refused: {error}")


def print_error(text: str) -> None:
    with suppress(BrokenPipeError):  # nobody reads stderr any more: the exit code still counts
        print(f"\n{text}", file=sys.stderr, flush=True)


def discard_stdout() -> None:
    """The reader of `run.py dry_run=true | head` has left: send the rest, and what Python flushes at exit, to /dev/null."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Reported(UserError):
    """A UserError whose message has already been printed."""


if __name__ == "__main__":
    stop.listen()
    logging.raiseExceptions = False  # `--info | head`: logging would print a traceback for each line that nobody reads
    try:
        sys.argv[1:] = check_overrides(sys.argv[1:], CONF)
    except UserError as error:
        if WANTS_TRACEBACK:
            raise
        sys.exit(f"error: {error}")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # in the output of --help, --cfg or --info, which Hydra prints
        discard_stdout()
    except KeyboardInterrupt as interrupt:
        sys.exit(interrupt.args[0] if interrupt.args else 128 + 2)
    except Reported:
        sys.exit(1)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        if WANTS_TRACEBACK:
            raise
        sys.exit(f"error: {hydra_error_message(error)}")
