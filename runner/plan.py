"""The plan: which steps a command needs, which of them are already done, and the DeepSpeed configs of each.

A run is a make target. Every step has a key: a hash of what shapes its result (stage block, model fields that it reads, data, seed,
parents' keys), and not of where or how fast it runs. Its folder in the store is named after the key.

Starts and writes nothing; no torch, no network. Reads what the key and the refusals depend on: local data files (their hashes), local
checkpoints (config.json, headers of safetensors, tokenizers), and in the store DONE, facts.json and manifests.
"""

import shlex
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from runner.batch_sizes import accumulation, micro_batch
from runner.checks.paths import is_local, no_checkpoint, no_folder
from runner.checks.trust import check_vocabulary, check_weights
from runner.config import ENGINES, PARENTS, SHARES, Config, Hardware, Model, Source, frozen_models
from runner.data.adapters import check_adapter
from runner.data.sources import content_key, data_key, has_rows_for, sources_of
from runner.deepspeed_config import check_raw, frozen_config, training_config
from runner.durable.manifest import steps_done
from runner.durable.resume import ORIGIN, Unfinished, check_forced, forced, unfinished
from runner.errors import UserError
from runner.families import check_family, check_same_family
from runner.files import hash_of, read_json
from runner.limits import too_long
from runner.words import short

# Increase it when the code changes what a step computes
VERSION = 6

# Settings that do not shape the result
NOT_HASHED = ("use", "eval_every", "eval_examples", "eval_prompts")


@dataclass(frozen=True)
class Step:
    """One stage to run, or a checkpoint that stands in for it."""

    stage: str
    key: str
    folder: Path  # <store>/<stage>-<key>
    pinned: str | None  # the checkpoint given as `<stage>.use`
    parents: dict[str, str]  # stage -> model folder or hub id
    facts: dict  # everything that shapes the result; the key is their hash
    earlier: Unfinished | None = None  # interrupted under the same name with another configuration

    @property
    def done(self) -> bool:
        return self.pinned is not None or (self.folder / "DONE").exists()

    @property
    def model(self) -> str:
        """The model that this step produces: a Hugging Face folder or hub id."""
        return self.pinned or str(self.folder / "model")

    def state(self) -> str:
        """What a command would do about it: given, reused, run, or resume N, the optimizer steps (PPO: iterations) of its checkpoint."""
        if self.pinned:
            return "given"
        if self.done:
            return "reused"
        at = steps_done(self.folder)
        return "run" if at is None else f"resume {at}"


def plan(cfg: Config) -> list[Step]:
    """The steps of cfg.stage in the order they run, parents first. Without parents that are gone, if what was trained on them is there."""
    check_raw(cfg.hardware.deepspeed)
    for name, source in sources_of(cfg.dataset).items():
        check_adapter(f"dataset.sources.{name}", source.adapter, source.fields)
    steps: dict[str, Step] = {}
    last = getattr(cfg, cfg.stage)
    parents_wanted = () if last and last.use else PARENTS[cfg.stage]  # a result that is given was trained on others
    for stage in (*parents_wanted, cfg.stage):
        if getattr(cfg, stage) is None:
            raise UserError(f"stage={cfg.stage} needs the block {stage}: leave out ~{stage}")
        accumulation(cfg, stage)  # refuses an inexact division
        parents = {parent: steps[parent] for parent in PARENTS[stage] if parent in steps}
        pinned = getattr(cfg, stage).use
        facts = _pinned_facts(cfg, stage, pinned) if pinned else _facts(cfg, stage, parents)
        models = {name: step.model for name, step in parents.items()}
        steps[stage] = _or_interrupted(cfg, Step(stage, _key(facts), _folder(cfg, stage, _key(facts)), pinned, models, facts))
        if steps[stage].done:
            _check_whole(steps[stage])
        else:
            _check_share(cfg, stage)
            command(cfg, steps[stage].folder)  # refuses a launch command without {folder}
    return [step for step in steps.values() if step.done or step.stage == cfg.stage or not steps[cfg.stage].done]


def _key(facts: dict) -> str:
    return hash_of(facts)[:10]


def _folder(cfg: Config, stage: str, key: str) -> Path:
    return Path(cfg.store).absolute() / f"{stage}-{key}"


