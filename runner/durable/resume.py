"""Resuming an interrupted step when the configuration has changed since. No torch.

A step's key hashes what shapes its result, so a changed configuration is another step. That is right, yet nobody should lose hours to a
forgotten override: if the last step under this name is unfinished, the run is refused and the differences are shown.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from runner.config.loading import read_yaml
from runner.config.schema import PARENTS, Config
from runner.durable.lock import is_held, lock
from runner.durable.manifest import SHARED, complete, newest_whole, read_manifest, steps_done, write_manifest
from runner.errors import UserError
from runner.files import whole_folder, write_text

FACTS = "facts.json"
# The fact that says which step a forced one continues
ORIGIN = "goes_on_from"
# Settings that no checkpoint can continue with, by the start of their names, and why
SCALE = "the scale of the scores is fixed when PPO starts, and the critic was trained on that scale"
NETWORK = "a checkpoint holds the weights that train, and only fits the network that they belong to"
TOKENIZER = "the tokenizer of a model with random weights is trained on its data: another one gives tokens another meaning"
FIXED = dict.fromkeys(("ppo.normalize_scores", "ppo.calibration_prompts"), SCALE)
FIXED |= dict.fromkeys(("model.family", "model.actor.shape", "model.reward.shape"), NETWORK)
FIXED |= {f"model.{part}.lora.{name}": NETWORK for part in ("actor", "reward") for name in ("dim", "targets", "train_rest")}
FIXED["parents.reward"] = SCALE
# The same where adapters alone train: the model under them
UNDER = "with adapters alone a checkpoint holds nothing else, and they belong to the model that they were trained on"
UNDER_ACTOR = dict.fromkeys(("parents.sft", "model.actor.path", "model.actor.revision"), UNDER)
UNDER_REWARD = dict.fromkeys(("model.reward.path", "model.reward.revision"), UNDER)
MAKES_TOKENIZER = ("model.tokenizer_vocab", "model.chat_template", "dataset.")
# Characters of a value in a list of differences
SHOWN = 60


@dataclass(frozen=True)
class Unfinished:
    """A step that was started under the same name, with another configuration."""

    folder: Path
    steps: int
    differences: dict[str, tuple]  # dotted key -> (value there, value now)

    def describe(self) -> list[str]:
        return [_line(key, *pair) for key, pair in self.differences.items() if key != ORIGIN]


def write_facts(folder: Path, name: str, facts: dict) -> None:
    write_text(folder / FACTS, json.dumps({"name": name, "facts": facts}, indent=2))


def _steps_of(store: Path, stage: str, name: str) -> Iterator[tuple[Path, dict]]:
    """(folder, contents of facts.json) of the steps that `name` has worked on in a stage, newest first."""
    for path in sorted(store.glob(f"{stage}-*/{FACTS}"), key=lambda p: -p.stat().st_mtime_ns):
        with suppress(OSError, ValueError, KeyError, TypeError):  # not written by us, or not ours to read
            found = json.loads(path.read_text())
            if found["name"] == name and isinstance(found["facts"], dict):
                yield path.parent, found


def unfinished(store: Path, stage: str, name: str, facts: dict) -> Unfinished | None:
    """The step that `name` last worked on in this stage, if it has a checkpoint, is not done, and nobody is working on it."""
    folder, found = next(_steps_of(store, stage, name), (None, None))
    if folder is None or (folder / "DONE").exists() or is_held(store / "locks" / folder.name):
        return None
    steps = steps_done(folder)
    return None if steps is None else Unfinished(folder, steps, differences(found["facts"], facts))


def forced(store: Path, stage: str, name: str, facts: dict) -> dict | None:
    """The facts of a step with exactly this configuration that was forced to continue another one, done or not."""
    for _, found in _steps_of(store, stage, name):
        if set(differences(found["facts"], facts)) == {ORIGIN}:
            return found["facts"]
    return None


def differences(old: dict, new: dict, prefix: str = "") -> dict[str, tuple]:
    """Dotted keys whose values differ: key -> (old, new), None where a key is missing."""
    found = {}
    for key in sorted(old.keys() | new.keys()):
        one, other = old.get(key), new.get(key)
        if f"{prefix}{key}" == "dataset.sources" and isinstance(one, list) and isinstance(other, list):
            one, other = _numbered(one), _numbered(other)
        if isinstance(one, dict) and isinstance(other, dict):
            found |= differences(one, other, f"{prefix}{key}.")
        elif one != other:
            found[prefix + key] = (one, other)
    return found


def _numbered(sources: list) -> dict:
    """Data sources, which data_key lists as [settings, content], as a mapping, so that `differences` can look inside."""
    return {str(i): settings | {"content": content} for i, (settings, content) in enumerate(sources)}


def refuse_changed_config(cfg: Config, stage: str, earlier: Unfinished) -> None:
    """Raise UserError: what was interrupted, how it differs, and the three ways on. A step that has learnt nothing yet is only noted."""
    if complete(earlier.folder)[-1].name == "step_0":
        print(f"{stage} starts over: {earlier.folder}, with another configuration, was interrupted before its first step", file=sys.stderr)
        return
    if set(earlier.differences) == {ORIGIN}:
        raise UserError(
            f"stage {stage} was interrupted at step {earlier.steps} in {earlier.folder}, which had continued from another configuration. "
            "To resume it, add resume=force again. To leave it where it is and start over, add resume=new"
        )
    lines = "\n".join(f"  {line}" for line in in_settings(cfg, stage, earlier))
    onward = "To continue from its checkpoint with the new ones, add resume=force, which the result records"
    if unfit := _unfit(cfg, stage, earlier):
        onward = f"Its checkpoint cannot be continued with the new ones: {unfit[1]}"
    what, exactly = "this command has another configuration", "type the old values"
    if VERSIONS & earlier.differences.keys():
        what, exactly = "since then this program has changed what its steps mean", "use the program as it was, and the old values"
    raise UserError(
        f"stage {stage} was interrupted at step {earlier.steps} in {earlier.folder}, and {what}:\n{lines}\n"
        f"To resume it, {exactly}. {onward}. To leave it where it is and start over, add resume=new"
    )


# Facts that change with the code: of the plan and of the data
VERSIONS = {"version", "dataset.version"}
# Parts of keys that do not shape the result, or that show up again under the keys that read them
UNTOLD = {"name", "recipe", "eval_every", "eval_examples", "eval_prompts", "trust_remote_code"}


def in_settings(cfg: Config, stage: str, earlier: Unfinished) -> list[str]:
    """The differences as keys that can be typed: behind a parent's hash or a list of files are settings, which config.yaml holds."""
    try:
        before = read_yaml(earlier.folder / "config.yaml")
    except UserError:
        return earlier.describe()
    found = differences(_settings(before, stage), _settings(asdict(cfg), stage))
    # dataset.sources repeats dataset.path and dataset.fields
    pairs = [pair for key, pair in found.items() if not key.startswith("dataset.sources.")]
    told = {key: pair for key, pair in found.items() if not key.startswith("dataset.sources.") or pair not in pairs}
    # A step reads only part of the data: changes to blocks that its facts do not mention are none of its own
    blocks = {fact.partition(".")[0] for fact in earlier.differences}
    told = {key: pair for key, pair in told.items() if blocks & {"parents", key.partition(".")[0]}}
    lines = [_line(key, *pair) for key, pair in told.items() if not UNTOLD & set(key.split("."))]
    facts = {key: pair for key, pair in earlier.differences.items() if key != ORIGIN and not _explains(lines, key)}
    if VERSIONS & facts.keys():  # which is in the parents' keys too
        facts = {key: pair for key, pair in facts.items() if not key.startswith("parents.")}
    return lines + [_unexplained(key, *pair) for key, pair in facts.items()]


