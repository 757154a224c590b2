"""Typos on the command line, caught before Hydra runs: Hydra has no did-you-mean, and its hint to add a `+` does harm here."""

import importlib.metadata
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from runner.checks import secrets
from runner.checks.paths import SUFFIXES, is_local
from runner.cli.flags import completes, flags_and_overrides, sweeps
from runner.cli.presets import check_preset, groups_in, preset_file
from runner.config.limits import check_name
from runner.config.loading import broken_yaml, instead_of_source, known_keys, read_yaml, unknown
from runner.config.schema import STAGES
from runner.errors import UserError, did_you_mean

LAUNCHERS = {"joblib": "hydra-joblib-launcher"}
LAUNCHERS |= dict.fromkeys(("submitit_local", "submitit_slurm"), "hydra-submitit-launcher")


@dataclass(frozen=True)
class Known:
    """What may be typed."""

    keys: list[str]  # of the schema, dotted
    groups: dict[str, list[str]]  # group -> its presets
    folders: list[Path]  # where presets lie
    stages: list[str]  # the chosen one; in a sweep there may be several

    @property
    def names(self) -> list[str]:
        return [*self.keys, *self.groups]


def check_overrides(argv: list[str], conf: Path) -> list[str]:
    """Raise UserError for an unknown key, group option, or a key of a stage that the chosen one does not consume.

    Returns argv as Hydra wants it: keys inside our free mappings (hardware.deepspeed, say), those that a source may leave out, and those
    of a block that only some stages of a sweep have, get the ++ that Hydra asks for.
    """
    secrets.refuse_in_overrides(argv)
    flags, words = flags_and_overrides(argv, [*known_keys(), *groups_in([conf])])
    if completes(flags, words):
        return [*flags, *words]
    folders = [conf, *(Path(flag.partition("=")[2]) for flag in flags if flag.startswith(("-cd=", "--config-dir=")))]
    if missing := next((folder for folder in folders if not folder.is_dir()), None):
        raise UserError(f"--config-dir={missing}: this folder does not exist (looked from {Path.cwd()})")
    known = Known(known_keys(), groups_in(folders), folders, _chosen_stages(words, folders))
    parser = OverridesParser.create()
    checked, given = [], {}
    for argument, after in zip(words, [*words[1:], ""], strict=False):
        if "=" not in argument[1:] and not argument.startswith("~"):
            raise UserError(_no_override(argument, after, known.names))
        override = _parse(parser, argument)
        _check_sweep(override, sweeps(argv))
        _check_names(override)
        checked.append(_for_hydra(argument, override, known))
        given.setdefault(override.key_or_group, []).append(argument)
    _tell_repeated(given)
    return [*flags, *_paths_first(checked)]


def _paths_first(words: list[str]) -> list[str]:
    """Put the path of a source before keys that are added to it. Hydra goes by the order: a misspelt name with a path would else exist."""
    ordered = []
    for word in words:
        path = re.match(r"(dataset\.sources\.[^.=]+\.)path=", word)
        added = (i for i, other in enumerate(ordered) if path and other.startswith(f"++{path[1]}"))
        ordered.insert(next(added, len(ordered)), word)
    return ordered


def _no_override(argument: str, after: str, known: list[str]) -> str:
    """The message for a word without =. after: the next word, which may be its value."""
    if argument == "help":
        return "'help' is not an override: python run.py --help explains, and --cfg job prints the keys of a stage"
    if argument in known:
        return f"{argument!r} has no value: type {argument}={'...' if '=' in after or not after else after}"
    return f"{argument!r} is not an override: type key=value{did_you_mean(argument.strip('='), known)}"


def _tell_repeated(given: dict[str, list[str]]) -> None:
    """Note a key that is given twice: a slip, or a script that puts its own before its caller's. Mappings are merged: no note."""
    for key, arguments in given.items():
        if len(arguments) > 1 and "={" not in arguments[-1]:
            print(f"note: {key} is given {len(arguments)} times; the last one counts: {arguments[-1]}", file=sys.stderr)


def _parse(parser: OverridesParser, argument: str):
    try:
        return parser.parse_override(argument)
    except HydraException as error:
        key, _, value = argument.partition("=")
        if key == "name":
            _check_name(value)
        raise UserError(f"cannot read {argument} ({str(error).splitlines()[0]}). {_quoting(key, value)}") from error


def _quoting(key: str, value: str) -> str:
    """How to type a value that Hydra, or the shell before it, misread."""
    takes_names = any(name.startswith(f"{key.lstrip('+')}.") for name in known_keys())
    if value.startswith("{") and takes_names:
        return f"A mapping with spaces needs quotes around it: {key}='{{name: value, other: value}}'"
    if value.startswith("["):
        return f"A list ends with ], and with spaces it needs quotes around it: {key}='[one, two]'"
    quoted = shlex.quote(f"{key}={QuotedString(value, Quote.double).with_quotes()}")
    return f"Brackets, braces, quotes, spaces, commas, = and letters beyond a to z in a value need quotes: {quoted}"