def _or_interrupted(cfg: Config, step: Step) -> Step:
    """The step; if another one was interrupted under this name with another configuration, with that one as `earlier`.

    With resume=force the step continues from there, and its key says so: the result is not that of a clean run.
    """
    store = step.folder.parent
    if cfg.resume == "force" and not step.pinned and (found := forced(store, step.stage, cfg.name, step.facts)):
        folder, facts = found
        return replace(step, key=_key(facts), folder=folder, facts=facts)
    if step.done or steps_done(step.folder) is not None or cfg.resume == "new":
        return step
    earlier = unfinished(store, step.stage, cfg.name, step.facts)
    if not earlier:
        return step
    if cfg.resume != "force":
        return replace(step, earlier=earlier)
    check_forced(cfg, step.stage, earlier)
    origin = {"step": earlier.folder.name, "at": earlier.steps, "changed": earlier.describe()}
    facts = step.facts | {ORIGIN: origin}
    return replace(step, key=_key(facts), folder=_folder(cfg, step.stage, _key(facts)), facts=facts, earlier=earlier)


def _check_whole(step: Step) -> None:
    """A step that says DONE has written its model and its facts; someone may have deleted or truncated them since."""
    if step.pinned:
        return
    try:
        for name in ("result.json", "model/config.json"):
            read_json(step.folder / name)
        check_weights(step.folder / "model")
        check_vocabulary(step.folder / "model")
    except UserError as error:
        what = str(error).replace(f"{step.folder}/", "")
        raise UserError(f"{short(step.folder)} says DONE, but {what}. Delete the folder to train it again") from error


def _check_share(cfg: Config, stage: str) -> None:
    """Refuse a stage that has no share of the prompts to learn from."""
    dataset, share = cfg.dataset, SHARES[stage]
    alone = all(source.only in ("ppo", "eval") for source in sources_of(dataset).values())
    if stage == "ppo" and cfg.ppo.ptx_coef and not dataset.pretrain and alone:
        raise UserError(
            f"ppo.ptx_coef={cfg.ppo.ptx_coef:g} mixes in demonstrations, of which there are none: give text, dataset.pretrain=[FILE]"
        )
    if has_rows_for(dataset, share):
        return
    if alone:
        instead = "type stage=ppo" if stage == cfg.stage else f"give the model of stage {stage} with {stage}.use=..."
        raise UserError(f"dataset={dataset.name} holds only prompts, which only PPO can use: {instead}")
    others = f"give it a share, for example dataset.split.{share}=1, or a checkpoint with {stage}.use=..."
    only = "type stage=sft, " if stage != "sft" and not (dataset.split.reward or dataset.split.ppo) else ""
    raise UserError(f"dataset={dataset.name} leaves stage {stage} no rows (dataset.split.{share}=0): {only}{others}")


def _facts(cfg: Config, stage: str, parents: dict[str, Step]) -> dict:
    """Everything that shapes the result of a stage, under the names it has in the configuration."""
    model = cfg.model
    # SFT's data count too where its demonstrations train the tokenizer of a random model, and where PPO mixes them in
    mixed = stage == "ppo" and cfg.ppo.ptx_coef and not cfg.dataset.pretrain
    data = data_key(cfg.dataset, "sft" if mixed or cfg.makes_tokenizer(stage) else SHARES[stage])
    # attention too: dropout hits other elements when rows are laid out differently
    shapes = {"family": model.family, "attention": model.attention, "chat_template": model.chat_template, "end_token": model.end_token}
    shapes |= {"max_prompt_tokens": model.max_prompt_tokens, "max_response_tokens": model.max_response_tokens}
    if cfg.makes_tokenizer(stage):
        shapes["tokenizer_vocab"] = model.tokenizer_vocab
    if stage == "ppo":  # its weights come from its parents; of the model block it reads only the adapters
        shapes |= {"actor": {"lora": asdict(model.actor.lora)}, "reward": {"lora": asdict(model.reward.lora)}}
    elif stage == "dpo":
        shapes["actor"] = {"lora": asdict(model.actor.lora)}
    else:
        shapes |= _first_weights(cfg, "actor" if stage == "sft" else "reward")
    block = {k: v for k, v in asdict(getattr(cfg, stage)).items() if k not in NOT_HASHED}
    facts = {"version": VERSION, "seed": cfg.seed, "model": shapes, "dataset": data, stage: block}
    facts["hardware"] = {"precision": cfg.hardware.precision}  # the rest is to change speed, not the result
    if stage == "ppo":
        facts["rollout"] = asdict(cfg.rollout)
        if cfg.ppo.ptx_coef:
            texts = [content_key(Source(path), 0) for path in cfg.dataset.pretrain]
            facts["dataset"] = data | {"pretrain": texts}
    return facts | {"parents": {name: step.key for name, step in parents.items()}}


