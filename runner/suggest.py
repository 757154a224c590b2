"""Typos on the command line, found before Hydra runs: Hydra has no did-you-mean, and its hint to add a `+` is harmful here."""

import re
from pathlib import Path

import yaml

from runner.config import STAGES, did_you_mean, known_keys
from runner.errors import UserError


def check_overrides(argv: list[str], conf: Path) -> None:
    """Raise UserError for an unknown key, group option, or a key of a stage that the chosen one does not consume."""
    groups = {p.name: sorted(f.stem for f in p.glob("*.yaml")) for p in conf.iterdir() if p.is_dir()}
    known = known_keys() + list(groups)
    chosen = _chosen_stage(argv, conf)
    for argument in argv:
        match = re.fullmatch(r"(\+{0,2}|~?)([A-Za-z_][\w./@-]*)=(.*)", argument, re.DOTALL)
        if not match or match[2].startswith(("hydra.", "hydra/")):
            _check_bare(argument, known)
            continue
        _, key, value = match.groups()
        if key in groups:
            _check_options(key, value, groups[key])
            continue
        if not _is_known(key, known):
            raise UserError(f"unknown key {key}{did_you_mean(key, known)}. `python run.py --cfg job` prints all keys")
        block = key.split(".")[0]
        if block in STAGES and "." in key and block not in _consumed(chosen, conf):
            raise UserError(f"{key}: stage={chosen} does not use the {block} block. Leave it out, or type stage={block}")


def _check_bare(argument: str, known: list[str]) -> None:
    """A word that is neither an option nor key=value."""
    if not argument.startswith(("-", "hydra", "+hydra", "~")) and "=" not in argument and not argument.isidentifier():
        raise UserError(f"{argument!r} is no override: type key=value{did_you_mean(argument, known)}")


def _check_options(group: str, value: str, options: list[str]) -> None:
    for option in value.strip("[]'\"").split(","):
        if option and option != "null" and option not in options and "(" not in value:
            raise UserError(f"{group}={option} does not exist{did_you_mean(option, options)}. There are: {', '.join(options)}")


def _is_known(key: str, known: list[str]) -> bool:
    """Whether a dotted key is in the schema; `x.*` allows anything below x."""
    parts = key.split(".")
    for pattern in known:
        pieces = pattern.split(".")
        if len(pieces) == len(parts) and all(p in ("*", k) for p, k in zip(pieces, parts, strict=True)):
            return True
        if pieces[-1] == "*" and "sources" not in pieces and parts[: len(pieces) - 1] == pieces[:-1]:
            return True
    return False


def _chosen_stage(argv: list[str], conf: Path) -> str:
    named = [a.removeprefix("stage=") for a in argv if a.startswith("stage=")]
    for argument in argv:
        if argument.startswith("experiment=") and not named:
            path = conf / "experiment" / f"{argument.removeprefix('experiment=')}.yaml"
            defaults = (yaml.safe_load(path.read_text()) or {}).get("defaults", []) if path.exists() else []
            named = [d["override /stage"] for d in defaults if isinstance(d, dict) and "override /stage" in d]
    return named[-1].split(",")[0] if named else "ppo"


def _consumed(stage: str, conf: Path) -> set[str]:
    """A stage and those in the defaults list of its file."""
    path = conf / "stage" / f"{stage}.yaml"
    defaults = (yaml.safe_load(path.read_text()) or {}).get("defaults", []) if path.exists() else []
    return {stage}.union(*(_consumed(d, conf) for d in defaults if d != "_self_"))
