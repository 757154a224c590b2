"""Going on with a step that was interrupted, when the configuration has changed since. No torch.

A step's key hashes what shapes its result, so a changed configuration is another step. That is right, and yet nobody should lose
hours to a forgotten override: the step that this name worked at last, if it is unfinished, is shown with the difference.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from runner.errors import UserError
from runner.files import whole_folder, write_text
from runner.lock import is_held
from runner.manifest import MANIFEST, complete, read_manifest, steps_done

FACTS = "facts.json"
# Characters of a value in a list of differences
SHOWN = 60


@dataclass(frozen=True)
class Unfinished:
    """A step that was begun under the same name, with another configuration."""

    folder: Path
    key: str
    steps: int
    differences: dict[str, tuple]  # dotted key -> (value there, value now)

    def describe(self) -> list[str]:
        return [f"{key}: {_brief(old)} -> {_brief(new)}" for key, (old, new) in self.differences.items()]


def write_facts(folder: Path, name: str, key: str, facts: dict) -> None:
    write_text(folder / FACTS, json.dumps({"name": name, "key": key, "facts": facts}, indent=2))


def unfinished(store: Path, stage: str, name: str, facts: dict) -> Unfinished | None:
    """The step of this stage that `name` worked at last, if it has a checkpoint, is not done, and nobody is at it."""
    newest_first = sorted(store.glob(f"{stage}-*/{FACTS}"), key=lambda p: -p.stat().st_mtime_ns)
    for path in newest_first:
        found, folder = json.loads(path.read_text()), path.parent
        if found["name"] != name:
            continue
        steps = steps_done(folder)
        if steps is None or (folder / "DONE").exists() or is_held(store / "locks" / folder.name):
            return None
        return Unfinished(folder, found["key"], steps, differences(found["facts"], facts))
    return None


def differences(old: dict, new: dict, prefix: str = "") -> dict[str, tuple]:
    """Dotted keys whose values differ: key -> (old, new), None where there is none."""
    found = {}
    for key in sorted(old.keys() | new.keys()):
        one, other = old.get(key), new.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found |= differences(one, other, f"{prefix}{key}.")
        elif one != other:
            found[prefix + key] = (one, other)
    return found


def refuse(stage: str, earlier: Unfinished) -> None:
    """Raise UserError: what lies there, how it differs, and the three ways to go on."""
    lines = "\n".join(f"  {line}" for line in earlier.describe()) or "  (none: it had itself gone on from another configuration)"
    raise UserError(
        f"stage {stage} was interrupted at step {earlier.steps} in {earlier.folder}, and this command has another configuration:\n{lines}\n"
        "To go on with it, type the old values. To go on from its checkpoint with the new ones, add resume=force; the result says so "
        "for ever. To leave it where it is and begin anew, add resume=new"
    )


def adopt(folder: Path, key: str, earlier: Unfinished) -> None:
    """Begin the step `key` from the newest checkpoint of another one, whose files are linked, not copied."""
    source = complete(earlier.folder)[-1]
    manifest = read_manifest(source) | {"key": key}
    with whole_folder(folder / "checkpoints" / source.name) as work:
        for name in manifest["files"]:
            os.link(source / name, work / name)
        (work / MANIFEST).write_text(json.dumps(manifest))
    lines = (earlier.folder / "metrics.jsonl").read_bytes()[: manifest["log"]["bytes"]]
    (folder / "metrics.jsonl").write_bytes(lines)


def _brief(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
