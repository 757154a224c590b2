"""The command line before Hydra reads it: options wherever they stand, overrides, and presets of one's own."""

import itertools
import re
import shlex
import shutil
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from tiny import configured

from runner.cli.overrides import check_overrides
from runner.config.aliases import ALIASES, instead_of
from runner.config.loading import known_keys, load
from runner.config.schema import STAGES
from runner.errors import UserError

CONF = Path(__file__).resolve().parents[1] / "conf"


def refusal(words: str, conf: Path = CONF) -> str:
    with pytest.raises(UserError) as caught:
        check_overrides(shlex.split(words), conf)
    return str(caught.value)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, checked",
    [
        ("model=tiny -m seed=1,2 dry_run=true", "-m model=tiny seed=1,2 dry_run=true"),
        ("seed=1 --cfg job stage=sft -p sft", "--cfg=job -p=sft seed=1 stage=sft"),
        ("seed=1 --info stage=sft", "--info=all seed=1 stage=sft"),
        ("--cfg=job --resolve seed=1", "--cfg=job --resolve seed=1"),
        ("-sc install=bash", "-sc install=bash"),  # Hydra's own words, no keys
        ("query=fish --shell-completion", "--shell-completion query=fish"),
    ],
)
def test_options_go_to_the_front_with_their_words(words, checked):
    assert check_overrides(words.split(), CONF) == checked.split()


@pytest.mark.parametrize(
    "words, says",
    [
        ("--dry_run", "--dry_run: overrides have no dashes. Type dry_run=true"),
        ("--dry-run model=tiny", "Type dry_run=true"),
        ("--seed=3", "--seed: overrides have no dashes. Type seed=3"),
        ("--seed -m", "Type seed=..."),
        ("--ppo.kl_coef 0.1", "Type ppo.kl_coef=0.1"),
        ("--multi seed=1,2", "--multi is not an option (did you mean --multirun?)"),
        ("--cfg", "type --cfg job"),
        ("--cfg model=tiny", "--cfg wants job or hydra or all: type --cfg job"),
        ("--config-name", "type --config-name ..."),
        ("--resolve", "type --cfg job --resolve"),
        ("-m --cfg job", "-m and --cfg exclude each other"),
        ("-sc", 'type eval "$(python run.py -sc install=bash)"'),
    ],
)
def test_what_is_wrong_with_an_option(words, says):
    assert says in refusal(words)


# --- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["hardware", "stage", "experiment", "hydra", "checkpoint", "model.reward", "seed", "dataset.path"])
def test_what_must_have_a_value_is_not_deleted(key):
    assert f"{key} cannot be deleted: leave out ~{key}" in refusal(f"~{key}")


def test_sources_and_free_names_are_deleted():
    words = ["dataset=deepspeed_chat", "~dataset.sources.shp", "~hardware.deepspeed.x", "~hydra.callbacks.sweep_table"]
    assert check_overrides(words, CONF) == words
    assert "unknown key seeed (did you mean seed?)" in refusal("~seeed")


@pytest.mark.parametrize(
    "words, says",
    [
        ("dataset=/tmp/x/pairs.jsonl", "type dataset=jsonl dataset.path=/tmp/x/pairs.jsonl"),
        ("dataset=pairs.jsonl", "type dataset=jsonl dataset.path=pairs.jsonl"),
        ("dataset=user/name", "type dataset=hub dataset.path=user/name"),
        ("model=/models/my-opt", "type model.actor.path=/models/my-opt with the preset of its size"),
    ],
)
def test_a_path_in_place_of_a_preset_gets_the_key_that_takes_paths(words, says):
    assert says in refusal(words)