def _settings(config: dict, stage: str) -> dict:
    """The blocks of a configuration that a step and its parents read."""
    stages = (*PARENTS[stage], stage)
    unread = {part for part, trained in (("actor", "sft"), ("reward", "reward")) if trained not in stages}
    blocks = {name: config.get(name) for name in ("seed", "model", "dataset", "rollout", *stages) if name != "rollout" or stage == "ppo"}
    return blocks | {"model": {key: value for key, value in (config.get("model") or {}).items() if key not in unread}}


def _explains(lines: list[str], fact: str) -> bool:
    """Whether some line about settings explains why a fact differs: one of the same block; for a parent's key, any line."""
    block = fact.partition(".")[0]
    return any(block == "parents" or line.startswith((f"{block}.", f"{block}:")) for line in lines)


def _unexplained(fact: str, old: object, new: object) -> str:
    """A difference that no setting explains: files have changed, or the code has."""
    if fact.startswith("parents.") or fact.endswith(".content") or isinstance(old, list):
        return f"{fact}: the files have changed"
    return _line(fact, old, new)


def check_forced(cfg: Config, stage: str, earlier: Unfinished) -> None:
    """Raise UserError if a setting has changed that no checkpoint can continue with."""
    if unfit := _unfit(cfg, stage, earlier):
        line, why = unfit
        raise UserError(f"resume=force cannot continue from {earlier.folder} with {line}: {why}. Type the old value, or resume=new")


def _unfit(cfg: Config, stage: str, earlier: Unfinished) -> tuple[str, str] | None:
    """A setting that has changed and that no checkpoint can continue with, and why: see FIXED."""
    fixed = FIXED | (dict.fromkeys(MAKES_TOKENIZER, TOKENIZER) if cfg.makes_tokenizer(stage) else {})
    fixed |= UNDER_ACTOR if cfg.model.actor.adapters_only else {}
    fixed |= UNDER_REWARD if cfg.model.reward.adapters_only else {}
    for key, pair in earlier.differences.items():
        why = next((why for start, why in fixed.items() if key.startswith(start)), None)
        if why and key != "dataset.pretrain":
            return _line(key, *pair), why
    return None


def adopt(folder: Path, key: str, earlier: Unfinished) -> None:
    """Start the step `key` from the newest intact checkpoint of another one. Its files are hard-linked where the disk allows it.

    An unfinished rollout is left behind: its prompts, responses and minibatches belong to the old configuration. The weights are kept as
    they are, in the middle of its update.
    """
    with lock(earlier.folder.parent / "locks" / earlier.folder.name, f"step {earlier.folder.name}"):
        source = newest_whole(earlier.folder)
        if source is None:
            raise UserError(f"no checkpoint in {earlier.folder} is intact any more: type resume=new to start over")
        manifest = read_manifest(source) | {"key": key}
        name = f"step_{manifest['step']}"
        if manifest["files"].pop(SHARED, None):
            print(f"the unfinished rollout of {source.name} was made with the old configuration: a new one is sampled", file=sys.stderr)
        lines = (earlier.folder / "metrics.jsonl").read_bytes()[: manifest["log"]["bytes"]]
        # The checkpoint last: once it exists, the step counts as adopted
        write_text(folder / "metrics.jsonl", lines.decode())
        with whole_folder(folder / "checkpoints" / name) as work:
            for file in manifest["files"]:
                try:
                    os.link(source / file, work / file)
                except OSError:
                    shutil.copyfile(source / file, work / file)
            write_manifest(work, manifest)


def _line(key: str, old: object, new: object) -> str:
    return f"{key}: {_brief(old)} -> {_brief(new)}"


def _brief(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
