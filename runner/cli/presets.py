"""The user's own presets, checked before Hydra composes them: its errors name neither the file nor what to write there."""

from collections.abc import Sequence
from pathlib import Path

from runner.config.loading import read_yaml
from runner.errors import UserError

# What a preset of these groups inherits from, to get the keys that all of its kind share
BASES = {"model": "opt1.3b", "dataset": "base/common", "hardware": "base/gpu"}
GLOBAL = "# @package _global_"


def groups_in(folders: Sequence[Path]) -> dict[str, list[str]]:
    """The groups of conf/, which comes first, and the names of their presets there and in the folders beside it (--config-dir)."""
    groups = [group.name for group in folders[0].iterdir() if group.is_dir()]
    return {group: sorted({file.stem for top in folders for file in (top / group).glob("*.yaml")}) for group in groups}


def preset_file(group: str, name: str, folders: Sequence[Path]) -> Path | None:
    """The file that Hydra would take: the first one."""
    return next((path for top in folders if (path := top / group / f"{name}.yaml").is_file()), None)


def check_preset(group: str, name: str, folders: Sequence[Path]) -> None:
    """Raise UserError for a preset that Hydra would misread. One that does not exist passes."""
    path = preset_file(group, name, folders)
    if path is None:
        return
    body, shown = read_yaml(path), "/".join(path.parts[-3:])
    if group in BASES and all(entry == "_self_" for entry in body.get("defaults") or []):
        raise UserError(f"{shown} inherits nothing: begin it with defaults: [{BASES[group]}, _self_]")
    if group in ("experiment", "sweep"):
        _check_header(path, shown)
        _check_choices(body, shown, folders)
    if group == "sweep" and "defaults" not in body and (body.get("hydra") or {}).get("mode") != "MULTIRUN":
        raise UserError(f"{shown} lacks hydra.mode: write mode: MULTIRUN under hydra:, or its sweep is one ordinary run")


def _check_header(path: Path, shown: str) -> None:
    """The package line must come first: Hydra stops looking for it at the first line that is not such a header."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines or lines[0].replace(" ", "") != GLOBAL.replace(" ", ""):
        raise UserError(f"{shown}: its first line must be {GLOBAL}")


def _check_choices(body: dict, shown: str, folders: Sequence[Path]) -> None:
    """The presets that an experiment chooses: `- override /model: opt1.3b` in its defaults, and no other way."""
    groups = groups_in(folders)
    for group in groups:
        if isinstance(body.get(group), str) and group != "stage":  # which is also a key
            raise UserError(f"{shown}: {group}: {body[group]} chooses no preset. Write under defaults: - override /{group}: {body[group]}")
    for entry in body.get("defaults") or []:
        for key, option in entry.items() if isinstance(entry, dict) else ():
            group = key.removeprefix("override").strip().lstrip("/")
            if group in groups and key != f"override /{group}":
                raise UserError(f"{shown}: - {key}: {option} in its defaults must be - override /{group}: {option}")
            if group in groups:
                check_preset(group, str(option), folders)
