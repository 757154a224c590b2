"""What run.py says: the plan, and one clear message for whatever is wrong with the input.

Most commands run in this process, as `python run.py ...` would; those that depend on what is imported, or on the environment
at the start, are processes of their own.
"""

import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from operator import attrgetter
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tiny import configured

from runner.amounts import check_amounts
from runner.cli.overrides import check_overrides
from runner.config.loading import load
from runner.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RUN = str(ROOT / "run.py")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder, with an environment in which nothing has been decided yet."""
    monkeypatch.chdir(tmp_path)
    for name in ("HYDRA_FULL_ERROR", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # so that it comes back as it was
        monkeypatch.delenv(name)
    return tmp_path


def process(*overrides: str, **environment: str) -> subprocess.CompletedProcess:
    """run.py as a process of its own."""
    unset = {k: v for k, v in os.environ.items() if k not in ("HYDRA_FULL_ERROR", "HF_HUB_OFFLINE")}
    command = [sys.executable, RUN, *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=unset | environment)


@pytest.fixture
def refused(here, monkeypatch, capfd):
    """Runs run.py in this process and returns its one message, after checking that it is one."""

    def run(*overrides: str) -> str:
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)  # run.py sets it
        monkeypatch.setattr("sys.argv", [RUN, *overrides])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(RUN, run_name="__main__")
        said = capfd.readouterr()
        # sys.exit("...") prints its argument as the interpreter ends, and exits with 1
        return one_message(said.err if caught.value.code == 1 else str(caught.value.code))

    return run


def one_message(text: str) -> str:
    """The message at the end of what went to stderr; progress may come before it."""
    assert text.count("error: ") == 1, text
    for leak in ("Traceback", "Error executing job", "full_key", "object_type", "HYDRA_FULL_ERROR", "use +"):
        assert leak not in text, text
    return text.strip().partition("error: ")[2]


# --- the plan ---------------------------------------------------------------------------------------------------------

WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("torch", "transformers", "datasets", "deepspeed", "numpy"):
            raise AssertionError("imports " + name)
sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture(scope="session")
def without_torch(tmp_path_factory) -> str:
    """A PYTHONPATH under which importing torch, transformers, datasets, deepspeed or numpy fails."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(WITHOUT_TORCH)
    return str(folder)


@pytest.mark.parametrize("option, shows", [(["--help"], "Powered by Hydra"), (["--cfg", "job"], "kl_coef: 0.05")])
def test_help_and_configuration_come_without_torch(option, shows, without_torch):
    done = process(*option, PYTHONPATH=without_torch)
    assert done.returncode == 0, done.stderr
    assert shows in done.stdout


def test_the_plan_comes_without_torch_and_shows_everything(here, without_torch):
    done = process("model=opt13b", "hardware=dgx8", "dry_run=true", PYTHONPATH=without_torch, HYDRA_FULL_ERROR="1")
    assert done.returncode == 0, done.stderr
    plan = done.stdout
    assert "hardware=dgx8 (8 GPU, bf16)" in plan
    for stage, algebra in (("sft", "128 = 4 x 8 x 4"), ("reward", "64 = 4 x 8 x 2"), ("ppo", "64 = 2 x 8 x 4")):
        assert any(line.split()[:2] == [stage, "run"] and algebra in line for line in plan.splitlines())
        assert f"{stage}: launch command, 8 ranks\n" in plan
    assert plan.count("--nproc-per-node=8 -m runner.worker") == 3
    shown = engines(plan)
    assert list(shown) == ["sft actor", "reward reward", "ppo actor", "ppo critic", "ppo ref"]  # its reward model is replicated
    assert all(config["zero_optimization"]["stage"] == 3 for config in shown.values())
    assert shown["sft actor"]["train_micro_batch_size_per_gpu"] == shown["sft actor"]["gradient_accumulation_steps"] == 4
    forecast = plan.partition("\nforecast")[2].partition("\n--- ")[0].splitlines()
    assert [line.split()[0] for line in forecast[1:4]] == ["sft", "reward", "ppo"]
    assert all(" of 80 GB" in line and "$" in line for line in forecast[1:4])
    assert not any(here.iterdir())  # a plan leaves nothing behind


def test_the_plan_fits_80_columns(here, monkeypatch, capsys):
    """Also with the longest states, and without blanks at the end of its lines."""
    from runner.plan import plan
    from runner.plan_view import show

    cfg = configured()
    for step in (steps := plan(cfg)):
        if step.stage == "reward":
            (step.folder / "DONE").parent.mkdir(parents=True)
            (step.folder / "DONE").touch()
        else:
            (step.folder / "checkpoints" / "step_1000").mkdir(parents=True)
            (step.folder / "checkpoints" / "step_1000" / "manifest.json").touch()
    show(cfg, steps)
    _, _, header, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[1] for row in rows] == ["resume", "reused", "resume"]
    assert header.split() == ["step", "batch", "=", "micro", "x", "ranks", "x", "acc.", "folder"]
    for line in (header, *rows):
        assert len(line) <= 80 and line == line.rstrip()


def engines(plan: str) -> dict[str, dict]:
    """'<stage> <engine>' -> DeepSpeed config, from the text of a plan."""
    found = {}
    for part in plan.split("\n--- ")[1:]:
        title, _, body = part.partition("\n")
        if "DeepSpeed config" in title:
            stage, _, rest = title.partition(":")
            found[f"{stage} {rest.split()[-2]}"] = json.loads(body)
    return found


def test_what_other_settings_switch_off_is_noted(tmp_path, capsys):
    """And not refused: a sweep over them may well have it. Not of steps that are done, as `make run` leaves them in runs/store."""
    from runner.plan import plan
    from runner.plan_view import show, without_effect

    words = ["model.actor.lora.train_rest=true", "dataset.pretrain=[x/y]", "checkpoint.keep_best=1", "reward.eval_every=0"]
    cfg = configured(*words, f"store={tmp_path}")
    show(cfg, plan(cfg))
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    for note, key in zip(notes, ("model.actor.lora.train_rest=true", "dataset.pretrain", "checkpoint.keep_best=1"), strict=True):
        assert note.startswith(f"note: {key} ")
    assert "has no effect on reward: reward.eval_every=0" in notes[2]
    assert not list(without_effect(cfg, []))
    cfg = configured("model.actor.lora.train_rest=true", "model.actor.lora.dim=8", "dataset.pretrain=[x/y]", "ppo.ptx_coef=1")
    assert not list(without_effect(cfg, ["sft", "reward", "ppo"]))
    (note,) = without_effect(configured("model.reward.lora.dim=8", "reward.lr=1e-4"), ["sft", "reward", "ppo"])
    assert (
        note == "reward.lr and ppo.critic_lr move only the head: the adapters train at reward.lora_lr=0.0002 and ppo.critic_lora_lr=0.0002"
    )
    dpo = configured("stage=dpo", "dataset.split.ppo=3")
    (note,) = without_effect(dpo, ["sft", "dpo"])
    assert "PPO's share of the prompts (dataset.split.ppo=3) unused" in note
    assert not list(without_effect(configured("stage=dpo", "dataset.split.ppo=0"), ["sft", "dpo"]))
    (note,) = without_effect(configured("model.actor.lora.dim=8"), ["sft", "reward", "ppo"])
    assert note == "sft.lr and ppo.actor_lr have no effect: only adapters train, at sft.lora_lr=0.0002 and ppo.actor_lora_lr=0.0002"


def test_a_plan_says_that_the_run_would_be_refused(here, monkeypatch, capsys):
    from runner.durable.resume import write_facts
    from runner.plan import plan

    step = plan(configured("stage=sft", f"store={here / 'store'}"))[0]
    checkpoint = step.folder / "checkpoints" / "step_5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"files": {}, "step": 5}')
    write_facts(step.folder, "demo", step.facts)
    monkeypatch.setattr("sys.argv", [RUN, "dry_run=true", "stage=sft", f"store={here / 'store'}", "sft.warmup=7"])
    runpy.run_path(RUN, run_name="__main__")
    note = capsys.readouterr().out.partition("note: this is only a plan. Without dry_run it is refused: ")[2]
    assert note.startswith("stage sft was interrupted at step 5") and "sft.warmup" in note


@pytest.mark.parametrize("words", ["dry_run=true", "--help", "--info config"])
def test_a_reader_who_has_seen_enough_is_no_error(words, here):
    command = f"{sys.executable} {RUN} {words} | head -n 0; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert not done.stderr, done.stderr


def test_free_mappings_take_new_keys(here, monkeypatch, capsys):
    """Hydra itself would refuse them, and ask for a +."""
    overrides = [
        "hardware=a6000",
        "hardware.deepspeed={zero_optimization: {overlap_comm: false}}",
        "hardware.deepspeed.wall_clock_breakdown=true",
    ]
    monkeypatch.setattr("sys.argv", [RUN, "dry_run=true", *overrides])
    runpy.run_path(RUN, run_name="__main__")
    for config in engines(capsys.readouterr().out).values():
        assert config["zero_optimization"] == {"stage": 0, "overlap_comm": False}
        assert config["wall_clock_breakdown"] is True