def _first_weights(cfg: Config, name: str) -> dict:
    """What the actor or reward model starts from: random weights and a tokenizer of this data, a folder's files, or a hub model."""
    part = getattr(cfg.model, name)
    lora = {"lora": asdict(part.lora)}
    if part.random:
        return {name: lora | {"init": "random", "shape": part.shape}}
    if is_local(part.path):
        return {name: lora | {"path": _checked_files(cfg.model, f"model.{name}.path", part.path)}}
    return {name: lora | {"path": part.path, "revision": part.revision}}


def _checked_files(model: Model, key: str, path: str) -> list[list]:
    """The files of a local checkpoint, given under `key`: name, size and time of each. Where the folder is does not matter.

    Raises UserError for a folder that is no checkpoint of a family that we know (under model.*.path: of the preset's family), for another
    kind of model, and for one without weights, tokenizer, or positions enough.
    """
    folder = Path(path)
    if not folder.exists():
        raise UserError(no_folder(key, path))
    if not (folder / "config.json").exists():
        raise UserError(f"{key}={path} {no_checkpoint(folder, f'type {key}=')}")
    settings = read_json(folder / "config.json")
    check_family(f"{key}={path}", settings.get("model_type"))
    if not key.endswith(".use"):
        check_same_family(f"{key}={path}", settings["model_type"], model.name, model.family)
    _check_kind(key, path, settings)
    if message := too_long(model, path, settings.get("max_position_embeddings")):
        raise UserError(message)
    if not model.trust_remote_code:  # then its tokenizer may be of any kind
        check_vocabulary(folder)
    check_weights(folder)
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(folder.iterdir()) if p.is_file()]


def _pinned_facts(cfg: Config, stage: str, path: str) -> dict:
    """What identifies a pinned checkpoint: the files of a folder, the name of a hub model."""
    if not is_local(path):
        return {"use": path}
    return {"use": _checked_files(cfg.model, f"{stage}.use", path)}


def _check_kind(key: str, path: str, settings: dict) -> None:
    """Raise UserError for a reward model in place of a language model, for the reverse, and for a classifier of several labels.

    settings: config.json of the checkpoint that was given under `key`.
    """
    kind, stage = "".join(map(str, settings.get("architectures") or ())), key.removesuffix(".use")
    scores = kind.endswith("ForSequenceClassification")
    if key.endswith(".use") and kind and (stage == "reward") != scores:
        wanted = "a reward model (ForSequenceClassification)" if stage == "reward" else "a language model (ForCausalLM)"
        raise UserError(f"{key}={path} holds {kind}, but {stage} is {wanted}: give the folder of one")
    if key == "model.actor.path" and scores:
        raise UserError(f"{key}={path} holds {kind}, which scores texts and writes none: give the folder of a language model")
    labels = len(settings.get("id2label") or "01")  # config.json names labels unless there are two
    if key in ("model.reward.path", "reward.use") and scores and labels > 1:
        raise UserError(f"{key}={path} sorts texts into {labels} labels; a reward model gives one score: give one that was trained as such")


# --- engines ----------------------------------------------------------------------------------------------------------


def engine_configs(cfg: Config, stage: str) -> dict[str, dict]:
    """The DeepSpeed config of every engine of a stage. Replicated frozen models need none."""
    micro, gas, block = micro_batch(cfg, stage), accumulation(cfg, stage), getattr(cfg, stage)
    configs = {}
    for engine in ENGINES[stage]:
        # The ptx mixture adds as many micro batches of text again to every step of the actor
        doubled = stage == "ppo" and engine == "actor" and block.ptx_coef
        name = "reward" if stage == "reward" else engine  # as its checkpoints call it
        configs[name] = training_config(cfg, engine, micro, gas * (2 if doubled else 1), block.grad_clip)
    return configs | {name: frozen_config(cfg, name) for name in frozen_models(cfg, stage) if getattr(cfg.hardware.zero, name) == 3}


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
