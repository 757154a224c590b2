"""Every preset in conf/ composes, fits the schema, divides its batches, says what it is, and is as large as its name says.

Composing the whole tree takes a fifth of a second, so presets are composed alone (`dataset/toy`), and the many models and machines by hand.
"""

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from runner.config.loading import load
from runner.config.schema import Dataset, Hardware, Model
from runner.errors import UserError

CONF = Path(__file__).parent.parent / "conf"
SCHEMA = {"model": Model, "dataset": Dataset, "hardware": Hardware}


def presets(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@cache
def composed(*overrides: str, name: str = "config", hydra: bool = False) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(overrides), return_hydra_config=hydra)


@cache
def stacked(path: Path) -> DictConfig:
    """A file of conf/model or conf/hardware over those in its defaults list: what Hydra does, twenty times as fast."""
    node = OmegaConf.load(path)
    defaults = [name for name in node.pop("defaults", []) if name != "_self_"]
    return OmegaConf.merge(*(stacked(path.parent / f"{name}.yaml") for name in defaults), node)


@cache
def block(group: str, preset: str) -> DictConfig:
    """The block that a preset of model, dataset or hardware makes."""
    if group != "dataset":
        return stacked(CONF / group / f"{preset}.yaml")
    node = composed(name=f"{group}/{preset}")
    if OmegaConf.is_missing(node[group], "path"):
        node[group].path = "given.jsonl"
    return node[group]


def check_batches(model: str, hardware: DictConfig, batches: dict[str, int]) -> None:
    """global batch = micro batch x ranks x accumulation, exactly."""
    world = hardware.nodes * hardware.gpus
    for stage, batch in batches.items():
        micro = min(hardware.micro_batch[stage], max(batch // world, 1))
        algebra = f"{batch} = {micro} x {world} ranks x accumulation"
        assert batch % (micro * world) == 0, f"model={model} hardware={hardware.name}: {stage} {algebra} has no whole solution"


# --- every preset loads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["model", "dataset", "hardware"])
def test_presets_load(group):
    for preset in presets(group):
        # Through the parent, for `${dataset.path}` counts from the root
        values = OmegaConf.to_container(OmegaConf.create({group: block(group, preset)}), resolve=True, throw_on_missing=True)[group]
        assert OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SCHEMA[group]), values)).name == preset


def test_stacked_is_what_hydra_composes():
    for group, preset in (("model", "tiny_neox"), ("model", "llama3_8b"), ("hardware", "gpu64")):
        assert composed(name=f"{group}/{preset}")[group] == block(group, preset)


@pytest.mark.parametrize("stage", presets("stage"))
def test_stage_loads(stage):
    assert load(composed(f"stage={stage}")).stage == stage


def test_dpo_has_the_rates_of_its_model():
    cfg = load(composed("stage=dpo", "model=opt13b", "hardware=dgx8"))
    assert (cfg.dpo.lr, cfg.dpo.global_batch, cfg.dpo.beta, cfg.reward, cfg.ppo) == (5e-7, 64, 0.1, None, None)
    assert load(composed("stage=dpo", "experiment=debug")).dpo.max_steps == 2


def test_groups_compose_together():
    cfg = load(composed("model=opt13b", "dataset=rm_static", "hardware=dgx8", "stage=reward"))
    assert (cfg.model.name, cfg.dataset.name, cfg.hardware.name) == ("opt13b", "rm_static", "dgx8")
    assert cfg.sft is None and cfg.reward.lr == cfg.model.recipe.reward_lr


@pytest.mark.parametrize("experiment", presets("experiment"))
def test_experiment_loads(experiment):
    config = composed(f"experiment={experiment}")
    cfg = load(config)
    assert cfg.name == experiment
    batches = {stage: getattr(cfg, stage).global_batch for stage in ("sft", "reward", "dpo") if getattr(cfg, stage)}
    if cfg.ppo:
        batches["ppo"] = cfg.ppo.rollout_batch // cfg.ppo.minibatches
    check_batches(cfg.model.name, config.hardware, batches)


@pytest.mark.parametrize("sweep", presets("sweep"))
def test_sweep_loads(sweep):
    config = composed(f"sweep={sweep}", hydra=True).copy()
    assert config.hydra.mode.name == "MULTIRUN"
    overrides = [f"{key}={values}" for key, values in config.hydra.sweeper.params.items()]
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    for override in OverridesParser.create().parse_overrides(overrides):
        assert override.is_discrete_sweep(), f"{override.input_line} is a single value"
        assert OmegaConf.select(config, override.key_or_group, default="absent") != "absent", f"no key {override.key_or_group}"
        last = list(override.sweep_iterator())[-1]
        OmegaConf.update(config, override.key_or_group, last, merge=True)
    load(config)


def test_sweeps_over_hardware_have_a_store_per_job():
    # Hardware is in no step's key: in one store the second job would find the first one's work and do nothing
    for sweep in presets("sweep"):
        text = (CONF / "sweep" / f"{sweep}.yaml").read_text()
        for key in re.findall(r"^ {6}(hardware\.[\w.]+):", text, re.MULTILINE):
            assert f"${{{key}" in text, f"sweep={sweep}: store must hold ${{{key}...}}"