# --- what is wrong before anything is looked up -----------------------------------------------------------------------

WRONG = {
    "mistyped key": ("ppo.kl_coeff=1", "unknown key ppo.kl_coeff (did you mean ppo.kl_coef?)"),
    "key without its block": ("cliprange=0.1", "did you mean ppo.cliprange?"),
    "added key": ("+ppo.foo=1", "unknown key ppo.foo"),
    "mistyped option": ("model=opt13", "model=opt13 does not exist (did you mean opt13b?). There are: bloom176b, "),
    "mistyped experiment": ("experiment=debog", "did you mean debug?"),
    "no group option": ("stage=null", "stage=null does not exist"),
    "end of another key": ("ppo.lr=1e-5", "unknown key ppo.lr (did you mean ppo.actor_lr or ppo.critic_lr or"),
    "key and value apart": ("ppo.kl_coef 0.1", "'ppo.kl_coef' has no value: type ppo.kl_coef=0.1"),
    "key alone": ("seed name=x", "'seed' has no value: type seed=..."),
    "key with dashes": ("--model opt1.3b", "--model: overrides have no dashes. Type model=opt1.3b"),
    "cry for help": ("help", "python run.py --help explains"),
    "no override": ("kl_coeff", "'kl_coeff' is not an override: type key=value (did you mean "),
    "no key": ("=3", "'=3' is not an override: type key=value"),
    "broken value": ("ppo.kl_coef=[1", "cannot read ppo.kl_coef=[1 "),
    "greedy top_k": ("ppo.top_k=1", "ppo.top_k=1 must be 0 (off) or above 1: PPO needs samples, not the greedy answer"),
    "sweep without -m": ("ppo.kl_coef=0.1,0.2", "names several values: type -m for a sweep"),
    "wrong type": ("ppo.kl_coef=abc", "ppo.kl_coef=abc must be a number"),
    "null for a number": ("rollout.max_mismatch=null", "rollout.max_mismatch=null must be a number: type rollout.max_mismatch=..., or "),
    "null for a list": ("ppo.stop=null", "ppo.stop=null must be a list: type ppo.stop='[...]'"),
    "null for a block": ("wandb=null", "wandb is a block of keys (mode, project, entity): type wandb.mode=..."),
    "out of range": ("ppo.kl_coef=-1", "ppo.kl_coef=-1.0 must be 0 or more"),
    "attention of another family": ("model=tiny_bloom model.attention=sdpa", "model.attention=sdpa is not one of auto, packed, eager"),
    "attention that is not installed": ("model.attention=flash_attention_2", "needs the package flash-attn"),
    "rollout engine": ("rollout.engine=grpah", "rollout.engine=grpah is not one of auto, graph, hf"),
    "mismatch": ("rollout.max_mismatch=-1", "rollout.max_mismatch=-1.0 must be 0 or more"),
    "least longer than most": ("ppo.min_response_tokens=900", "ppo.min_response_tokens=900 is more than model.max_response_tokens="),
    "empty stop string": ("ppo.stop=['']", "holds an empty string"),
    "schedule that only had a name": ("sft.lr_schedule=polynomial", "is not one of constant, constant_with_warmup, linear, cosine"),
    "no choice": ("ppo.kl_estimator=k4", "is not one of k1, k2, k3"),
    "key of another stage": ("stage=sft ppo.kl_coef=1", "stage=sft does not use the ppo block. Leave it out, or type stage=ppo"),
    "key of DPO beside PPO": ("dpo.beta=0.2", "stage=ppo does not use the dpo block. Leave it out, or type stage=dpo"),
    "key of PPO beside a sweep of DPO": ("sweep=dpo_beta ppo.kl_coef=1", "stage=dpo does not use the ppo block"),
    "mistyped key of DPO": ("stage=dpo dpo.beat=0.1", "unknown key dpo.beat (did you mean dpo.beta?)"),
    "no hold on the actor": ("stage=dpo dpo.beta=0", "dpo.beta=0.0 must be above 0"),
    "labels of a coin": ("stage=dpo dpo.label_smoothing=0.5", "dpo.label_smoothing=0.5 must be 0 (off) or more, and below 0.5"),
    "impossible batch of pairs": ("stage=dpo hardware.micro_batch.dpo=5", "Type dpo.global_batch=35, or hardware.micro_batch.dpo=4"),
    "deleted block": ("~ppo", "leave out ~ppo"),
    "values for the sweeper": ("+hydra.sweeper.params.x=1 -m", "name the values after -m themselves, as in -m sft.lr=1e-3,1e-4"),
    "deleted block of Hydra": ("~hydra.callbacks", "hydra.callbacks cannot be deleted: leave out ~hydra.callbacks"),
    "launcher of no package": (
        "-m hydra/launcher=jobli seed=1",
        "hydra/launcher=jobli does not exist (did you mean joblib?). There are: basic, joblib, submitit_local, submitit_slurm",
    ),
    "interval": ("-m sft.lr=interval(1e-3,2e-3)", "list the ones to try, as in -m sft.lr=1e-3,2e-3"),
    "another working folder": ("hydra.job.chdir=true", "are relative to the folder that you are in. Leave it out"),
    "forced sweep": ("-m resume=force seed=1,2", "force one run at a time"),
    "null in a map of texts": (
        "dataset=jsonl dataset.path=x.jsonl dataset.fields.prompt=null",
        "dataset.fields.prompt=null must be a string: type dataset.fields.prompt=..., or leave it out",
    ),
    "adapters": ("model.actor.lora.dim=-1", "model.actor.lora.dim=-1 must be 0 or more"),
    "dropout of adapters": ("model.reward.lora.dropout=1", "model.reward.lora.dropout=1.0 must be 0 or more, and below 1"),
    "weight": ("dataset.sources.toy.weight=-1", "dataset.sources.toy.weight=-1.0 must be above 0: type ~dataset.sources.toy"),
    "a model that no batch is small enough for": ("model=opt66b hardware=a6000", "weights, gradients and optimizer alone take 1,"),
    "too many ranks for the batch": ("hardware=gpu64", "does not divide over 64 ranks. Type "),
    "impossible batch": ("hardware.micro_batch.sft=5", "Type sft.global_batch=35, or hardware.micro_batch.sft=4"),
    "impossible minibatch": (
        "ppo.minibatches=3",
        "does not divide into ppo.minibatches=3: type ppo.minibatches=2",
    ),
    "too long": ("model.max_prompt_tokens=2000", "is longer than the 1024 positions of model.actor.shape: lower one of them"),
    "no file": ("dataset=jsonl dataset.path=pears.jsonl", "data file pears.jsonl does not exist (looked from "),
    "mistyped adapter": ("dataset.sources.toy.adapter=fieds dry_run=true", "toy.adapter=fieds is unknown (did you mean fields?)"),
    "mistyped field": (
        f"dataset=jsonl dataset.path={RUN} dataset.fields.promt=x dry_run=true",
        "unknown name promt (did you mean prompt?)",
    ),
    "no path": ("dataset=jsonl", "dataset.path has no value: type dataset.path=..."),
    "no hub path": ("dataset=hub", "dataset.path has no value: type dataset.path=..."),
    "field names without their group": (
        "dataset.fields.prompt=q",
        "dataset.fields={prompt: q} is read by no source: dataset=toy has its own names. Leave it out, or also type dataset=jsonl",
    ),
    "field names of an adapter": ("dataset=shp dataset.sources.shp.fields={prompt:q}", "knows the names of its data set. Leave it out, or"),
    "key of a source": ("dataset=shp dataset.sources.shp.wieght=2", "did you mean dataset.sources.shp.weight?"),
    "field names of a preset": ("dataset=rm_static dataset.fields={prompt:q}", "is read by no source: dataset=rm_static has its own names"),
    "field names that one source does not take": (
        "dataset.fields={prompt:q} dataset.sources.mine={path:a/b}",
        "is read by no source: type dataset.sources.mine.fields='{prompt: q}'",
    ),
    "empty field name": ("dataset=hub dataset.path=a/b dataset.fields.prompt=''", "sources.hub.fields.prompt is empty: leave it out"),
    "mistyped source": (
        "dataset=deepspeed_chat dataset.sources.shpp.weight=2",
        "dataset.sources.shpp has no path (did you mean shp?). The sources are full_hh_rlhf, rm_static, shp, ",
    ),
    "mistyped source, and its path": (
        "dataset=deepspeed_chat dataset.sources.shpp.weight=2 dataset.sources.shpp.path=a/b",
        "dataset.sources.shpp.path does not exist (did you mean shp?). The sources are full_hh_rlhf, rm_static, shp, ",
    ),
    "path without its group": ("dataset.path=pairs.jsonl", "Also type dataset=jsonl (a file) or dataset=hub"),
    "unknown format": (f"dataset=jsonl dataset.path={RUN}", "unknown format; use one of .json, .jsonl"),
    "empty split": ("dataset.split.reward=0", "(dataset.split.reward=0): give it a share"),
    "demonstrations only": ("dataset=chinese", "type stage=sft, give it a share"),
    "prompts only": (f"dataset=prompts dataset.path={RUN} dataset.sources.prompts.path=a/b", "give the model of stage sft with sft.use="),
    "prompts only, and DPO": (
        f"dataset=prompts dataset.path={RUN} dataset.sources.prompts.path=a/b sft.use=a/b stage=dpo",
        "type stage=ppo",
    ),
    "prompts only, and a mixture": (
        f"dataset=prompts dataset.path={RUN} dataset.sources.prompts.path=a/b sft.use=a/b reward.use=a/b ppo.ptx_coef=1",
        "give text, dataset.pretrain='[FILE]'",
    ),
    "a stage that has no rows of its own": ("dataset.sources.toy.only=reward", "toy.only=reward is not one of sft, ppo, eval"),
    "no checkpoint": ("sft.use=/nowhere", "sft.use=/nowhere: this folder does not exist (looked from "),
    "mistyped DeepSpeed key": ("hardware.deepspeed={zero_optimisation:{}}", "did you mean zero_optimization?"),
    "DeepSpeed key that teaches": ("hardware.deepspeed.progressive_layer_drop.enabled=true", "changes what is learned"),
    "DeepSpeed's precision": (
        "hardware.deepspeed.bf16.bf16_master_weights_and_grads=true",
        "is decided by the runner: set hardware.precision",
    ),
    "our DeepSpeed key": ("hardware.deepspeed.optimizer.type=Adam", "is decided by the runner: set the stage's lr"),
    "random weights by another name": (
        "model.actor.init=random",
        "type model.actor.path=null for random weights",
    ),
    "random weights of no size": ("model.actor.shape=null", "model.actor.shape"),
    "checkpoint without a name": (
        "model.reward.path=",
        "path is empty: type a folder or a hub id, or null for",
    ),
    "checkpoint in place of random weights": ("model.actor.path=/models/opt", "model.actor.path=/models/opt: this folder does not exist"),
    "nothing held out": ("dataset.holdout=0", "dataset.holdout=0.0 must be above 0, and below 1"),
    "one moment decay": ("ppo.betas=0.9", "ppo.betas=0.9 must be two numbers: type ppo.betas='[0.9,0.95]'"),
    "one moment decay in a list": ("ppo.betas=[0.9]", "must be two numbers: type ppo.betas='[0.9,0.95]'"),
    "unknown interpolation": ("name=${nix}", "Interpolation key 'nix' not found"),
    "value for a block": ("wandb=disabled", "wandb is a block of keys (mode, project, entity): type wandb.mode=disabled"),
    "value for a list": ("dataset.sft_only=/x.jsonl", "must be a list: type dataset.sft_only='[/x.jsonl]'"),
    "value for a mapping": ("hardware.deepspeed=x", "must be a mapping: type hardware.deepspeed='{name: value}'"),
    "mapping cut by the shell": ("dataset.fields={prompt:", "needs quotes around it: dataset.fields='{name: value, other: value}'"),
    "launch command": ("hardware.launch='{pyton}{folder}'", "hardware.launch holds 'pyton': it may use {python}, "),
    "broken template": ("model.chat_template='{%' stage=sft", "model.chat_template is refused by the template engine: "),
    "null for a string": ("name=null", "name=null must be a string"),
    "null for a source": ("dataset.sources.toy=null", "dataset.sources.toy is a block of keys"),
    "null in a list": ("ppo.stop=[null]", "must be a list of plain values"),
    "list for a string": ("store=[a]", "must be a string"),
    "list for a block": ("dataset.split=[2,4,4]", "type dataset.split='{name: value}'"),
    "list for a mapping": ("dataset=jsonl dataset.path=x.jsonl dataset.fields=[a]", "type dataset.fields='{name: value}'"),
    "neither true nor false": ("dry_run=maybe", "dry_run=maybe must be true or false"),
    "infinity": ("sft.lr=inf", "sft.lr=inf must be a finite number"),
    "infinity by overflow": ("sft.epochs=1e400", "sft.epochs=inf must be a finite number"),
    "not a number": ("ppo.temperature=nan", "ppo.temperature=nan must be a finite number"),
    "seed of more than 32 bits": ("seed=99999999999999999999", "and below 4294967296"),
    "no option": ("model=", "model= does not exist. There are: bloom176b, "),
    "no such root": ("--config-name nix", "Cannot find primary config 'nix'"),
    "option with a plus": ("+experiment=debug", "the defaults list has it already. Type experiment=debug"),
    "two options": ("stage=[sft,ppo]", "one stage at a time. Type stage=..., or -m stage=sft,ppo"),
    "empty store": ("store=", "store is empty: type store="),
    "empty checkpoint": ("sft.use=", "sft.use is empty: type the folder of a checkpoint, or sft.use=null"),
    "empty path": ("dataset=jsonl dataset.path=", "dataset.path is empty: type dataset.path=/data/pairs.jsonl"),
    "accented path": ("dataset=jsonl dataset.path=/é.jsonl", "need quotes: 'dataset.path=\"/é.jsonl\"'"),
    "endless weight": ("dataset.sources.toy.weight=1e12", "type 1000 or less"),
    "small vocabulary": ("model.tokenizer_vocab=-1", "must be 259 or more"),
    "negative chunk": ("hardware.logits_chunk=-5", "hardware.logits_chunk=-5 must be 0 or more"),
    "launch of nothing": ("hardware.launch=", "does not say which step to work on: it must end with -m runner.worker {folder}"),
    "no DeepSpeed block": ("hardware.deepspeed.bf16=3", "bf16=3 is a block of settings: type hardware.deepspeed.bf16.NAME=VALUE"),
    "ZeRO stage of DeepSpeed": ("hardware.deepspeed.zero_optimization.stage=3", "is decided by the runner: set hardware.zero instead"),
    "unknown size": ("model.actor.shape.hiden_size=64", "the family opt has no such size (did you mean hidden_size?)"),
    "size of no kind": (
        "model.actor.shape.hidden_size=abc",
        "model.actor.shape.hidden_size=abc must be a whole number of 1 or more",
    ),
    "sizes that do not fit": (
        "model.reward.shape.num_attention_heads=7",
        "model.reward.shape is refused by transformers: embed_dim must be",
    ),
    "no layers": ("model.actor.shape.num_hidden_layers=0", "num_hidden_layers=0 must be a whole number of 1 or more"),
    "template without content": ("model.chat_template=hello", "leaves out what is said: it turns a message 'Hello' into 'hello'"),
    "template of no checkpoint": (
        "model.chat_template=null",
        "asks for that of a checkpoint, and random weights have none",
    ),
    "no learning rate": ("sft.lr=0", "sft.lr=0.0 must be above 0"),
    "no learning rate of a part": ("ppo.critic_lr=0", "ppo.critic_lr=0.0 must be above 0"),
    "no learning rate of adapters": ("sft.lora_lr=0", "sft.lora_lr=0.0 must be above 0"),
    "horizon of a step": ("ppo.kl_target=6 ppo.kl_horizon=12", "kl_coef to zero or below: type more than 12.8, by default 10000"),
    "target of no coefficient": ("ppo.kl_target=6 ppo.kl_coef=0", "would stay there: type ppo.kl_coef=0.05"),
    "adapters of all layers": ("model.actor.lora.targets=[all-linear]", "targets=[all-linear] is the default: leave it out"),
    "adapters of all layers, in a word": ("model.actor.lora.targets=all-linear", "lora.targets=all-linear is the default: leave it out"),
    "adapters of no layer": (
        "model.reward.lora.targets=[q_proj,vproj]",
        "model.reward.lora.targets: vproj is no layer of opt (did you mean v_proj?). Take some of embed_tokens, fc1, fc2, k_proj, lm_head",
    ),
    "adapters of no weight": ("model.actor.lora.dim=8 model.actor.lora.alpha=0", "model.actor.lora.alpha=0 gives its adapters (dim=8) no"),
    "empty project": ("wandb.project=", "wandb.project is empty: type a name, or wandb.mode=disabled"),
    "name of the store": ("name=store", "would put the folders of commands among the trained steps of store=runs/store"),
    "fp16 on a CPU": ("hardware.precision=fp16", "use fp32 or bf16"),
}