@pytest.mark.parametrize(
    "words, says",
    [
        ("learning_rate=1", "type ppo.actor_lr or ppo.critic_lr."),
        ("ppo.learning_rate=1 stage=ppo", "type ppo.actor_lr or ppo.critic_lr."),
        ("learning_rate=1 stage=sft", "type sft.lr."),
        ("dataset.eval_path=a.jsonl", "type dataset.eval_only='[FILE]'; dataset.holdout"),
        ("prompt_data=a.jsonl", "type dataset.ppo_only='[FILE]'; or, where models are given, dataset=prompts"),
        ("batch_size=1", "type ppo.rollout_batch;"),
        ("reward.batch_size=1", "type reward.global_batch; it counts all GPUs; hardware.micro_batch.reward is what one holds"),
        ("per_device_train_batch_size=1 stage=dpo", "type hardware.micro_batch.dpo."),
        ("gradient_accumulation_steps=1 stage=sft", "it follows from sft.global_batch, hardware.micro_batch.sft and"),
        ("ppo.vf_coef=1", "type ppo.critic_lr; the critic is a network of its own"),
        ("ppo.entropy_coef=1", "this PPO has no entropy bonus"),
        ("ppo.beta=1", "type ppo.kl_coef;"),
        ("ppo.kl=1", "type ppo.kl_coef;"),
        ("weight_decay=1 stage=sft", "did you mean sft.weight_decay?"),
        ("max_steps=1 stage=dpo", "did you mean sft.max_steps or dpo.max_steps?"),
        ("model.actor.lora.lr=1", "type ppo.actor_lora_lr; each stage has its own"),
        ("val_size=0.1", "type dataset.holdout."),
        ("resume_from_checkpoint=a", "the same command resumes"),
        ("beta=1", "did you mean dpo.beta?"),
        ("ppo.gae_lambda=1", "type ppo.lam."),
        ("fp16=true", "type hardware.precision=fp16."),
        ("hardware.bf16=true", "type hardware.precision=bf16."),
        ("max_length=1", "type model.max_prompt_tokens and model.max_response_tokens;"),
        ("zero_stage=3 stage=sft", "type hardware.zero.actor."),
        ("critic_zero_stage=3 stage=sft", "type hardware.zero.critic."),
        ("use_lora=true stage=sft", "type model.actor.lora.dim;"),
        ("lora.dim=8", "type model.actor.lora.dim or model.reward.lora.dim."),
        ("lora_r=8 stage=reward", "type model.reward.lora.dim."),
        ("model.actor.lora.r=8", "type model.actor.lora.dim."),
        ("model.reward.lora.rank=8", "type model.reward.lora.dim."),
        ("sft='{learning_rate: 1}'", "unknown key sft.learning_rate: type sft.lr."),
        ("~learning_rate", "type ppo.actor_lr or ppo.critic_lr"),
        ("stage=sft sft.packing=true", "unknown key sft.packing: leave it out: dialogues are packed without padding already"),
        ("stage=sft load_in_4bit=true", "type model.actor.lora.dim=16; nothing trains on quantised weights here"),
        ("deepspeed=ds.json", "type hardware.deepspeed; a mapping that"),
        ("cutoff_len=512", "type model.max_prompt_tokens and model.max_response_tokens"),
        ("report_to=none", "type wandb.mode; online, offline or disabled"),
    ],
)
def test_names_of_other_programs_are_translated(words, says):
    """Similarity alone would propose ppo.betas for ppo.beta."""
    assert says in refusal(words)


def test_an_unknown_key_comes_with_the_command_that_prints_those_of_its_stage():
    """Without the stage it would print those of PPO, which lack dpo.*."""
    assert "`python run.py stage=dpo --cfg job` prints the keys of that stage" in refusal("stage=dpo dpo.foo=1")


def test_what_the_table_of_foreign_names_says_to_type_exists():
    known = known_keys()
    for names, *_ in ALIASES:
        for name, stage in itertools.product(names.split(), STAGES):
            said = instead_of(name, stage)
            assert name not in known and said and "{" not in said
            for key in re.findall(r"\b(?:model|hardware|checkpoint|sft|reward|dpo|ppo)\.[\w.]*\w", said):
                assert key in known, said


@pytest.mark.parametrize(
    "key, stage, typed",
    [
        ("learning_rate", "sft", "type sft.lr"),
        ("learning_rate", "ppo", "type ppo.actor_lr or ppo.critic_lr"),
        ("model.reward.learning_rate", "sft", "type reward.lr"),
        ("critic_learning_rate", "ppo", "type ppo.critic_lr"),
        ("model.critic.lora.dim", "sft", "type model.reward.lora.dim"),
        ("actor.lora.dim", "reward", "type model.actor.lora.dim"),
        ("reward.learning_rate", "ppo", "type reward.lr"),
        ("ppo.batch_size", "ppo", "type ppo.rollout_batch; it counts all GPUs; hardware.micro_batch.ppo is what one holds at a time"),
        ("gradient_accumulation_steps", None, "it follows from ppo.rollout_batch / ppo.minibatches, hardware.micro_batch.ppo and"),
    ],
)
def test_the_network_and_stage_that_a_foreign_name_means(key, stage, typed):
    assert instead_of(key, stage).startswith(typed)


