"""The only way from composed YAML to a Config, so that a wrong key, type or value is refused before anything starts."""

import difflib
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from runner.checks import secrets
from runner.checks.paths import SEVERAL
from runner.config.aliases import instead_of
from runner.config.schema import PARENTS, STAGES, Config, Source
from runner.errors import UserError, did_you_mean


def load(composed: DictConfig | str | Path) -> Config:
    """Turn composed YAML (Hydra's DictConfig, or the path of a saved one) into a checked Config.

    Raises:
        UserError: a key that does not exist, a value of the wrong type or out of range, a mandatory value that is missing.
    """
    from_command_line = isinstance(composed, DictConfig)
    if not from_command_line:
        composed = OmegaConf.create(read_yaml(Path(composed)))
    try:
        if missing := next(open_keys(OmegaConf.to_container(composed)), None):
            raise UserError(f"{missing} has no value: type {missing}=...")
        values = expand_home(OmegaConf.to_container(composed, resolve=True))
        if from_command_line:
            unescape_stops(values)
        secrets.refuse_in_config(values)
        chosen = values.get("stage")
        for stage in STAGES:  # an experiment may fill blocks that the chosen stage does not use
            if chosen in STAGES and stage not in (chosen, *PARENTS[chosen]):
                values.pop(stage, None)
        check_kinds(values)
        whole = OmegaConf.merge(OmegaConf.structured(Config), values)
        if missing := sorted(OmegaConf.missing_keys(whole)):
            _refuse_source_without_path(missing, list(whole.dataset.sources))
            raise UserError(f"{' and '.join(missing)} {'has' if len(missing) == 1 else 'have'} no value: type {missing[0]}=...")
        return OmegaConf.to_object(whole)
    except ConfigKeyError as error:
        key = error.full_key or str(error.key)
        raise UserError(unknown(key, chosen)) from error
    except OmegaConfBaseException as error:
        what = str(error).splitlines()[0]
        if wrong := re.fullmatch(r"Value '(.*)' (?:of type '.*' could not be converted to|is not a valid) (\w+).*", what):
            raise UserError(f"{error.full_key}={wrong[1]} must be {KINDS.get(wrong[2], wrong[2])}") from error
        raise UserError(f"{error.full_key}: {what}") from error
    except ValueError as error:
        raise UserError(str(error)) from error


def _refuse_source_without_path(missing: list[str], sources: list[str]) -> None:
    """Raise UserError where a path of a source is missing: on the command line its name may be misspelt."""
    without = [key.split(".")[2] for key in missing if key.startswith("dataset.sources.")]
    if without:
        has = [name for name in sources if name not in without]
        raise UserError(f"dataset.sources.{without[0]} has no path{instead_of_source(without[0], has)}")


def instead_of_source(name: str, there: list[str]) -> str:
    """The end of the message for a source that does not exist."""
    listed = f"The sources are {', '.join(sorted(there))}. " if there else ""
    return f"{did_you_mean(name, there)}. {listed}One of your own: dataset.sources.{name}='{{path: /data/rows.jsonl}}'"


# Keys, in any block, whose values are paths or lists of paths
PATHS = ("store", "path", "use", "hostfile", "sft_only", "ppo_only", "eval_only", "pretrain")


def expand_home(node: Any, key: str = "") -> Any:
    """Replace a leading ~ in paths with the home folder: the shell does not expand the one in `model.actor.path="~/m"`."""
    if isinstance(node, dict):
        return {name: expand_home(value, name) for name, value in node.items()}
    if isinstance(node, list):
        return [expand_home(value, key) for value in node]
    return os.path.expanduser(node) if key in PATHS and isinstance(node, str) else node


def unescape_stops(values: dict) -> None:
    """Make line breaks, tabs and backslashes of \\n, \\t and \\\\ in ppo.stop: neither the shell nor Hydra does. In place."""
    ppo = values.get("ppo")
    if isinstance(ppo, dict) and isinstance(ppo.get("stop"), list):
        meant = {"n": "\n", "t": "\t", "\\": "\\"}
        ppo["stop"] = [re.sub(r"\\([nt\\])", lambda m: meant[m[1]], s) if isinstance(s, str) else s for s in ppo["stop"]]


def check_kinds(values: dict, node: type = Config, prefix: str = "") -> None:
    """Raise UserError, with what to type, for a value of the wrong kind for its key: null, a list for a block, infinity."""
    for f in sorted(fields(node), key=lambda f: f.name == "sources"):  # last, since they repeat dataset.fields, whose key is shorter
        if f.name not in values:
            continue
        key, value, kind = prefix + f.name, values[f.name], _bare(f.type)
        if value is None and kind is not f.type:  # it may be null
            continue
        _check_kind(key, value, kind)
        if is_dataclass(kind):
            check_kinds(value, kind, f"{key}.")
        elif kind == dict[str, Source]:
            for name, source in value.items():
                _check_kind(f"{key}.{name}", source, Source)
                check_kinds(source, Source, f"{key}.{name}.")