@pytest.mark.parametrize("words, says", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_in_one_message(words, says, refused):
    assert says in refused(*words.split())


def test_a_launcher_that_is_not_installed_is_named(refused, monkeypatch):
    monkeypatch.setattr("importlib.metadata.distributions", lambda name: iter(()))
    assert "pip install -c constraints.txt -e '.[sweep]'" in refused("-m", "hydra/launcher=submitit_local", "seed=1,2")


def test_paths_with_spaces_are_one_word_of_the_launch_command(monkeypatch):
    from runner.launch_command import command

    monkeypatch.setattr(sys, "executable", "/home/my name/.venv/bin/python")
    cfg = configured("hardware=cpu", "hardware.hostfile='my hosts'", "hardware.launch='{python} {hostfile} {folder}'")
    assert shlex.split(command(cfg, Path("/my store/x"))) == ["/home/my name/.venv/bin/python", "my hosts", "/my store/x"]


def test_near_checkpoints_are_named(refused, here):
    (here / "step" / "model").mkdir(parents=True)
    (here / "step" / "model" / "config.json").write_text('{"model_type": "opt", "architectures": ["OPTForSequenceClassification"]}')
    assert "type sft.use=step/model" in refused("sft.use=./step")
    for typo, meant in {"./stp": "step", "step/modle": "step/model", "./stp/model": "step/model"}.items():
        assert f"sft.use={typo}: this folder does not exist" in (message := refused(f"sft.use={typo}"))
        assert f"Did you mean {meant}?" in message
    (here / "other").mkdir()
    message = refused("model=opt175b", "hardware=dgx8")  # Meta gives its weights on request
    assert "its file in conf/model/ says where to get the checkpoint" in message and "other" not in message
    (here / "bert").mkdir()
    (here / "bert" / "config.json").write_text('{"model_type": "bert"}')
    assert "sft.use=./bert is a model of the family bert, which is not supported: families are opt, bloom, " in refused("sft.use=./bert")
    pretrained = "model.actor.path=./bert", "stage=sft"
    assert "model.actor.path=./bert is a model of the family bert, which is not supported" in refused(*pretrained)
    assert "is a language model (ForCausalLM)" in refused("sft.use=./step/model")
    assert "reward.use=./step/model sorts texts into 2 labels; a reward model gives one score" in refused("reward.use=./step/model")
    critic = {"model_type": "opt", "architectures": ["OPTForSequenceClassification"], "id2label": {"0": "x"}, "value_mean": 0.5}
    (here / "critic").mkdir()
    (here / "critic" / "config.json").write_text(json.dumps(critic))
    for words in (["reward.use=./critic"], ["model.reward.path=./critic", "stage=reward"]):
        assert "/critic is PPO's critic, whose values are in other units" in refused(*words, "dry_run=true")
    assert "scores texts and writes none" in refused("model.actor.path=./step/model", "stage=sft")
    assert "step/model/config.json is a file: type sft.use=step/model" in refused("sft.use=step/model/config.json")
    (here / "odd").mkdir()
    (here / "odd" / "config.json").write_text('{"model_type": "opt", "architectures": [3]}')  # a file may hold anything
    message = refused("model.actor.path=./odd", "stage=sft", "dry_run=true")
    assert "odd has no tokenizer" in message and "or write them with tokenizer.save_pretrained('odd')" in message
    (here / "odd" / "config.json").write_text('{"model_type": "opt", "max_position_embeddings": 99}')
    (here / "odd" / "tokenizer.json").write_text("{}")
    assert "longer than the 99 positions of ./odd" in refused("model.actor.path=./odd", "stage=sft", "dry_run=true")
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 98}  # from there on a row depends on the others of its batch
    settings = {"model_type": "opt", "max_position_embeddings": 9999, "rope_parameters": rope}
    (here / "odd" / "config.json").write_text(json.dumps(settings))
    assert "longer than the 98 positions of ./odd" in refused("model.actor.path=./odd", "stage=sft", "dry_run=true")
    (here / "odd" / "config.json").write_text('{"model_type": "opt", "rope_scaling": "linear", "id2label": 3}')
    assert "model folder odd has no weights" in refused("model.actor.path=./odd", "stage=sft", "dry_run=true")
    (here / "llama").mkdir()
    (here / "llama" / "config.json").write_text('{"model_type": "llama"}')
    message = refused("model.reward.path=./llama", "stage=reward", "dry_run=true")
    assert "is a model of the family llama, but model=tiny is of opt: pick a preset of the family llama" in message