def _check_sweep(override, sweeps: bool) -> None:
    if override.is_sweep_override() and not sweeps:
        raise UserError(f"{override.input_line} names several values: type -m for a sweep, or quote the comma: 'key=\"a,b\"'")
    if override.is_sweep_override() and override.key_or_group == "resume":
        raise UserError(f"{override.input_line}: all jobs of a sweep start the same way. Type resume=new, or leave it out")


def _check_names(override) -> None:
    """Check the name, or a sweep's names: Hydra makes folders of them before anything else looks at them."""
    if override.key_or_group == "name" and not override.is_delete():
        for name in override.sweep_string_iterator() if override.is_discrete_sweep() else [str(override.value())]:
            _check_name(name.strip("'\""))


def _check_name(value: str) -> None:
    if "${" in value:  # known only once composed: runner/cli/hydra_callback.py checks it then
        return
    try:
        check_name(value)
    except ValueError as error:
        raise UserError(str(error)) from error


def _for_hydra(argument: str, override, known: Known) -> str:
    """The argument as Hydra wants it. Raises UserError for what cannot be meant."""
    key, value = override.key_or_group, argument.partition("=")[2]
    if key.startswith("hydra.sweeper.params"):
        raise UserError(f"{argument}: name the values after -m themselves, as in -m sft.lr=1e-3,1e-4; params are for presets in conf/sweep")
    if key.startswith(("hydra.", "hydra/")):
        if key == "hydra/launcher":
            _check_launcher(value)
        return argument
    if override.is_delete():
        _check_deletion(argument, key, known)
        return argument
    if key in known.groups:
        return _preset(argument, key, value, known)
    _refuse_unknown(key, override.value(), known)
    return _setting(argument, key, value, known)


def _preset(argument: str, group: str, value: str, known: Known) -> str:
    if argument.startswith("+"):
        raise UserError(f"{argument}: the defaults list has it already. Type {argument.lstrip('+')}")
    _check_options(group, value, known.groups[group])
    for option in _options(value):
        check_preset(group, option, known.folders)
    # What stands in the defaults list as null can only be overridden with a list: this one is empty
    return argument if group not in ("experiment", "sweep") else re.sub(r"(?<=[=,])null(?=,|$)", "[]", argument)


def _setting(argument: str, key: str, value: str, known: Known) -> str:
    """With ++ where Hydra would miss the key in what is composed."""
    if value.startswith("[") and any(name.startswith(f"{key}.") for name in known.keys):
        raise UserError(f"{argument}: {key} is a mapping of names to values: type {key}='{{name: value}}'")
    block = key.split(".")[0]
    of_block = [stage for stage in known.stages if block not in STAGES or block in _consumed(stage, known.folders)]
    if "." in key and not of_block:
        raise UserError(f"{key}: stage={','.join(known.stages)} does not use the {block} block. Leave it out, or type stage={block}")
    # Every source has a path: without ++ a misspelt source is refused by Hydra, and by `load` if only other keys are given
    of_source = _fits(["dataset", "sources", "*", "*"], key.split(".")) and not key.endswith(".path")
    whole_mapping = value.startswith("{") and (f"{key}.*" in known.keys or key.startswith("dataset.sources."))
    adds = of_source or whole_mapping or len(of_block) < len(known.stages) or _is_free(key, known.keys)
    return f"++{argument}" if adds and argument.startswith(key) else argument


def _check_deletion(argument: str, key: str, known: Known) -> None:
    """Only a source, or what is in a free-form mapping, can be deleted. Everything else needs a value."""
    if key != "hydra" and not _is_known(key, known.names):
        raise UserError(f"{argument}: {unknown(key, known.stages[0])}")
    if not _is_free(key, known.keys) and not _fits(["dataset", "sources", "*"], key.split(".")):
        most = "Only a source (~dataset.sources.shp) or a name of your own in a mapping can be"
        raise UserError(f"{key} cannot be deleted: leave out {argument}. {most}")


def _refuse_unknown(key: str, value: object, known: Known) -> None:
    """Raise UserError for a key that does not exist, also one inside a mapping that is given as one value."""
    chosen = known.stages[0]
    if not _is_known(key, known.names):
        raise UserError(f"{unknown(key, chosen)}. `python run.py stage={chosen} --cfg job` prints the keys of that stage")
    for name, inside in value.items() if isinstance(value, dict) else ():
        if any(_fits(other.split(".")[:-1], key.split(".")) for other in known.keys):
            _refuse_unknown(f"{key}.{name}", inside, known)


def _check_launcher(name: str) -> None:
    package = LAUNCHERS.get(name)
    if package and not any(importlib.metadata.distributions(name=package)):
        raise UserError(f"hydra/launcher={name} is not installed: type .venv/bin/pip install -c constraints.txt -e '.[sweep]'")


