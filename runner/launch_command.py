"""The shell command that starts the workers of a step, and what it needs beside it."""

import shlex
import sys
from pathlib import Path

from runner.config.schema import Config, Hardware
from runner.errors import UserError


def command(cfg: Config, folder: Path) -> str:
    """The shell command that starts the workers of a step."""
    h = cfg.hardware
    if "{folder}" not in h.launch:
        raise UserError(f"hardware.launch={h.launch!r} does not say which step to work on: it must end with -m runner.worker {{folder}}")
    paths = {"python": sys.executable, "hostfile": h.hostfile, "folder": str(folder)}
    values = {name: shlex.quote(path) for name, path in paths.items()} | {"gpus": h.gpus, "nodes": h.nodes, "world": h.world_size}
    try:
        return h.launch.format(**values)
    except (KeyError, IndexError, ValueError) as error:
        known = ", ".join("{" + name + "}" for name in values)
        raise UserError(f"hardware.launch holds {error}: it may use {known}; double any other braces") from error


def over_ssh(h: Hardware) -> bool:
    """Whether the launch command starts workers over ssh. They inherit next to nothing of our environment."""
    return h.nodes > 1 and "{hostfile}" in h.launch


def missing_hostfile(cfg: Config) -> str | None:
    """What to type if the launch command reads a hostfile that does not exist."""
    h = cfg.hardware
    if not over_ssh(h) or Path(h.hostfile).is_file():
        return None
    return (
        f"hardware.hostfile={h.hostfile} does not exist (looked from {Path.cwd()}): write one line `machine slots={h.gpus}` into it for "
        f"each of the {h.nodes} machines, or type hardware.hostfile=/where/it/is"
    )