def test_what_is_no_checkpoint_is_recognised(refused, here):
    for folder, file in (("step/adapter", "adapter_config.json"), ("adapter", "adapter_config.json"), ("gguf", "opt.gguf")):
        (here / folder).mkdir(parents=True)
        (here / folder / file).write_text("{}")
    (here / "step" / "model").mkdir()
    (here / "step" / "model" / "config.json").write_text('{"model_type": "opt"}')
    assert "holds adapters, which are no model without the one that they adapt: type sft.use=step/model" in refused("sft.use=step/adapter")
    assert "merge them with peft" in refused("sft.use=./adapter")
    assert "is in llama.cpp's format" in refused("sft.use=./gguf")
    assert "is in llama.cpp's format" in refused("model.actor.path=./gguf/opt.gguf", "stage=sft")


def test_hub_names_and_folders_are_told_apart(here):
    from runner.checks.paths import is_local

    (here / "models").mkdir()
    assert not any(map(is_local, ("gpt2", "facebook/opt-125m", "Dahoas/rm-static")))
    assert all(map(is_local, ("runs/store", "runs/store/sft-1/model", "a/b/c", "models/opt", "./gpt2", "~/gpt2", "pairs.jsonl", "models")))


def test_a_tilde_is_the_home_folder_in_every_path_and_nowhere_else(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    paths = ["store", "model.actor.path", "model.reward.path", "sft.use", "reward.use", "dataset.path", "hardware.hostfile"]
    lists = ["dataset.sft_only", "dataset.ppo_only", "dataset.eval_only", "dataset.pretrain"]
    words = [f'{key}="~/x.jsonl"' for key in paths] + [f'{key}=["~/x.jsonl"]' for key in lists]
    cfg = configured("dataset=jsonl", 'ppo.stop=["~/"]', *words)
    assert [attrgetter(key)(cfg) for key in paths] == ["/home/ann/x.jsonl"] * len(paths)
    assert [attrgetter(key)(cfg) for key in lists] == [["/home/ann/x.jsonl"]] * len(lists)
    assert {source.path for source in cfg.dataset.sources.values()} == {"/home/ann/x.jsonl"}
    assert cfg.ppo.stop == ["~/"]


def test_stop_strings_are_typed_with_escapes(tmp_path):
    cfg = configured(r'ppo.stop=["\n\nHuman:", "a\tb", "\\text"]')
    assert cfg.ppo.stop == ["\n\nHuman:", "a\tb", r"\text"]
    OmegaConf.save(OmegaConf.structured(cfg), tmp_path / "saved.yaml")
    assert load(tmp_path / "saved.yaml").ppo.stop == cfg.ppo.stop  # as the worker reads it


def test_a_preset_with_weights_of_ones_own_takes_random_ones_too():
    assert configured("model=opt175b", "model.actor.path=null", "model.reward.path=null").model.actor.random


def test_an_experiment_may_fill_blocks_that_the_stage_does_not_read():
    cfg = configured("stage=sft", "experiment=debug")
    assert cfg.sft.max_steps == 2
    assert cfg.ppo is None


# --- what is wrong with data, models and machines: found before the first step is trained ------------------------------


def test_broken_rows_are_named_or_counted(here, refused):
    from runner.plan import plan
    from runner.prepare import prepare

    rows = [json.dumps({"prompt": f"Question {i}?", "chosen": f"Answer {i}.", "rejected": f"No {i}."}) for i in range(300)]
    Path("broken.jsonl").write_text("\n".join([*rows[:6], '{"prompt": "a", ', *rows[6:]]))
    Path("lacks.jsonl").write_text("\n".join([*rows[:3], '{"prompt": "a", "rejected": "b"}', *rows[3:]]))
    file = "dataset=jsonl", "stage=sft", "dataset.path=broken.jsonl"
    assert "broken.jsonl:7: not valid JSON (Expecting property name enclosed in double quotes at column 16)" in refused(*file)
    message = refused("dataset=jsonl", "stage=sft", "dataset.path=lacks.jsonl")
    assert "lacks.jsonl:4: no response among the fields prompt, rejected" in message
    assert "dataset.on_bad_row=skip" in message
    Path("named.jsonl").write_text('{"question": "a", "good": "b", "bad": "c"}\n')
    message = refused("dataset=jsonl", "dataset.path=named.jsonl")
    assert "type dataset.fields='{prompt: question, chosen: good, rejected: bad}'" in message
    Path("judged.jsonl").write_text('{"query": "a", "response_a": "b", "response_b": "c", "preferred": "b"}\n')
    message = refused("dataset=jsonl", "dataset.path=judged.jsonl")
    assert "Field preferred says which answer is better" in message and "write the rows as prompt, chosen and rejected" in message
    assert "dataset.fields" not in message
    shp = {"history": "a", "human_ref_A": "b", "human_ref_B": "c", "labels": 1}
    Path("shp.jsonl").write_text(json.dumps(shp))
    message = refused("dataset=jsonl", "dataset.path=shp.jsonl")
    assert message.endswith("It looks like a row of a published set: type dataset.sources.jsonl.adapter=shp")
    Path("fine.jsonl").write_text("\n".join(rows))
    message = refused("dataset=jsonl", "dataset.path=fine.jsonl", "dataset.sft_only=[shp.jsonl]")
    assert "dataset.sources.more='{path: shp.jsonl, adapter: shp, only: sft}'" in message
    message = refused("dataset=jsonl", "dataset.path=fine.jsonl", "dataset.sft_only=[named.jsonl]")
    assert "Name its fields prompt and response" in message and "dataset.fields" not in message  # that map is another file's
    assert "field question is missing" in refused("dataset=jsonl", "dataset.path=lacks.jsonl", "dataset.fields={prompt: question}")

    cfg = configured(*file, "dataset.on_bad_row=skip", f"store={here}")
    inputs = prepare(cfg, plan(cfg))
    counts = json.loads((Path(inputs["sft"]["data"]) / "counts.json").read_text())
    assert counts["dropped"] == {"broken row": 1}


def test_data_that_is_no_file_of_rows_is_said_before_it_is_read(here, refused):
    """A folder is not hashed, which may be a whole disk, and a pipe is not waited for."""
    (here / "data").mkdir()
    (here / "data" / "rows.jsonl").write_text("{}")
    (here / "data" / "gone.jsonl").symlink_to("nowhere")
    os.mkfifo(here / "pipe.jsonl")
    message = refused("dataset=jsonl", "dataset.path=./data")
    assert "folder ./data was not written by datasets' save_to_disk: name one of" in message
    assert "not a regular file" in refused("dataset=jsonl", "dataset.path=pipe.jsonl")
    assert refused("dataset=jsonl", "dataset.path=data/gone.jsonl").endswith("similar names there: rows.jsonl")


def test_several_files_are_several_sources(here, refused):
    rows = [json.dumps({"prompt": f"Question {i}?", "chosen": f"Answer {i}.", "rejected": f"No {i}."}) for i in range(300)]
    (here / "data").mkdir()
    for name in "ab":
        (here / "data" / f"{name}.jsonl").write_text("\n".join(rows))
    for path in ("./data", "data/*.jsonl", "[data/a.jsonl,data/b.jsonl]"):
        assert "dataset.sources.more='{path: FILE}' for another" in refused("dataset=jsonl", f"dataset.path={path}")
    cfg = configured(
        *check_overrides(["dataset=jsonl", "dataset.path=data/a.jsonl", "dataset.sources.more={path: data/b.jsonl}"], ROOT / "conf")
    )
    assert {name: source.path for name, source in cfg.dataset.sources.items()} == {"jsonl": "data/a.jsonl", "more": "data/b.jsonl"}


def test_a_split_of_a_local_file_is_refused_before_anything_starts(here, refused):
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    message = refused("dataset=jsonl", "dataset.path=pairs.jsonl", "dataset.sources.jsonl.split=train_prefs", "dry_run=true")
    assert message.startswith("split=train_prefs: pairs.jsonl has no splits. Leave split out to read it whole")


@pytest.mark.parametrize(
    "words, names",
    [
        ("stage=sft", "facebook/opt-1.3b"),
        ("stage=reward", "facebook/opt-350m"),
        ("stage=ppo", "facebook/opt-1.3b, facebook/opt-350m"),
        ("stage=dpo sft.use=user/mine", "user/mine"),
        ("stage=sft dataset.pretrain=[user/text]", "facebook/opt-1.3b"),
        ("stage=ppo dataset.pretrain=[user/text] ppo.ptx_coef=1", "user/text, facebook/opt-1.3b, facebook/opt-350m"),
    ],
)
def test_without_network_only_what_the_steps_read_is_looked_for(words, names, here, monkeypatch, capsys):
    from runner.plan import plan
    from runner.preflight import _go_offline_without_network

    monkeypatch.setattr("runner.preflight.hub_answers", lambda: False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    cfg = configured("model=opt1.3b", *words.split())
    _go_offline_without_network(cfg, plan(cfg))
    assert f"looking for {names} in the local cache only" in capsys.readouterr().err


def test_what_is_odd_about_a_row_is_said(here, refused):
    rows = [json.dumps({"prompt": f"Question {i}?", "chosen": f"Answer {i}.", "rejected": f"No {i}."}) for i in range(300)]
    Path("commas.jsonl").write_text(",\n".join(rows))
    Path("comma.json").write_text(f"[{','.join(rows)},\n]")
    Path("null.jsonl").write_text('{"prompt": "a", "chosen": null}\n')
    Path("empty.jsonl").write_text('{"prompt": [], "chosen": "a", "rejected": "b"}\n')
    Path("long.jsonl").write_text("\n".join(row.replace("Answer", "Answer " * 300) for row in rows))
    file = "dataset=jsonl", "stage=sft"
    assert "a row ends with its }, without a comma" in refused(*file, "dataset.path=commas.jsonl")
    assert (
        "comma.json:2: not valid JSON" in (message := refused(*file, "dataset.path=comma.json")) and "comma behind the last row" in message
    )
    assert "null.jsonl:1: field chosen is null" in refused(*file, "dataset.path=null.jsonl")
    assert "dropped: 1 empty prompt" in refused(*file, "dataset.path=empty.jsonl")
    assert "Raise model.max_response_tokens" in refused(*file, "dataset.path=long.jsonl")


def test_too_few_prompts_and_rows_are_said(here, refused):
    rows = [json.dumps({"prompt": f"Question {i}?", "chosen": f"Answer {i}.", "rejected": f"No {i}."}) for i in range(60)]
    Path("few.jsonl").write_text("\n".join(rows))
    words = ("dataset=jsonl", "dataset.path=few.jsonl", "dataset.holdout=0.2")
    assert "fewer than ppo.rollout_batch=64: lower it" in refused(*words)
    message = refused(*words, "ppo.minibatches=64")
    count, typed, minibatches = map(int, re.findall(r"are (\d+) prompts .* ppo.rollout_batch=(\d+) ppo.minibatches=(\d+), or", message)[0])
    assert count == typed == minibatches
    Path("none.jsonl").write_text("")
    assert refused("dataset=jsonl", "dataset.path=none.jsonl") == "none.jsonl holds no rows"


def test_what_a_stage_makes_of_its_data_is_said_before_it_trains(capsys):
    def said(counts: dict, *words: str) -> str:
        cfg = configured(*words)
        check_amounts(cfg, cfg.stage, counts)
        return "".join(capsys.readouterr())

    long = {"train": 75, "eval": 5, "needed": {"288": 15, "1024": 5}}
    assert "drops 20 of 100 rows, whose responses are longer than model.max_response_tokens=256. With 288 it drops 5" in said(
        long, "stage=sft"
    )
    assert "longer than" not in said(long | {"train": 300}, "stage=sft")
    marked = {"train": 90, "eval": 10, "special": {"</s>": 3, "<s>": 4}, "foreign": {"[INST]": 60, "<|user|>": 1}}
    text = said(marked, "stage=sft")
    assert "special tokens (<s>, </s>) were taken out of the texts of 7 rows of sft" in text
    assert "61 rows of sft hold [INST], as if another chat template had been applied" in text
    assert "template" not in said({"train": 90, "eval": 10, "foreign": {"### Response:": 1}}, "stage=sft")
    dialogues = {"train": 90, "eval": 10, "earlier": 200}
    assert "200 answers before the last one of their dialogue are not trained on: dataset.every_answer=true does" in said(
        dialogues, "stage=sft"
    )
    assert "every_answer" not in said(dialogues, "stage=sft", "dataset.every_answer=true")
    split = {"train": 80, "elsewhere": {"sft": 40, "ppo": 80}}
    text = said(split, "stage=reward")
    assert "keeps the prompts of 120 comparisons for sft and ppo" in text
    assert "dataset.split='{sft: 0, reward: 1, ppo: 0}' gives reward all" in text
    assert "comparisons" not in said({"train": 80, "elsewhere": {"ppo": 0}}, "stage=sft")
    single = {"train": 80, "elsewhere": {"sft": 40}, "owned": {"sft": 240, "reward": 80}}
    assert "200 rows have no `rejected`: only SFT can use them" in said(single, "stage=reward")
    slow = ("stage=ppo", "ppo.kl_target=6", "ppo.epochs=1")
    assert "moves ppo.kl_coef by 0.021 times its value at most in the 1,024 responses" in said({"train": 1034}, *slow)
    assert "type a smaller ppo.kl_horizon than 10000, for example 102" in said({"train": 1034}, *slow)
    assert "kl_target" not in said({"train": 1034}, *slow, "ppo.kl_horizon=400")
    words = ("stage=reward", "reward.global_batch=16", "reward.epochs=2")
    text = said(split, *words, "reward.max_steps=33")
    assert "reward.max_steps=33 is more than the 10 steps of reward.epochs=2: type reward.epochs=7 for as many" in text
    assert "more than the" not in said(split, *words, "reward.max_steps=10")


def test_a_result_that_is_given_is_said_to_train_nothing(here, capsys):
    from runner.plan import plan
    from runner.plan_view import results_at_hand

    cfg = configured("stage=sft", "sft.use=a/b")
    (note,) = results_at_hand(cfg, plan(cfg))
    assert note == "sft.use=a/b is the result itself, so nothing is trained. To train that model further: model.actor.path=..."
    cfg = configured("stage=ppo", "sft.use=a/b")
    assert not [*results_at_hand(cfg, plan(cfg))]


def test_a_best_checkpoint_that_nobody_kept_is_missed_aloud(tmp_path):
    from runner.plan import plan
    from runner.plan_view import results_at_hand

    cfg = configured("stage=sft", f"store={tmp_path}", "checkpoint.keep_best=1")
    (step,) = plan(cfg)
    step.folder.mkdir(parents=True)
    (step.folder / "DONE").touch()
    for kept, notes in ((0, 1), (1, 0)):
        (step.folder / "config.yaml").write_text(f"checkpoint: {{keep_best: {kept}}}")
        found = list(results_at_hand(cfg, [step]))
        assert len(found) == notes and all("comes too late for sft" in note and step.folder.name in note for note in found)


@pytest.mark.parametrize(
    "words, warned",
    [("", True), ("ppo.epochs=2", True), ("ppo.epochs=3", False), ("ppo.rollout_batch=16", False), ("ppo.max_steps=2", False)],
)
def test_a_ppo_of_few_iterations_is_warned_of(words, warned, capsys):
    """150 prompts in batches of 64 are two iterations. Who asked for so few has what he wanted."""
    check_amounts(configured(*words.split()), "ppo", {"train": 150})
    said = capsys.readouterr().err
    assert ("too few to learn from. Type ppo.epochs=3 or more" in said) == warned, said


@pytest.mark.parametrize(
    "stage, words, warned",
    [
        ("sft", "sft.warmup=1000", True),
        ("reward", "reward.warmup=1000 reward.epochs=1", True),
        ("ppo", "ppo.warmup=1000 ppo.epochs=4", True),
        ("sft", "sft.warmup=1000 sft.lr_schedule=constant", False),  # which has none
        ("sft", "sft.warmup=0.9", False),
        ("sft", "sft.warmup=1", False),
    ],
)
def test_a_warmup_longer_than_the_run_is_warned_of(stage, words, warned, capsys):
    check_amounts(configured(*words.split()), stage, {"train": 150})
    said = capsys.readouterr()
    assert (f"a warmup of 1000 steps ({stage}.warmup) only reaches " in said.err) == warned, said.err
    ignored = f"note: {stage}.warmup=1000 has no effect: type {stage}.lr_schedule=constant_with_warmup"
    assert (ignored in said.out) == ("constant" in words), said.out


@pytest.mark.parametrize(("rows", "noted"), [(31, True), (32, False)])
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_a_batch_larger_than_the_data_is_noted(stage, rows, noted, capsys):
    check_amounts(configured(f"stage={stage}", f"{stage}.global_batch=32"), stage, {"train": rows})
    assert (f"{stage} has 31 rows, fewer than {stage}.global_batch=32" in capsys.readouterr().out) == noted


def test_a_warmup_of_the_critic_that_leaves_the_actor_nothing_is_refused():
    check_amounts(configured("ppo.critic_warmup=9", "ppo.epochs=1"), "ppo", {"train": 640})
    with pytest.raises(UserError, match=r"in all of the 10 iterations, and the actor in none: type ppo.critic_warmup=1,"):
        check_amounts(configured("ppo.critic_warmup=10", "ppo.epochs=1"), "ppo", {"train": 640})


@pytest.mark.parametrize(
    "words, says",
    [
        ("zero_optimization.reduce_bucket_size=lots", "zero_optimization.reduce_bucket_size=lots is refused by DeepSpeed: "),
        ("communication_data_type=fp17", "hardware.deepspeed is refused by DeepSpeed: Invalid communication_data_type"),
    ],
)
def test_what_deepspeed_refuses_is_said_before_data_is_read(words, says, here, refused):
    assert says in refused(f"hardware.deepspeed.{words}", "hardware.zero.actor=1")
    assert not (here / "runs" / "store").exists()


def test_too_few_gpus_are_said_before_data_is_read(here, refused):
    import torch

    if torch.cuda.device_count() >= 8:
        pytest.skip("this machine has eight GPUs")
    message = refused("hardware=dgx8")
    assert "hardware=dgx8 needs 8 GPUs, this machine has" in message and "dry_run=true" in message
    assert not (here / "runs" / "store").exists()


def test_a_refused_command_leaves_no_folder_behind(here, refused):
    refused("ppo.gamma=2")
    refused("dataset=jsonl", "dataset.path=pears.jsonl")
    assert not any(here.iterdir())
    (here / "runs" / "demo" / "kept").mkdir(parents=True)
    refused("ppo.gamma=2")
    assert [path.name for path in here.rglob("*")] == ["runs", "demo", "kept"]


def test_named_runs_show_no_traceback(refused):
    assert "ppo.gamma=2.0" in refused("ppo.gamma=2", "experiment=debug")


def test_machines_that_nobody_has_named_are_said_before_data_is_read(here, refused, capfd, monkeypatch):
    assert "hardware.hostfile=hostfile does not exist (looked from " in (message := refused("model=opt66b", "hardware=gpu64"))
    assert "one line `machine slots=8` into it for each of the 8 machines" in message
    assert not (here / "runs" / "store").exists()
    monkeypatch.setattr("sys.argv", [RUN, "dry_run=true", "model=opt66b", "hardware=gpu64"])
    runpy.run_path(RUN, run_name="__main__")
    assert "note: hardware.hostfile=hostfile does not exist" in capfd.readouterr().out


def test_wandb_online_without_a_key_is_said_before_data_is_read(here, refused, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(here))  # no ~/.netrc
    assert "there is no API key: set WANDB_API_KEY" in refused("wandb.mode=online")
    assert not (here / "runs" / "store").exists()


def test_the_key_of_a_wandb_server_of_ones_own_is_found(here, monkeypatch):
    from runner.wandb_login import has_wandb_key

    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(here))
    (here / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password x\n")
    assert has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.com:8080")
    assert not has_wandb_key()
    (here / "mine").write_text("machine wandb.example.com login user password x\n")
    monkeypatch.setenv("NETRC", str(here / "mine"))
    assert has_wandb_key(in_file=True)


def test_commands_of_the_same_second_have_folders_of_their_own(here):
    from hydra.core.utils import setup_globals

    from runner.cli.hydra_callback import make_folder

    setup_globals()
    for _ in range(2):
        config = OmegaConf.create({"hydra": {"run": {"dir": "runs/${now:%H-%M-%S}"}, "sweep": {"dir": "given"}}})
        make_folder(config, "run")
        assert Path(config.hydra.run.dir).is_dir()
        make_folder(config, "sweep")  # a folder that was typed may be there
    assert len(list((here / "runs").iterdir())) == 2 and (here / "given").is_dir()


def test_the_working_folder_is_never_removed(here):
    from runner.files import remove_unused

    remove_unused(Path())
    remove_unused(here.parent)
    assert here.is_dir()


def test_wandb_without_a_network_stays_offline_or_is_refused(monkeypatch, capsys, tmp_path):
    """wandb itself would try for a minute and a half, in the worker."""
    from runner import preflight

    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_MODE", "online")  # so that it is put back
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    (tmp_path / "settings").write_text("[default]\nbase_url = https://wandb.example.com\n")
    asked = []
    monkeypatch.setattr(preflight, "answers", lambda address: asked.append(address))
    with pytest.raises(UserError, match=r"cannot be reached: type wandb.mode=offline"):
        preflight._check_wandb(configured("wandb.mode=online"))
    preflight._check_wandb(configured("wandb.mode=offline"))
    assert "WANDB_MODE" not in os.environ
    preflight._check_wandb(configured("wandb.mode=auto"))
    assert os.environ["WANDB_MODE"] == "offline" and "W&B runs are kept offline" in capsys.readouterr().err
    assert set(asked) == {"https://wandb.example.com"}


def test_what_the_launcher_imports_at_the_top_is_quick():
    """torch takes seconds, and wandb one: only what needs them imports them."""
    modules = ("preflight", "plan_view", "wandb_login", "forecast.show", "reporting.summary", "faults")
    code = f"import sys, {', '.join(f'runner.{name}' for name in modules)}; print({{'torch', 'transformers', 'wandb'}} & {{*sys.modules}})"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert told.stdout.strip() == "set()", told.stderr


def test_a_server_that_needs_no_proxy_is_asked_itself(monkeypatch):
    from runner import preflight

    asked = []
    monkeypatch.setattr(preflight.socket, "create_connection", lambda where, timeout: asked.append(where) or io.BytesIO())
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "inside.example.com")
    for address in ("https://api.wandb.ai", "https://inside.example.com:8080"):
        preflight.answers(address)
    assert asked == [("proxy", 3128), ("inside.example.com", 8080)]


def test_over_ssh_secrets_must_lie_in_files(here, refused, monkeypatch):
    """The workers inherit no secret of the environment."""
    import huggingface_hub.constants

    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    (here / "hostfile").write_text("one slots=8\n")
    words = ("model=opt13b", "hardware=gpu64", "dataset=toy")
    lost = "does not reach workers that hardware=gpu64 starts over ssh: type"
    assert f"WANDB_API_KEY {lost} `wandb login`" in refused(*words, "wandb.mode=online")
    monkeypatch.setattr("runner.preflight.hub_answers", lambda: True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(here / "token"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a1B2" * 8)
    assert f"HF_TOKEN {lost} `hf auth login`" in refused(*words)


def test_a_store_that_cannot_be_made_is_said(refused, here):
    (here / "file").write_text("")
    assert "store=file/store cannot be created (Not a directory): type store=" in refused("store=file/store")


def full(*args, **kwargs):
    raise OSError(30, "Read-only file system")


def test_a_store_that_cannot_be_written_to_is_said(refused, here, monkeypatch):
    """Mode bits do not keep root out, so the disk has to say so."""
    monkeypatch.setattr("runner.prepare.TemporaryFile", full)
    assert "store=here cannot be written to (Read-only file system): type store=" in refused("store=here")


def test_a_working_folder_in_which_nothing_can_be_made_is_said(refused, here):
    (here / "runs").write_text("")
    assert "call run.py from a folder of yours, or type hydra.run.dir=/a/folder/of/yours" in refused("dry_run=true")
    assert "runs/x cannot be created here (Not a directory)" in refused("dry_run=true", f"hydra.run.dir={here}/runs/x")
    assert "or type hydra.sweep.dir=" in refused("-m", "dry_run=true", "seed=1,2")


def test_a_finished_step_is_reused_without_a_lock(tmp_path):
    """A store that several people read from need not be writable."""
    from runner.launch import launch
    from runner.plan import plan

    cfg = configured("stage=sft", f"store={tmp_path / 'store'}")
    (step,) = plan(cfg)
    step.folder.mkdir(parents=True)
    (step.folder / "DONE").touch()
    os.utime(step.folder / "DONE", (1, 1))
    assert launch(cfg, step, None, tmp_path / "run") is False
    assert (step.folder / "DONE").stat().st_mtime > 1  # `python -m runner.store` says when it was last used
    assert (tmp_path / "run" / "sft").resolve() == step.folder and not (tmp_path / "store" / "locks").exists()


@pytest.mark.parametrize(("string", "instead"), [("</s>", "responses end there anyway"), ("a<pad>", "type model.end_token='<pad>'")])
def test_special_tokens_are_no_stop_strings(string, instead, refused):
    message = refused(f'ppo.stop=["a", "{string}"]')
    assert "a special token of" in message and instead in message


def test_a_stop_string_that_the_tokenizer_cannot_write_is_refused(tokenizer):
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    from runner.prepare import _check_stops

    _check_stops(["\n\nHuman:", "用户", " "], "here", tokenizer)
    lower = Tokenizer(models.WordLevel({"human": 0, "?": 1, "</s>": 2}, unk_token="?"))
    lower.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match=r"ppo.stop: 'Human' would never be found, for here writes it as '.*human'"):
        _check_stops(["Human"], "here", PreTrainedTokenizerFast(tokenizer_object=lower, eos_token="</s>"))


def test_actor_and_reward_model_must_share_their_tokens(here, refused, tokenizer):
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from runner.models.tokenizer import train_tokenizer

    other = train_tokenizer(["entirely different words " * 9], 280)
    shape = {"hidden_size": 8, "ffn_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "word_embed_proj_dim": 8}
    for name, kind in (("actor", tokenizer), ("reward", other)):
        AutoConfig.for_model("opt", vocab_size=512, max_position_embeddings=512, **shape).save_pretrained(here / name)
        kind.save_pretrained(here / name)
        save_file({"x": torch.zeros(1)}, here / name / "model.safetensors")
    folders = [f"model.{part}.path=./{part}" for part in ("actor", "reward")]
    assert "have different tokenizers" in refused(*folders)
    message = refused("sft.use=./actor")  # beside a reward model with random weights, whose tokenizer is trained on the data
    assert "Use the data and model of the run that sft.use comes from" in message and "reward.use=..." in message
    message = refused("model.reward.path=./reward", "dataset.toy_rows=200")
    assert "with a tokenizer trained on the data: type model.actor.path=... too" in message
    assert "longer than the 512 positions of ./actor" in refused(*folders, "model.reward.path=./actor", "model.max_prompt_tokens=300")
    assert "longer than the 512 positions of ./actor" in refused("sft.use=./actor", "stage=dpo", "model.max_prompt_tokens=300")
    message = refused("stage=reward", "model.reward.shape.max_position_embeddings=300", "dataset.toy_rows=100")
    assert "longer than the 300 positions of model.reward.shape" in message
    assert "pick a preset of the family opt" in refused(*folders, "model.family=llama", "stage=sft")
    assert "model.actor.path=./runs is not a Hugging Face checkpoint" in refused(*folders, "model.actor.path=./runs", "stage=sft")
    message = refused(*folders, "model.actor.path=/models/opt", "stage=sft")
    assert "model.actor.path=/models/opt: this folder does not exist" in message and "Repo id" not in message


def test_an_end_token_that_is_new_is_said_or_refused(here, tokenizer_folder, capsys):
    from runner.prepare import _tokenizer

    def read(end: str, *words: str) -> str:
        cfg = configured(f"model.actor.path={tokenizer_folder}", f"model.end_token='{end}'", *words)
        for key in ("model.actor.path", "sft.use"):  # the note comes once
            assert _tokenizer(cfg, here, cfg.model.actor, key)[1].eos_token == end
        return capsys.readouterr().err

    note = f"note: model.end_token=STOP is not in the vocabulary of {tokenizer_folder}: it is added as a new token"
    assert (said := read("STOP")).startswith(note) and said.count("\n") == 1
    adapters = "model.actor.lora.dim=4"
    assert read("<s>", adapters) == ""
    assert read("STOP2", adapters, "model.actor.lora.train_rest=true").startswith("note: model.end_token=STOP2")
    with pytest.raises(UserError, match=r"type a token of the vocabulary \(such as </s>\), or model.actor.lora.train_rest=true"):
        read("STOP", adapters)


def test_a_checkpoints_own_chat_template_is_kept_or_said_to_be_replaced(here, tokenizer_folder, capsys):
    from runner.models.tokenizer import load_tokenizer
    from runner.prepare import _tokenizer

    own = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    load_tokenizer(str(tokenizer_folder), chat_template=own).save_pretrained(here / "tuned")
    load_tokenizer(str(tokenizer_folder)).save_pretrained(here / "base")

    def read(name: str, *words: str):
        cfg = configured(f"model.actor.path=./{name}", *words)
        return cfg.model.chat_template, _tokenizer(cfg, here, cfg.model.actor, "model.actor.path")[1].chat_template

    ours, used = read("tuned")
    assert used == ours
    note = "note: ./tuned has a chat template of its own, which model.chat_template replaces. To keep it, type model.chat_template=null\n"
    assert capsys.readouterr().err == note
    assert read("tuned", "model.chat_template=null") == (None, own)
    assert read("base") == (ours, ours)
    assert read("tuned") == (ours, ours)
    assert capsys.readouterr().err == ""  # said once, though the reward model may be the same checkpoint
    with pytest.raises(UserError, match=r"\./base has no chat template, and model\.chat_template=null asks for it\. Leave model"):
        read("base", "model.chat_template=null")


@pytest.mark.parametrize(
    "words, says",
    [
        ("model=opt125m hardware=cpu", "model facebook/opt-125m is not in the local Hugging Face cache, and the hub cannot be reached"),
        ("sft.use=facebook/opt-125m", "and type sft.use=FOLDER"),
        ("dataset=hub dataset.path=Dahoas/rm-static", "data set Dahoas/rm-static cannot be loaded"),
    ],
)
def test_without_network_the_hub_is_given_up_soon(words, says, here):
    """An endpoint where nobody listens: a machine that has a network shall see the same."""
    start = time.monotonic()
    done = process(*words.split(), HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(here), HTTPS_PROXY="", https_proxy="")
    took = time.monotonic() - start
    if took >= 22:  # the hub's retries take 23 s; a busy machine takes as long for a command that never asks the hub
        process(*words.split(), HF_HUB_OFFLINE="1", HF_HOME=str(here))
        assert took < 2 * (time.monotonic() - start - took)
    assert done.returncode == 1
    assert "looking for" in done.stderr
    assert says in one_message(done.stderr)


# --- tracebacks, for those who ask ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, environment",
    [
        ("ppo.gamma=2", {"HYDRA_FULL_ERROR": "1"}),
        ("ppo.gamma=2 debug=true", {}),
        ("ppo.gama=2 debug=true", {}),
    ],
)
def test_tracebacks_come_when_asked_for(words, environment, here):
    done = process(*words.split(), **environment)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "UserError" in done.stderr


@pytest.mark.parametrize(
    "words, errors",
    [
        (
            ["ppo.gamma=2,1", "seed=range(1,6)", "ppo.top_k=1,0"],
            [
                "15 of the 20 jobs",
                "none was started",
                "top_k=1 .*\\(jobs 0, 2, 4 and 7 more\\)",
                "gamma=2.0 .*\\(jobs 1, 3, 5 and 2 more\\)",
            ],
        ),
        (["ppo.kl_coef=-1,abc"], ["no job of this sweep can run:", "ppo.kl_coef=-1.0 .*\\(job 0\\)", "ppo.kl_coef=abc .*\\(job 1\\)"]),
        (["sweep=kl", "ppo.gamma=2"], ["error: ppo.gamma=2.0 "]),
        (["sweep=glob(k*)", "ppo.gamma=2"], ["error: ppo.gamma=2.0 "]),
        (["seed=1,2", "ppo.gamma=2", "hydra.sweep.subdir=${hydra.job.num}"], ["error: ppo.gamma=2.0 "]),
        (["seed=1,2", "ppo.gamma=2,1", "wandb.entity=${oc.env:TEAM}"], ["2 of the 4 jobs"]),
        (["name=a,b", "store=${name}", "ppo.gamma=2"], ["error: ppo.gamma=2.0 "]),
        (["hardware.micro_batch.sft=32,7"], ["1 of the 2 jobs", "does not divide .*\\(job 1\\)"]),
        (["dataset=jsonl", "dataset.path=a.jsonl,b.jsonl"], ["a.jsonl does not exist .*\\(job 0\\)", "b.jsonl .*\\(job 1\\)"]),
        (["sweep=kl", "ppo.kl_coef=1,-2"], ["1 of the 2 jobs", "ppo.kl_coef=-2.0 must be 0 or more \\(job 1\\)"]),
    ],
)
def test_a_sweep_with_a_job_that_cannot_run_is_not_started(words, errors, here):
    done = process("-m", *words, TEAM="a,b")
    assert done.returncode == 1 and not any(here.iterdir())
    for error in errors:
        assert re.search(error, done.stderr), done.stderr
    assert "Traceback" not in done.stderr and "Launching" not in done.stdout


def test_a_sweep_of_ones_own_may_name_what_presets_leave_out_and_keys_of_some_of_its_stages(here):
    (here / "mine" / "sweep").mkdir(parents=True)
    params = {"dataset.sources.toy.weight": "1,2", "stage": "sft,reward", "reward.lr": "1e-3,-1"}
    for name, more in (("own", {}), ("typo", {"reward.lrr": "1,2"})):
        preset = {"hydra": {"mode": "MULTIRUN", "sweeper": {"params": params | more}}}
        (here / "mine" / "sweep" / f"{name}.yaml").write_text("# @package _global_\n" + OmegaConf.to_yaml(OmegaConf.create(preset)))
    done = process("--config-dir=mine", "sweep=own")
    assert "2 of the 8 jobs" in done.stderr and "reward.lr=-1.0 must be above 0 (jobs 3, 7)" in done.stderr, done.stderr
    assert "unknown key reward.lrr (did you mean reward.lr?)" in process("--config-dir=mine", "sweep=typo").stderr


def test_a_sweep_goes_on_after_a_job_that_failed_and_keeps_its_error(here):
    """Rows are read when a job runs."""
    for name in "ab":
        (here / f"{name}.jsonl").write_text('{"prompt": "x"}\n')
    done = process("stage=sft", "-m", "dataset=jsonl", "dataset.path=a.jsonl,b.jsonl")  # an option in the middle is one, too
    assert done.returncode == 1 and "Traceback" not in done.stderr and "Warning" not in done.stderr
    files = sorted(here.glob("runs/demo/*_sweep/*/error.txt"))
    for number, (name, file) in enumerate(zip("ab", files, strict=True)):
        error = f"{name}.jsonl:1: no response among the fields prompt"
        assert file.read_text().startswith(error) and f"job {number}: {error}" in done.stdout


@pytest.mark.parametrize(
    "precision, has_it, message",
    [("bf16", False, "bf16: V100 has no bf16.* Type hardware.precision=fp16"), ("bf16", True, ""), ("fp16", False, "")],
)
def test_bf16_on_a_gpu_without_it_is_refused(precision, has_it, message, monkeypatch):
    """This machine has none: torch's answers are given."""
    from runner.worker import check_precision

    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: has_it)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "V100")
    hardware = configured("hardware=v100", f"hardware.precision={precision}").hardware
    with pytest.raises(UserError, match=message) if message else nullcontext():
        check_precision(hardware)