def _check_kind(key: str, value: object, kind: type) -> None:
    shown = "null" if value is None else value
    if is_dataclass(kind) and not isinstance(value, dict):
        names = [inside.name for inside in fields(kind)]
        hint = f"type {key}.{names[0]}=" + ("..." if value is None or isinstance(value, list) else str(value))
        raise UserError(f"{key}={shown}: {key} is a block of keys ({', '.join(names)}): {hint}")
    if get_origin(kind) is dict and not isinstance(value, dict):
        raise UserError(f"{key}={shown} must be a mapping: type {key}='{{name: value}}'")
    if kind == dict[str, str]:
        for name, text in value.items():
            _check_kind(f"{key}.{name}", text, str)
    if get_origin(kind) is list:
        if not isinstance(value, list) and kind == list[float]:  # betas
            raise UserError(f"{key}={shown} must be two numbers: type {key}='[0.9,0.95]'")
        if value == "all-linear":  # peft's word for lora.targets
            raise UserError(f"{key}={value} is the default: leave it out")
        if not isinstance(value, list):
            items = "..." if value is None else value
            raise UserError(f"{key}={shown} must be a list: type {key}={shlex.quote(f'[{items}]')}")
        if any(part is None or isinstance(part, dict | list) for part in value):
            raise UserError(f"{key}={value} must be a list of plain values")
    if kind in PLAIN and (value is None or isinstance(value, dict | list)):
        instead = f": type {key}=..., or leave it out" if value is None else ""
        if isinstance(value, list) and key.startswith("dataset.") and key.endswith("path"):
            instead = f", the name of one file. {SEVERAL}"
        raise UserError(f"{key}={shown} must be {PLAIN[kind]}{instead}")
    if kind is float and str(value).strip("+-.").lower() in ("inf", "infinity", "nan"):
        raise UserError(f"{key}={value} must be a finite number")


def read_yaml(path: Path) -> dict:
    """Read a file of plain YAML: mappings, lists and scalars. Tags that would make Python objects are refused."""
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(broken_yaml(error, path)) from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no mapping of keys to values")
    return values


def broken_yaml(error: yaml.YAMLError, path: Path | None = None) -> str:
    """Where a YAML file is broken, and how. path: None where only the error knows it."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error).splitlines()[0]
    tag = re.search(r"tag '(.*?)'", problem)
    where = f"{path or getattr(mark, 'name', 'a YAML file')}:{mark.line + 1}" if mark else str(path)
    return f"{where}: {f'the tag {tag[1]} is refused: it would run Python code' if tag else f'not valid YAML ({problem})'}"


# What OmegaConf calls the types in its errors -> what we call them
KINDS = {"Float": "a number", "Integer": "a whole number", "Boolean": "true or false", "bool": "true or false"}
PLAIN = {float: "a number", int: "a whole number", bool: "true or false", str: "a string"}


def open_keys(node: object, prefix: str = "") -> Iterator[str]:
    """Dotted keys whose value is still '???'. OmegaConf's own search resolves interpolations, and fails on those that lead to one."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from open_keys(value, f"{prefix}.{key}" if prefix else str(key))
    elif node == "???":
        yield prefix


def known_keys(node: type = Config, prefix: str = "") -> list[str]:
    """All dotted keys of the schema: blocks and leaves. A free-form mapping ends with '.*'."""
    keys: list[str] = []
    for f in fields(node):
        key = prefix + f.name
        kind = _bare(f.type)
        keys.append(key)
        if is_dataclass(kind):
            keys += known_keys(kind, key + ".")
        elif kind == dict[str, Source]:
            keys += [key + ".*", *known_keys(Source, key + ".*.")]
        elif get_origin(kind) is dict:
            keys.append(key + ".*")
    return keys


def unknown(key: str, stage: str | None) -> str:
    """The message for a key that does not exist: what other programs' names are here, the key it resembles, or the few of its block."""
    if instead := instead_of(key, stage):
        return f"unknown key {key}: {instead}"
    block, _, leaf = key.rpartition(".")
    known = known_keys()
    others = set(STAGES) - {stage, *PARENTS[stage], block} if stage in STAGES else set()
    if source := re.match(r"dataset\.sources\.[^.]+", key):
        known = [name.replace("dataset.sources.*", source[0]) for name in known]
    beside = [name.removeprefix(f"{block}.") for name in known if name.startswith(f"{block}.")]
    beside = [name for name in beside if "." not in name and name != "*"]
    if 0 < len(beside) <= 8 and not difflib.get_close_matches(leaf, beside, n=1):
        return f"unknown key {key}; there are {', '.join(beside)}"
    read = [name for name in known if name.partition(".")[0] not in others]  # by this stage
    return f"unknown key {key}{did_you_mean(key, read) or did_you_mean(key, known)}"


def _bare(kind):
    """X | None -> X."""
    return next(inner for inner in get_args(kind) if inner is not type(None)) if type(None) in get_args(kind) else kind
