"""Typos on the command line, found before Hydra runs: Hydra has no did-you-mean, and its hint to add a `+` is harmful here."""

import importlib.metadata
import re
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from runner.checks import secrets
from runner.config import STAGES, check_name
from runner.door import broken_yaml, known_keys, read_yaml
from runner.errors import UserError, did_you_mean

# Options of Hydra that take the next word
TAKES_A_WORD = ("-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir", "-i", "--info")
LAUNCHERS = {"joblib": "hydra-joblib-launcher", "submitit": "hydra-submitit-launcher"}


def check_overrides(argv: list[str], conf: Path) -> list[str]:
    """Raise UserError for an unknown key, group option, or a key of a stage that the chosen one does not consume.

    Returns argv as Hydra wants it: keys inside our free mappings (hardware.deepspeed, say) get the ++ that Hydra asks for.
    """
    secrets.refuse_in_overrides(argv)
    groups = {p.name: sorted(f.stem for f in p.glob("*.yaml")) for p in conf.iterdir() if p.is_dir()}
    chosen = _chosen_stage(argv, conf)
    sweeps = any(a in ("-m", "--multirun") or a.startswith(("sweep=", "hydra.mode=")) for a in argv)
    parser = OverridesParser.create()
    checked = []
    for before, argument, after in zip(["", *argv], argv, [*argv[1:], ""], strict=False):
        if not argument.startswith("-") and before not in TAKES_A_WORD:
            if "=" not in argument[1:] and not argument.startswith("~"):
                raise UserError(_no_override(before, argument, after, [*known_keys(), *groups]))
            override = _parse(parser, argument)
            _check_sweep(override, sweeps)
            _check_names(override)
            argument = _check_key(argument, override, groups, chosen, conf)
        checked.append(argument)
    return checked


def _no_override(before: str, argument: str, after: str, known: list[str]) -> str:
    """What to type in place of a word without =, from the words around it."""
    if argument == "help":
        return "'help' is no override: python run.py --help explains, and --cfg job prints all keys"
    if before.startswith("--") and "=" not in before:
        return f"{before} {argument}: overrides have no dashes. Type {before.lstrip('-')}={argument}"
    if argument in known:
        return f"{argument!r} has no value: type {argument}={'...' if '=' in after or not after else after}"
    return f"{argument!r} is no override: type key=value{did_you_mean(argument.strip('='), known)}"


def _parse(parser: OverridesParser, argument: str):
    try:
        return parser.parse_override(argument)
    except HydraException as error:
        raise UserError(f"cannot read {argument} ({str(error).splitlines()[0]}). {_quoting(argument)}") from error


def _quoting(argument: str) -> str:
    """How to type a value that Hydra, or the shell before it, has misread."""
    key, _, value = argument.partition("=")
    if value.startswith("{"):
        return f"A mapping with spaces wants quotes around it: {key}='{{name: value, other: value}}'"
    if value.startswith("["):
        return f"A list is closed by ], and with spaces it wants quotes around it: {key}='[one, two]'"
    return f"Brackets, spaces, commas, = and letters beyond a to z in a value want quotes: '{key}=\"{value}\"'"


def _check_sweep(override, sweeps: bool) -> None:
    if override.is_sweep_override() and not sweeps:
        raise UserError(f"{override.input_line} names several values: type -m for a sweep, or quote the comma: 'key=\"a,b\"'")


def _check_names(override) -> None:
    """The names of a sweep's jobs: Hydra makes their folders before anything else looks at them."""
    if override.key_or_group != "name":
        return
    names = override.sweep_string_iterator() if override.is_discrete_sweep() else [str(override.value())]
    for name in names:
        if "${" in name:  # known only when all is composed: runner/gate.py looks again
            continue
        try:
            check_name(name.strip("'\""))
        except ValueError as error:
            raise UserError(str(error)) from error