def test_wrong_key_is_refused():
    config = composed().copy()
    OmegaConf.update(config, "hardware.zero.critc", 3, force_add=True)
    with pytest.raises(UserError, match="critc"):
        load(config)


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hardware", presets("hardware"))
def test_batches_divide(hardware):
    machine = block("hardware", hardware)
    world = machine.nodes * machine.gpus
    for model in presets("model"):
        # A minibatch of a tiny model is 16 responses: too few for more GPUs than one machine has
        if world > 8 and model.startswith("tiny"):
            continue
        recipe = block("model", model).recipe
        minibatch = recipe.rollout_batch // composed().ppo.minibatches
        batches = {"sft": recipe.sft_batch, "reward": recipe.reward_batch, "dpo": recipe.dpo_batch, "ppo": minibatch}
        check_batches(model, machine, batches)


@pytest.mark.parametrize("hardware", presets("hardware"))
def test_launch_command_is_a_command(hardware):
    machine = block("hardware", hardware)
    values = {key: machine[key] for key in ("gpus", "nodes", "hostfile")} | {"world": machine.nodes * machine.gpus}
    command = machine.launch.format(**values, python="python", folder="/tmp/step")
    assert command.endswith("runner.worker /tmp/step")
    assert str(machine.gpus) in command or values["world"] == 1
    subprocess.run(["bash", "-n", "-c", command], check=True)


# --- models -----------------------------------------------------------------------------------------------------------

# Names that round more than 5 %
TRUE_SIZE = {"opt350m": 331e6, "llama30b": 32.5e9}


def advertised(preset: str) -> float:
    """Parameters by the name: bloom1b7 -> 1.7e9, pythia2.8b -> 2.8e9, opt125m -> 125e6."""
    number, unit, tenth = re.findall(r"([\d.]+)([bm])(\d?)$", preset)[0]
    return TRUE_SIZE.get(preset) or float(number + (f".{tenth}" if tenth else "")) * {"b": 1e9, "m": 1e6}[unit]


def parameters(preset: str) -> int:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = block("model", preset)
    shape = OmegaConf.to_container(model.actor.shape, resolve=True)
    config = AutoConfig.for_model(model.family, **shape)
    wrong = [key for key in shape if key != "rotary_pct" and getattr(config, key) != shape[key]]
    assert not wrong, f"{preset}: {model.family} reads {wrong} otherwise"
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def test_models_are_as_large_as_their_names_say():
    for preset in presets("model"):
        count = parameters(preset)
        if preset.startswith("tiny"):
            assert count < 1e6, f"{preset} has {count} parameters"
        else:
            assert count == pytest.approx(advertised(preset), rel=0.05), preset


def test_reward_model_is_one_per_tokenizer():
    """Presets with the same reward model agree in all that its cache key hashes, so that it is trained once for them."""
    first = {}
    for preset in presets("model"):
        model = OmegaConf.to_container(block("model", preset), resolve=True)
        lengths = (model["max_prompt_tokens"], model["max_response_tokens"])
        text = (model["family"], model["chat_template"], model["end_token"], lengths, model["tokenizer_vocab"])
        facts = (model["reward"], model["recipe"]["reward_lr"], model["recipe"]["reward_batch"], text)
        assert facts == first.setdefault(model["reward"]["path"] or preset, facts), preset
    # The sizes in the family's file are those of the preset of that name
    shapes = {block("model", p).actor.path or p: block("model", p).actor.shape for p in presets("model")}
    for preset in presets("model"):
        reward = block("model", preset).reward
        assert reward.shape == shapes[reward.path or preset], preset


def test_critic_learns_faster_than_the_actor():
    for preset in presets("model"):
        recipe = block("model", preset).recipe
        assert preset.startswith("tiny") or 5 <= round(recipe.critic_lr / recipe.actor_lr, 3) <= 10, preset


# --- comments ---------------------------------------------------------------------------------------------------------


def uncommented(path: Path) -> list[str]:
    """Keys at depth 1 and 2 with no comment above them, above their block, or, for a block, above its first key."""
    lines = path.read_text().splitlines()
    bare, covered = [], False
    for above, line, below in zip(["", *lines], lines, [*lines[1:], ""], strict=False):
        match = re.match(r"( {0,2})(\w+):(.*)", line)
        if not match:
            continue
        indent, key, value = match.groups()
        commented = above.lstrip().startswith("#")
        opens_block = not value.strip() and below.startswith(indent + " ")
        if not indent:
            covered = commented or key in ("defaults", "hydra")
        elif covered:
            continue
        if not (commented or opens_block or key in ("defaults", "stage")):
            bare.append(key)
    return bare


def test_every_file_says_what_it_is():
    for path in CONF.rglob("*.yaml"):
        head = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
        assert head[0].startswith("# "), f"{path.relative_to(CONF)}: the first line is no comment"


def test_every_key_has_a_comment():
    bases = ["hardware/base/gpu.yaml", "model/family/base.yaml", "dataset/base/common.yaml", "config.yaml"]
    for path in [*(CONF / base for base in bases), *(CONF / "stage").glob("*.yaml")]:
        assert not uncommented(path), path.relative_to(CONF)