def test_workers_import_the_launchers_code_whatever_lies_in_the_folder(tmp_path):
    from runner.launch import _environment

    (tmp_path / "runner").mkdir()
    (tmp_path / "runner" / "worker.py").write_text('raise SystemExit("of another clone")')
    command = [sys.executable, "-m", "runner.worker"]
    done = subprocess.run(command, cwd=tmp_path, env=_environment(configured()), capture_output=True, text=True, timeout=60)
    assert "IndexError" in done.stderr and "of another clone" not in done.stderr  # it wants to know its step


def test_a_worker_with_a_broken_config_says_why(tmp_path):
    """The workers load it as the launcher does."""
    from runner.config.loading import load

    (tmp_path / "config.yaml").write_text("name: x\nnonsense: 1\n")
    with pytest.raises(UserError, match="unknown key nonsense"):
        load(tmp_path / "config.yaml")


# --- make -------------------------------------------------------------------------------------------------------------

PIP = """#!/bin/bash
case "$*" in
  *install*) printf '%s\\n' 'Collecting a' 'Requirement b' 'Collecting c' 'Installing collected packages: a, c'; exit $PIP_ENDS;;
  *run.py*) echo "ran $*";;
esac
"""


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_shows_dots_for_packages_and_runs_only_when_all_are_there(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PIP)
    python.chmod(0o755)

    def make(ends: str) -> subprocess.CompletedProcess:
        # `make test` itself must not be heard of: it would speak of directories
        environment = {k: v for k, v in os.environ.items() if "MAKE" not in k and k != "MFLAGS"} | {"PIP_ENDS": ends}
        return subprocess.run(["make", "run", "ARGS=seed=2"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)

    failed, first, second = make("1"), make("0"), make("0")
    assert failed.returncode and "ran" not in failed.stdout
    assert first.stdout.splitlines()[1:] == [".. unpacking done", "ran run.py seed=2"]
    assert second.stdout == "ran run.py seed=2\n"


# --- the README -------------------------------------------------------------------------------------------------------


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def test_every_command_of_the_readme_makes_a_plan(tmp_path, monkeypatch):
    """With the presets that the README writes, and without the data that it only names."""
    from hydra import compose, initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    import runner.plan
    from runner.cli.overrides import check_overrides
    from runner.config.loading import load

    conf = tmp_path / "conf"
    shutil.copytree(ROOT / "conf", conf)
    for preset in code_blocks("yaml"):
        (tmp_path / re.search(r"^# (conf/.*)$", preset, re.MULTILINE)[1]).write_text(preset)
    monkeypatch.setattr(runner.plan, "data_key", lambda dataset, share: {})
    monkeypatch.setattr(runner.plan, "content_key", lambda source, toy_rows: "")
    monkeypatch.setattr(runner.plan, "checked_files", lambda *_: [])
    monkeypatch.setattr(runner.plan, "_pinned_facts", lambda cfg, stage, path: {})
    lines = [line for block in code_blocks("bash") for line in block.splitlines() if line.startswith("python run.py")]
    assert len(lines) > 25
    for line in lines:
        words = shlex.split(line, comments=True)[2:]
        # The launchers are an extra, which need not be installed
        overrides = check_overrides([w for w in words if not w.startswith(("hydra/launcher", "hydra.launcher"))], conf)
        parsed = OverridesParser.create().parse_overrides([o for o in overrides if o != "-m"])
        with initialize_config_dir(str(conf), version_base="1.3"):
            first, *_ = BasicSweeper.split_arguments(parsed, None)[0]  # of a sweep, its first job
            cfg = load(compose("config", first))
        assert runner.plan.plan(cfg), line
        assert cfg.model.name != "mine" or cfg.model.max_prompt_tokens == 512


def test_the_readme_names_every_preset_and_every_metric():
    text = (ROOT / "README.md").read_text()
    for group in ("model", "hardware", "dataset"):
        for preset in sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml")):
            assert f"`{preset}`" in text or f"={preset}`" in text, f"{group}={preset} is not in the README"
    sources = "".join(path.read_text() for path in (ROOT / "runner" / "stages").glob("*.py"))
    names = set(re.findall(r'"((?:objective|policy|loss|val|rollout|train|eval|reward|lr|grad_norm)/\w+)"', sources))
    assert len(names) > 25
    for name in names - {"eval/scores", "rollout/scores"}:  # histograms of W&B
        assert f"`{name}`" in text, f"the metric {name} is not in the README"