def _check_key(argument: str, override, groups: dict[str, list[str]], chosen: str, conf: Path) -> str:
    key, value = override.key_or_group, argument.partition("=")[2]
    known = known_keys() + list(groups)
    if key == "hydra/launcher":
        _check_launcher(value)
    if key.startswith(("hydra.", "hydra/")):
        return argument
    if key in groups:
        if argument.startswith("+"):
            raise UserError(f"{argument}: there is one already, or a place for it. Type {argument.lstrip('+')}")
        _check_options(key, value, groups[key])
        return argument
    if not _is_known(key, known):
        raise UserError(f"unknown key {key}{did_you_mean(key, known)}. `python run.py --cfg job` prints all keys")
    if value.startswith("[") and any(name.startswith(f"{key}.") for name in known):
        raise UserError(f"{argument}: {key} is a mapping of names to values: type {key}='{{name: value}}'")
    block = key.split(".")[0]
    if block in STAGES and "." in key and block not in _consumed(chosen, conf):
        raise UserError(f"{key}: stage={chosen} does not use the {block} block. Leave it out, or type stage={block}")
    adds = _is_free(key, known) or (value.startswith("{") and (f"{key}.*" in known or key.startswith("dataset.sources.")))
    return f"++{argument}" if adds and argument.startswith(key) else argument


def _check_launcher(name: str) -> None:
    package = next((package for prefix, package in LAUNCHERS.items() if name.startswith(prefix)), None)
    if package and not any(importlib.metadata.distributions(name=package)):
        raise UserError(f"hydra/launcher={name} is not installed: type .venv/bin/pip install -c constraints.txt -e '.[sweep]'")


def _check_options(group: str, value: str, options: list[str]) -> None:
    if value.startswith("[") and group != "experiment":  # of which several can be laid over each other
        raise UserError(
            f"{group}={value}: one {group} at a time. Type {group}=..., or -m {group}={value.strip('[]')} for one after the other"
        )
    for option in value.strip("[]'\"").split(","):
        absent = option == "null" and group in ("experiment", "sweep")
        if not absent and option.strip() not in options and "(" not in value:
            raise UserError(f"{group}={option} does not exist{did_you_mean(option, options)}. There are: {', '.join(options)}")


def _is_known(key: str, known: list[str]) -> bool:
    """Whether a dotted key is in the schema; `x.*` allows anything below x."""
    parts = key.split(".")
    return _is_free(key, known) or any(_fits(pattern.split("."), parts) for pattern in known)


def _is_free(key: str, known: list[str]) -> bool:
    """Whether a key lies inside a mapping whose keys are not ours to know: a DeepSpeed block, a model's shape, a field map."""
    parts = key.split(".")
    frees = [pattern.split(".")[:-1] for pattern in known if pattern.endswith(".*") and pattern != "dataset.sources.*"]
    return any(len(parts) > len(free) and _fits(free, parts[: len(free)]) for free in frees)


def _fits(pattern: list[str], parts: list[str]) -> bool:
    return len(pattern) == len(parts) and all(p in ("*", k) for p, k in zip(pattern, parts, strict=True))


def _chosen_stage(argv: list[str], conf: Path) -> str:
    named = [a.removeprefix("stage=") for a in argv if a.startswith("stage=")]
    for argument in argv:
        if argument.startswith(("experiment=", "sweep=")) and not named:
            group, _, name = argument.partition("=")
            path = conf / group / f"{name}.yaml"
            defaults = read_yaml(path).get("defaults", []) if path.exists() else []
            named = [d["override /stage"] for d in defaults if isinstance(d, dict) and "override /stage" in d]
    return named[-1].split(",")[0] if named else "ppo"


def _consumed(stage: str, conf: Path) -> set[str]:
    """A stage and those in the defaults list of its file."""
    path = conf / "stage" / f"{stage}.yaml"
    defaults = read_yaml(path).get("defaults", []) if path.exists() else []
    return {stage}.union(*(_consumed(d, conf) for d in defaults if d != "_self_"))


def in_words(error: Exception) -> str:
    """What Hydra or OmegaConf has to say, without the hint to add a `+`: it would add a key that nothing reads."""
    if isinstance(error, yaml.YAMLError):
        return broken_yaml(error)
    found = re.search(r"Could not override '(.+?)'", str(error))
    if not found:
        return re.split(r"\n\s*full_key:|\n\s*Config search path:", str(error))[0].rstrip()
    key = found[1]
    if key.startswith(("dataset.path", "dataset.fields")):
        return f"{key}: the chosen data set names its own source. Type dataset=jsonl (a file) or dataset=hub beside it"
    return f"{key} is not there to be changed in what you chose. The same command with --cfg all shows what is"