def test_a_foreign_name_in_a_preset_is_translated_too():
    with pytest.raises(UserError, match=r"unknown key ppo.gae_lambda: type ppo.lam"):
        load(OmegaConf.create({"stage": "ppo", "ppo": {"gae_lambda": 1}}))


def test_presets_that_begin_like_an_unknown_one_are_named():
    assert "hardware=a100 does not exist (did you mean a100_40g or a100_80g?). There are: " in refusal("hardware=a100")
    assert "did you mean llama2_13b or llama2_70b or llama2_7b?" in refusal("model=llama2")


def test_names_inside_a_mapping_are_looked_at():
    assert "unknown key dataset.split.rm; there are sft, reward, ppo" in refusal("dataset.split='{sft: 1, rm: 2}'")
    assert "unknown key dataset.split.rm; there are sft, reward, ppo" in refusal("dataset.split.rm=2")
    assert "did you mean hardware.zero.actor?" in refusal("hardware.zero='{actr: 2}'")
    assert "unknown key dataset.sources.a.pth" in refusal("dataset.sources='{a: {pth: x}}'")
    free = ["hardware.deepspeed={zero_optimization: {overlap_comm: false}}", "dataset.fields={prompt: question}"]
    assert check_overrides(free, CONF) == [f"++{word}" for word in free]


@pytest.mark.parametrize(
    "override",
    ["store=/ö", 'store="', "store=it's", 'hardware.launch={python} "x" y', "model.chat_template={% for %}", "store=a=b c", "store=/ö\\"],
)
def test_the_quotes_that_are_proposed_give_the_value_that_was_meant(override):
    message = refusal(shlex.quote(override))
    (proposed,) = shlex.split(message.partition(" need quotes: ")[2])
    assert OverridesParser.create().parse_override(proposed).value() == override.partition("=")[2]


def test_a_name_that_is_no_folder_is_not_quoted():
    assert "names a folder under runs/" in refusal("name=ü/ö")
    assert "need quotes: 'name=\"ü\"'" in refusal("name=ü")


def test_a_sweep_begins_alike_in_all_jobs():
    assert "Type resume=new, or leave it out" in refusal("-m resume=auto,force")


def test_the_one_of_two_that_counts_is_told(capsys):
    check_overrides(["sft.lr=1e-3", "model=tiny", "sft.lr=1e-4", "hardware.deepspeed={a: 1}", "hardware.deepspeed={b: 1}"], CONF)
    assert capsys.readouterr().err == "note: sft.lr is given 2 times; the last one counts: sft.lr=1e-4\n"


# --- presets of one's own ---------------------------------------------------------------------------------------------

OVERRIDES = "# @package _global_\ndefaults: [{%s}]\n"
WRONG = {
    "sweep/own": (
        "# @package _global_\nhydra: {sweeper: {}}",
        "conf/sweep/own.yaml lacks hydra.mode: write mode: ",
    ),
    "experiment/own": ("# mine\n# @package _global_\nseed: 1\n", "conf/experiment/own.yaml: its first line must be # @package _global_"),
    "experiment/body": ("# @package _global_\nmodel: tiny_llama\n", "Write under defaults: - override /model: tiny_llama"),
    "experiment/added": (OVERRIDES % "model: tiny_llama", "- model: tiny_llama in its defaults must be - override /model: tiny_llama"),
    "experiment/slash": (OVERRIDES % "override model: tiny", "- override model: tiny in its defaults must be - override /model: tiny"),
    "experiment/other": (OVERRIDES % "override /hardware: own", "conf/hardware/own.yaml inherits nothing"),
    "hardware/own": ("name: own\n", "conf/hardware/own.yaml inherits nothing: begin it with defaults: [base/gpu, _self_]"),
    "dataset/own": ("defaults: [_self_]\nname: own\n", "begin it with defaults: [base/common, _self_]"),
    "model/own": ("name: own\n", "begin it with defaults: [opt1.3b, _self_]"),
}