def _check_options(group: str, value: str, options: list[str]) -> None:
    if group == "sweep" and len(_options(value)) > 1:
        raise UserError(f"sweep={value}: one sweep at a time. For both, write a preset in conf/sweep/ that has the values of both")
    if value.startswith("[") and group != "experiment":  # several experiments can be stacked
        raise UserError(
            f"{group}={value}: one {group} at a time. Type {group}=..., or -m {group}={value.strip('[]')} for one after the other"
        )
    for option in _options(value):
        absent = option == "null" and group in ("experiment", "sweep")
        if not absent and option not in options and "(" not in value:
            raise UserError(_no_preset(group, option, options))


def _options(value: str) -> list[str]:
    return [option.strip() for option in value.strip("[]'\"").split(",")]


def _no_preset(group: str, option: str, options: list[str]) -> str:
    """The message for a preset that does not exist. For a path it names the key that takes paths."""
    if group == "dataset" and ("/" in option or option.endswith(SUFFIXES)):
        return f"{group}={option} is not a preset: type dataset={'jsonl' if is_local(option) else 'hub'} dataset.path={option}"
    if group == "model" and "/" in option:
        return f"{group}={option} is not a preset: type model.actor.path={option} with the preset of its size, such as model=opt1.3b"
    larger = [name for name in options if option and name.startswith(option)]  # a100: the one with 40 GB, or the one with 80?
    near = f" (did you mean {' or '.join(larger)}?)" if larger else did_you_mean(option, options)
    return f"{group}={option} does not exist{near}. There are: {', '.join(options)}"


def _is_known(key: str, known: list[str]) -> bool:
    """Whether a dotted key is in the schema; `x.*` allows anything below x."""
    parts = key.split(".")
    return _is_free(key, known) or any(_fits(pattern.split("."), parts) for pattern in known)


def _is_free(key: str, known: list[str]) -> bool:
    """Whether a key is inside a mapping whose keys we do not define: a DeepSpeed block, a model's shape, a field map."""
    parts = key.split(".")
    frees = [pattern.split(".")[:-1] for pattern in known if pattern.endswith(".*") and pattern != "dataset.sources.*"]
    return any(len(parts) > len(free) and _fits(free, parts[: len(free)]) for free in frees)


def _fits(pattern: list[str], parts: list[str]) -> bool:
    return len(pattern) == len(parts) and all(p in ("*", k) for p, k in zip(pattern, parts, strict=True))


def _chosen_stages(argv: list[str], folders: list[Path]) -> list[str]:
    """The stage that is chosen; in a sweep there may be several."""
    named = [a.removeprefix("stage=") for a in argv if a.startswith("stage=")]
    for argument in argv:
        if argument.startswith(("experiment=", "sweep=")) and not named:
            group, _, name = argument.partition("=")
            path = preset_file(group, name, folders)
            defaults = read_yaml(path).get("defaults", []) if path else []
            named = [d["override /stage"] for d in defaults if isinstance(d, dict) and "override /stage" in d]
    return re.findall(r"\w+", named[-1].removeprefix("choice(")) if named else ["ppo"]


def _consumed(stage: str, folders: list[Path]) -> set[str]:
    """A stage and those in the defaults list of its file."""
    path = preset_file("stage", stage, folders)
    defaults = read_yaml(path).get("defaults", []) if path else []
    return {stage}.union(*(_consumed(d, folders) for d in defaults if d != "_self_"))


def hydra_error_message(error: Exception) -> str:
    """An error of Hydra or OmegaConf as one message, without the hint to add a `+`: that would add a key that nothing reads."""
    if isinstance(error, yaml.YAMLError):
        return broken_yaml(error)
    said = str(error)
    if found := re.search(r"Could not override '(.+?)'", said):
        return _not_there(found[1], list(getattr(error.__cause__, "parent_node", None) or ()))
    if found := re.search(r"Error merging override (~\S+)", said):
        return f"{found[1].lstrip('~')} cannot be deleted: leave out {found[1]}"
    if found := re.search(r"Could not find '(hydra/\w+)/(.+?)'\n+Available options in .*:\n((?:\t.*\n?)+)", said):
        return _no_preset(found[1], found[2], [*found[3].split(), *(LAUNCHERS if found[1] == "hydra/launcher" else ())])
    if "does not support sweep type" in said:
        return "an interval has infinitely many values: list the ones to try, as in -m sft.lr=1e-3,2e-3 or -m seed='range(1,4)'"
    return re.split(r"\n\s*full_key:|\n\s*Config search path:", said)[0].rstrip()


def _not_there(key: str, beside: list[str]) -> str:
    """beside: the keys of the block in which Hydra has looked for it in vain."""
    if key == "dataset.path":
        return f"{key}: the chosen data set has its own source. Also type dataset=jsonl (a file) or dataset=hub"
    if key.startswith("dataset.sources."):
        return f"{key} does not exist{instead_of_source(key.split('.')[2], beside)}"
    return f"{key} does not exist in what you chose. The same command with --cfg all shows what does"
