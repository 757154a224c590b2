"""The plan: which steps a command needs, and which of them are already done.

A run is a make target. Every step has a key: a hash of what shapes its result (stage block, model fields that it reads, data, seed,
parents' keys), and not of where or how fast it runs. Its folder in the store is named after the key.

Starts and writes nothing; no torch, no network. Reads what the key and the refusals depend on: local data files (their hashes), local
checkpoints (config.json, headers of safetensors, tokenizers), and in the store DONE, facts.json and manifests.
"""

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from runner.batch_sizes import accumulation
from runner.checks.paths import is_local
from runner.config.rates import rate_key
from runner.config.schema import ENGINES, PARENTS, SHARES, Config, Source
from runner.data.adapters import check_adapter
from runner.data.sources import content_key, data_key, has_rows_for, sources_of
from runner.deepspeed_config import check_raw
from runner.durable.manifest import steps_done
from runner.durable.resume import ORIGIN, Unfinished, check_forced, forced, unfinished
from runner.errors import UserError
from runner.files import hash_of
from runner.launch_command import command
from runner.model_folders import check_result, checked_files

# Increase it when the code changes what a step computes
VERSION = 8

# Settings that do not shape the result
NOT_HASHED = ("use", "eval_every", "eval_examples", "eval_prompts")


@dataclass(frozen=True)
class Step:
    """One stage to run, or a checkpoint that stands in for it."""

    stage: str
    store: Path
    facts: dict  # everything that shapes the result
    pinned: str | None  # the checkpoint given as `<stage>.use`
    parents: dict[str, str]  # stage -> model folder or hub id
    earlier: Unfinished | None = None  # interrupted under the same name with another configuration

    @cached_property
    def key(self) -> str:
        return hash_of(self.facts)[:10]

    @property
    def folder(self) -> Path:
        return self.store / f"{self.stage}-{self.key}"

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
        return "run" if self.resumes_at is None else f"resume {self.resumes_at}"

    @property
    def resumes_at(self) -> int | None:
        """Optimizer steps (PPO: iterations) of the checkpoint that it goes on from; None where it starts anew."""
        at = steps_done(self.folder)
        return self.facts[ORIGIN]["at"] if at is None and ORIGIN in self.facts else at


def plan(cfg: Config) -> list[Step]:
    """The steps of cfg.stage in the order they run, parents first. Without parents that are gone, if what was trained on them is there."""
    check_raw(cfg.hardware.deepspeed)
    for name, source in sources_of(cfg.dataset).items():
        check_adapter(f"dataset.sources.{name}", source.adapter, source.fields)
    steps: dict[str, Step] = {}
    store = Path(cfg.store).absolute()
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
        step = steps[stage] = _or_interrupted(cfg, Step(stage, store, facts, pinned, models))
        if step.done and not pinned:
            check_result(step.folder)
        elif not step.done:
            _check_share(cfg, stage)
            command(cfg, step.folder)  # refuses a launch command without {folder}
    return [step for step in steps.values() if step.done or step.stage == cfg.stage or not steps[cfg.stage].done]


def _or_interrupted(cfg: Config, step: Step) -> Step:
    """The step; if another one was interrupted under this name with another configuration, with that one as `earlier`.

    With resume=force the step continues from there, and its key says so: the result is not that of a clean run.
    """
    if cfg.resume == "force" and not step.pinned and (facts := forced(step.store, step.stage, cfg.name, step.facts)):
        return replace(step, facts=facts)
    if step.done or steps_done(step.folder) is not None or cfg.resume == "new":
        return step
    earlier = unfinished(step.store, step.stage, cfg.name, step.facts)
    if not earlier:
        return step
    if cfg.resume != "force":
        return replace(step, earlier=earlier)
    check_forced(cfg, step.stage, earlier)
    origin = {"step": earlier.folder.name, "at": earlier.steps, "changed": earlier.describe()}
    return replace(step, facts=step.facts | {ORIGIN: origin}, earlier=earlier)


def _check_share(cfg: Config, stage: str) -> None:
    """Refuse a stage that has no share of the prompts to learn from."""
    dataset, share = cfg.dataset, SHARES[stage]
    alone = all(source.only in ("ppo", "eval") for source in sources_of(dataset).values())
    if stage == "ppo" and cfg.ppo.ptx_coef and not dataset.pretrain and alone:
        raise UserError(
            f"ppo.ptx_coef={cfg.ppo.ptx_coef:g} mixes in demonstrations, of which there are none: give text, dataset.pretrain='[FILE]'"
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
    if "actor" in ENGINES[stage] and model.actor.adapters_only:
        del block[rate_key(stage, "actor").partition(".")[2]]  # nothing trains at it
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
        return {name: lora | {"path": checked_files(cfg.model, f"model.{name}.path", part.path)}}
    return {name: lora | {"path": part.path, "revision": part.revision}}


def _pinned_facts(cfg: Config, stage: str, path: str) -> dict:
    """What identifies a pinned checkpoint: the files of a folder, the name of a hub model."""
    if not is_local(path):
        return {"use": path}
    return {"use": checked_files(cfg.model, f"{stage}.use", path)}