@pytest.fixture(scope="module")
def conf(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("house") / "conf"
    shutil.copytree(CONF, folder)
    for name, (text, _) in WRONG.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.mark.parametrize("name", WRONG)
def test_a_preset_that_hydra_would_read_otherwise_is_named(name, conf):
    assert WRONG[name][1] in refusal(name.replace("/", "="), conf)


def test_our_presets_pass():
    for group in ("model", "dataset", "hardware", "experiment", "sweep"):
        for path in (CONF / group).glob("*.yaml"):
            assert check_overrides([f"{group}={path.stem}"], CONF)


def test_a_source_needs_a_path_and_nothing_else():
    from tiny import configured

    source = configured("++dataset.sources.a={path: x.jsonl, weight: 0.5}").dataset.sources["a"]
    assert (source.adapter, source.split, source.weight, source.only) == ("fields", "train", 0.5, None)
    with pytest.raises(UserError, match=r"sources.a has no path. The sources are toy. One of your own: dataset.sources.a='{path: /data/"):
        configured("++dataset.sources={a: {weight: 1}, b: {weight: 1}}")


def test_keys_that_a_source_leaves_out_are_added_and_its_path_is_not():
    """With a path before them Hydra finds a misspelt source; in the order typed the first word would have made it."""
    words = [
        "dataset.sources.toy.weight=2",
        "dataset.sources.toy.fields.prompt=q",
        "dataset.sources.toy.path=x",
        "dataset.sources.a={path: b}",
    ]
    weight, prompt, path, own = words
    assert check_overrides(words, CONF) == [path, f"++{weight}", f"++{prompt}", f"++{own}"]
    again = ["dataset.sources.toy.weight=2", "dataset.sources.toy={path: x, weight: 3}", "~dataset.sources.toy"]  # the last one counts
    assert check_overrides(again, CONF) == [f"++{again[0]}", f"++{again[1]}", again[2]]


@pytest.mark.parametrize(
    "words, passed_on",
    [
        (["experiment=null"], ["experiment=[]"]),
        (["-m", "experiment=null,debug"], ["-m", "experiment=[],debug"]),
        (["-m", "experiment=debug,null", "sweep=null"], ["-m", "experiment=debug,[]", "sweep=[]"]),
    ],
)
def test_no_experiment_can_be_chosen_among_others(words, passed_on):
    """Hydra takes no null over the null of the defaults list, but an empty list."""
    assert check_overrides(words, CONF) == passed_on


def test_a_key_may_be_of_some_stages_of_a_sweep(tmp_path):
    """Of the others' jobs it is no key: Hydra would refuse it there, and `load` leaves it out."""
    words = ["-m", "stage=sft,dpo", "sft.max_steps=2", "dpo.beta=0.1,0.2"]
    assert check_overrides(words, CONF) == [*words[:3], "++dpo.beta=0.1,0.2"]
    assert check_overrides(["-m", "stage=choice(reward,ppo)", "ppo.lam=1"], CONF)[-1] == "++ppo.lam=1"
    with pytest.raises(UserError, match=r"dpo.beta: stage=sft,reward does not use the dpo block"):
        check_overrides(["-m", "stage=sft,reward", "dpo.beta=0.1"], CONF)
    assert configured("stage=sft", "++dpo.beta=0.1").dpo is None


def test_one_sweep_at_a_time():
    with pytest.raises(UserError, match="sweep=kl,seeds: one sweep at a time"):
        check_overrides(["sweep=kl,seeds"], CONF)


def test_presets_may_lie_in_a_folder_of_ones_own(tmp_path):
    """Hydra's --config-dir: known names, the stage that an experiment chooses, and the same checks as in conf/."""
    for group, text in (("dataset", "path: x\n"), ("experiment", "# @package _global_\ndefaults: [{override /stage: sft}]\n")):
        (tmp_path / group).mkdir()
        (tmp_path / group / "mine.yaml").write_text(text)
    beside = f"--config-dir={tmp_path}"
    (tmp_path / "optim").mkdir()  # no group of ours
    assert check_overrides([beside, "experiment=mine", "sft.lr=1e-3"], CONF) == [beside, "experiment=mine", "sft.lr=1e-3"]
    for words, message in [
        ([beside, "experiment=mine", "ppo.gamma=1"], "stage=sft does not use the ppo block"),
        ([beside, "experiment=mime"], "experiment=mime does not exist.*mine"),
        (["-cd", str(tmp_path), "dataset=mine"], r"/dataset/mine.yaml inherits nothing: begin it with defaults: \[base/common"),
        (["experiment=mine"], "experiment=mine does not exist"),
        ([beside, "optim=x"], "unknown key optim"),
        (["--config-dir", "nowhere", "experiment=mine"], "--config-dir=nowhere: this folder does not exist"),
    ]:
        with pytest.raises(UserError, match=message):
            check_overrides(words, CONF)


def test_the_first_stage_of_a_choice_counts():
    words = ["-m", "stage=choice(sft,ppo)", "sft.lr=1e-3"]
    assert check_overrides(words, CONF) == words
