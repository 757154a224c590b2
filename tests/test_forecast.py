"""The forecast: sizes of networks, memory and time against what was counted and measured, and what it says where a stage does not fit."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from tiny import CONF, NAMES, PAD, SHAPES, VOCAB, configured, family, no_dropout, rows
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from runner import flops
from runner.config.schema import STAGES, frozen_models
from runner.data.batches import pad
from runner.errors import UserError
from runner.forecast import fit
from runner.forecast.duration import LINKS, step_seconds, why_no_time
from runner.forecast.fit import cure, fits, refuse_the_impossible, warnings
from runner.forecast.memory import host_bytes, peaks, samples_whole
from runner.forecast.show import forecast, price, rows_of, show_forecast, steps_of_stage
from runner.forecast.sizes import model_sizes, sizes_of
from runner.models.lora import add_lora
from runner.models.wrappers import Actor
from runner.plan import plan

H100, H200 = "hardware=h100", "hardware=h200"
MODELS = ["opt1.3b", "opt13b", "bloom1b7", "llama2_7b", "llama2_70b", "pythia1.4b", "neox20b"]


def on(*words: str):
    return configured("wandb.mode=disabled", *words)


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_those_of_the_real_network(name):
    """All matrices exactly; vectors and positions, a thousandth of the weights and less, are left out."""
    cfg = on(f"model={name}")
    for net, part, auto in zip(
        model_sizes(cfg), (cfg.model.actor, cfg.model.reward), (AutoModelForCausalLM, AutoModelForSequenceClassification), strict=True
    ):
        with torch.device("meta"):
            made = auto.from_config(AutoConfig.for_model(cfg.model.family, num_labels=1, **part.shape))
        real, found = flops.matrix_sizes(made), net.matrix_sizes(part.lora)
        assert (found.body, found.head, found.attention, found.cache) == (real.body, real.head, real.attention, real.cache)
        assert net.weights == pytest.approx(sum(p.numel() for p in made.parameters()), rel=0.01)


@pytest.mark.parametrize(
    "words", [("opt1.3b",), ("bloom1b7",), ("llama2_7b",), ("pythia1.4b",), ("llama2_7b", "model.actor.lora.targets=[q_proj]")]
)
def test_adapters_are_counted_as_peft_makes_them(words):
    cfg = on(f"model={words[0]}", "model.actor.lora.dim=8", *words[1:])
    with torch.device("meta"):
        made = add_lora(
            AutoModelForCausalLM.from_config(AutoConfig.for_model(cfg.model.family, **cfg.model.actor.shape)), cfg.model.actor.lora
        )
    real = sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert model_sizes(cfg)[0].trained(cfg.model.actor.lora) == real


def folder(path: Path, **changes) -> Path:
    settings = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 100} | changes
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "opt"} | settings))
    return path


def test_a_folder_says_itself_what_is_in_it(tmp_path):
    found = folder(tmp_path / "small")
    for words in ((f"model.actor.path={found}",), (f"sft.use={found}",)):
        net, _ = model_sizes(on("model=opt66b", *words))
        assert (net.hidden, net.layers) == (64, 3)
    assert model_sizes(on("model=opt66b", f"model.actor.path={folder(tmp_path / 'odd', hidden_size='big')}")) is None
    assert sizes_of("bloom", {"n_embed": 64, "n_layer": 2, "n_head": 4, "vocab_size": 9}, scalar=False).inner == 256


def test_of_a_hub_model_the_preset_that_names_it_knows():
    """Not the preset into which its name was typed."""
    for words in (("model.actor.path=facebook/opt-125m",), ("sft.use=facebook/opt-125m",)):
        assert model_sizes(on("model=opt66b", *words))[0] == model_sizes(on("model=opt125m"))[0]
    for words in (("model.actor.path=me/mine",), ("reward.use=me/mine",)):
        assert model_sizes(on("model=opt66b", *words)) is None
        refuse_the_impossible(on("model=opt66b", "hardware=a6000", *words), ["sft"])


@pytest.mark.parametrize("path", sorted((CONF / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_is_foreseen(path):
    cfg = on(f"model={path.stem}", H200)
    assert model_sizes(cfg)[0] == sizes_of(cfg.model.family, cfg.model.actor.shape, scalar=False)


@pytest.mark.parametrize("name", NAMES)
def test_layers_keep_as_many_values_as_the_table_of_families_says(name):
    """Counted in a forward pass in bf16: all tensors that wait for the backward pass, of four layers less those of two."""

    def settings(layers: int):
        number = {"n_layer" if name == "bloom" else "num_hidden_layers": layers}
        return AutoConfig.for_model(family(name), vocab_size=VOCAB, **SHAPES[name] | number, **no_dropout(name))

    def kept(layers: int) -> float:
        made = AutoModelForCausalLM.from_config(settings(layers), dtype=torch.bfloat16, attn_implementation="packed")
        model, found = Actor(made.train(), family(name), chunk=0), {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def note(x):
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage.nbytes() / 2, x  # with x, so that no other takes its address
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            model.hidden_states(*pad(rows([32, 32, 32, 32]), PAD))
        return sum(values for values, _ in found.values()) / 128

    net = sizes_of(family(name), settings(2).to_dict(), scalar=False)
    assert (kept(4) - kept(2)) / 2 == pytest.approx(net.kept, rel=0.1)


# --- against what was measured (benchmarks/RESULTS.md) ----------------------------------------------------------------

SIXTY_FOUR = ("ppo.rollout_batch=64", "ppo.minibatches=1", "hardware.micro_batch.ppo=32")
OFFLOADED = ("hardware.zero.actor=2", "hardware.zero.critic=2", "hardware.offload.optimizer=true")
PEAKS = [
    ("sft", 26.4, (H200, "model=opt1.3b")),
    ("ppo", 40.1, (H200, "model=opt1.3b")),
    ("ppo", 34.4, (H100, "model=opt1.3b", "hardware.micro_batch.ppo=8")),
    ("ppo", 64, (H100, "model=opt13b", "model.actor.lora.dim=64", *SIXTY_FOUR)),
    ("ppo", 47, (H100, "model=opt6.7b", *OFFLOADED, *SIXTY_FOUR)),
]


@pytest.mark.parametrize(("stage", "measured", "words"), PEAKS)
def test_memory_is_within_a_tenth_of_what_was_measured(stage, measured, words):
    assert max(peaks(on(*words), stage).values()) / 1e9 == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("prompts", "measured"), [(64, 1.78), (128, 3.16)])
def test_time_is_within_a_tenth_of_what_was_measured(prompts, measured):
    words = ("hardware.gradient_checkpointing.actor=false", "ppo.minibatches=1", f"ppo.rollout_batch={prompts}")
    cfg = on(H200, "model=opt1.3b", *words)
    assert step_seconds(cfg, "ppo", 256, 256) == pytest.approx(measured, rel=0.1)


def test_time_of_sft_is_within_a_sixth_of_what_was_measured():
    """32,768 tokens in dialogues of 537: 0.508 s."""
    cfg = on(H200, "model=opt1.3b", "hardware.gradient_checkpointing.actor=false", "sft.global_batch=61", "hardware.micro_batch.sft=61")
    assert step_seconds(cfg, "sft", 179, 358) == pytest.approx(0.508, rel=0.16)


# --- what belongs together ----------------------------------------------------------------------------------------------


def test_more_gpus_and_zero_take_less_memory_and_time():
    one, eight = on("model=opt13b", "hardware=a100_80g"), on("model=opt13b", "hardware=dgx8")
    for stage in ("sft", "ppo"):
        assert peaks(eight, stage)["states"] < peaks(one, stage)["states"] / 3
        alone = step_seconds(one, stage, 256, 256)
        assert alone / 8 < step_seconds(eight, stage, 256, 256) < alone / 5


UNKNOWN = [
    ("hardware.tflops=0",),
    ("hardware.precision=fp32",),
    ("hardware.offload.params=true", "hardware.zero.actor=3"),
    ("hardware.link_gb_s=0", "hardware.gpus=2"),
]


@pytest.mark.parametrize("words", UNKNOWN)
def test_a_time_that_nobody_knows_is_not_told_but_why(words, capsys):
    cfg = on("model=opt1.3b", H200, *words)
    assert step_seconds(cfg, "sft", 10, 10) is None
    show_forecast(cfg, plan(cfg), {})
    assert f"No time estimate with {words[0]}: " in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((CONF / "hardware").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_of_a_gpu_says_enough_for_a_time(path):
    for gpus in (1, 2):
        cfg = on("model=opt1.3b", f"hardware={path.stem}", f"hardware.gpus={gpus}")
        assert cfg.hardware.accelerator == "cpu" or why_no_time(cfg) is None


@pytest.mark.parametrize(
    ("zero", "recomputed", "times"),
    [
        (0, True, 2),  # gradients are reduced, and spread
        (1, True, 2),  # gradients are reduced, moved weights spread
        (2, True, 16 + 1),  # the first for each of 16 micro batches
        (3, False, 16 * (2 + 1)),  # weights for forward and backward, and gradients
        (3, True, 16 * (3 + 1)),
    ],
)
def test_what_gpus_send_each_other_is_counted(zero, recomputed, times):
    """128 rows of the greatest length in micro batches of 2 x 4: each GPU holds one half and gets the other."""
    words = ("model=opt1.3b", "hardware=a6000", "hardware.gpus=2", f"hardware.zero.actor={zero}")
    words += (f"hardware.gradient_checkpointing.actor={str(recomputed).lower()}",)
    slow, fast = (step_seconds(on(*words, f"hardware.link_gb_s={rate}"), "sft", 256, 256) for rate in (10, 20))
    sent = times * 2 * model_sizes(on(*words))[0].weights / 2
    assert slow - fast == pytest.approx(sent / LINKS / 20e9)


def test_weights_that_are_not_whole_are_gathered_for_every_token():
    """DeepSpeed-Chat's 66B: 132 GB through links of 200 GB/s, 256 times."""
    apart, whole = on("experiment=opt_multi_node_66b"), on("experiment=opt_multi_node_66b", "hardware.memory_gb=400")
    assert (samples_whole(apart), samples_whole(whole)) == (False, True)
    gathering = 256 * 2 * model_sizes(apart)[0].weights * 63 / 64 / LINKS / 200e9
    assert gathering < step_seconds(apart, "ppo", 256, 256) < 1.5 * gathering
    assert step_seconds(apart, "ppo", 256, 256) > 5 * step_seconds(whole, "ppo", 256, 256)
    # They count with the whole ones
    more = peaks(whole, "ppo")["rollout"] - peaks(apart, "ppo")["rollout"]
    assert more == 2 * model_sizes(apart)[0].weights


def test_weights_that_are_not_whole_are_sampled_from_by_generate():
    words = ("model=opt13b", H100, "hardware.zero.actor=3")
    assert not samples_whole(on(*words))
    assert step_seconds(on(*words), "ppo", 9, 9) == step_seconds(on(*words, "rollout.engine=hf"), "ppo", 9, 9)
    assert step_seconds(on(*words), "ppo", 9, 9) > step_seconds(on(*words, "hardware.memory_gb=400"), "ppo", 9, 9)


def test_a_rollout_that_the_trainer_reads_all_of_takes_longer():
    all_read = on("model=opt1.3b", H200, "rollout.max_mismatch=0")
    assert step_seconds(all_read, "ppo", 256, 256) > 1.02 * step_seconds(on("model=opt1.3b", H200), "ppo", 256, 256)


def test_averages_mixtures_and_offloading_are_counted():
    plain, average = on("model=opt1.3b", H200), on("model=opt1.3b", H200, "ppo.ema_decay=0.99")
    weights = model_sizes(plain)[0].weights
    assert peaks(average, "ppo")["rollout"] - peaks(plain, "ppo")["rollout"] == 4 * weights
    offloaded = on("model=opt1.3b", H200, *OFFLOADED)
    assert host_bytes(plain, "sft") == 0 and host_bytes(offloaded, "sft") == 16 * weights
    assert peaks(plain, "sft")["states"] == 16 * weights and peaks(offloaded, "sft")["states"] == 2 * weights
    mixed = on("model=opt1.3b", H200, *OFFLOADED, "ppo.ptx_coef=1")
    assert step_seconds(offloaded, "ppo", 99, 99) < step_seconds(mixed, "ppo", 99, 99) < 1.6 * step_seconds(offloaded, "ppo", 99, 99)
    assert step_seconds(on("model=opt1.3b", H200, "rollout.engine=hf"), "ppo", 99, 99) > 1.3 * step_seconds(plain, "ppo", 99, 99)


def test_a_stage_only_reads_the_reference_and_the_reward_model():
    alone = on("model=opt1.3b", H200, "model.actor.lora.dim=8")
    found = [[frozen_models(cfg, stage) for stage in STAGES] for cfg in (on("model=opt1.3b", H200), alone)]
    assert found == [[(), (), ("ref",), ("ref", "reward")], [(), (), (), ("reward",)]]


def test_dpo_is_sft_of_pairs_with_a_frozen_model_beside_it():
    cfg, size = on("model=opt1.3b", H200, "stage=dpo", "dpo.global_batch=64", "sft.global_batch=128"), 2
    weights = model_sizes(cfg)[0].weights
    assert peaks(cfg, "dpo")["states"] - peaks(cfg, "sft")["states"] == size * weights
    # Half as many pairs as dialogues are as many sequences, read once more: a quarter of forward, forward again and backward
    assert step_seconds(cfg, "dpo", 200, 200) == pytest.approx(1.25 * step_seconds(cfg, "sft", 200, 200), rel=0.01)
    shared = on("model=opt1.3b", H200, "stage=dpo", "model.actor.lora.dim=8")
    assert peaks(shared, "dpo")["states"] == peaks(shared, "sft")["states"]
    moved = on("model=opt1.3b", H200, "stage=dpo", "hardware.zero.ref=3", "hardware.offload.ref=true")
    assert host_bytes(moved, "dpo") == size * weights and peaks(moved, "dpo")["states"] == peaks(moved, "sft")["states"]


@pytest.mark.parametrize("model", ["llama2_7b", "opt30b"])
def test_what_it_says_to_type_makes_dpo_fit(model):
    words = [f"model={model}", "hardware=a100_80g", "stage=dpo"]
    said = warnings(on(*words), ["sft", "dpo"])[-1]
    typed = shlex.split(said.partition(" (")[0].partition(". ")[0].removeprefix("Type "))
    assert all(fits(on(*words, *typed), stage) for stage in ("sft", "dpo"))


# --- what it says -----------------------------------------------------------------------------------------------------


def test_the_impossible_is_refused_with_what_to_type():
    with pytest.raises(UserError, match=r"sft of model=opt66b does not fit hardware=a6000: .* take 1,\d+ GB of each GPU, which has 48 GB"):
        refuse_the_impossible(on("model=opt66b", "hardware=a6000"), ["sft", "ppo"])
    refuse_the_impossible(on("model=opt1.3b", "hardware=a6000"), ["sft", "reward", "ppo"])


def test_what_this_machine_cannot_hold_is_refused_on_cpus(monkeypatch):
    """In fp32: 4 bytes each for weight and gradient, 8 for Adam's moments, of 125 million parameters; twice for two processes."""
    monkeypatch.setattr(fit, "memory_limit", lambda: 3e9)
    refuse_the_impossible(on("model=opt125m", "hardware=cpu"), ["sft"])
    with pytest.raises(
        UserError, match=r"sft of model=opt125m does not fit this machine: .* take 4 GB, and it allows 3 GB\. Take a smaller"
    ):
        refuse_the_impossible(on("model=opt125m", "hardware=cpu2"), ["sft"])
    refuse_the_impossible(on("model=opt125m", "hardware=cpu2", "model.actor.lora.dim=8"), ["sft"])
    monkeypatch.setattr(fit, "memory_limit", lambda: 1e8)
    with pytest.raises(UserError, match=r"or adapters \(model.reward.lora.dim=16\)$"):
        refuse_the_impossible(on("model=opt125m", "hardware=cpu"), ["reward"])
    with pytest.raises(UserError, match=r"Take a smaller model$"):
        refuse_the_impossible(on("model=opt125m", "hardware=cpu", "model.actor.lora.dim=8"), ["sft"])
    refuse_the_impossible(on("model=opt125m", "hardware=cpu", "hardware.nodes=2", "hardware.launch='srun {folder}'"), ["sft"])


@pytest.mark.parametrize("hardware", ["v100", "a6000", "a100_40g", "h100", "dgx8_40g", "dgx8"])
@pytest.mark.parametrize("model", ["opt1.3b", "opt6.7b", "llama2_7b", "opt30b", "bloom7b1", "neox20b"])
def test_what_it_says_to_type_makes_all_stages_fit(model, hardware):
    cfg, stages = on(f"model={model}", f"hardware={hardware}"), ["sft", "reward", "ppo"]
    said = warnings(cfg, stages)
    tight = [stage for stage in stages if not fits(cfg, stage)]
    assert len(said) == (len(tight) + 1 if tight else 0)
    if not tight or said[-1].startswith("Take"):
        return
    words = shlex.split(said[-1].partition(" (")[0].partition(". ")[0].removeprefix("Type "))
    assert len({word.partition("=")[0] for word in words}) == len(words)
    changed = on(f"model={model}", f"hardware={hardware}", *words)
    assert all(fits(changed, stage) for stage in stages)


def test_it_says_why_rollouts_are_slow_and_what_makes_them_fast():
    """Under ZeRO-3, where the whole weights of the actor do not fit beside the rest; not where PPO does not fit at all."""
    slow = on("model=llama2_13b", "hardware=dgx8")
    said = fit.slow_rollouts(slow)
    assert said.startswith("note: ppo samples slowly: no GPU has room for all 26 GB of the actor's weights")
    words = said.partition(" With ")[2].partition(" each ")[0].split()
    fast = on("model=llama2_13b", "hardware=dgx8", *words)
    assert samples_whole(fast) and fits(fast, "ppo") and fit.slow_rollouts(fast) is None
    assert step_seconds(fast, "ppo", 256, 256) < 0.75 * step_seconds(slow, "ppo", 256, 256)
    many = on("model=opt66b", "hardware=gpu64")
    said = fit.slow_rollouts(many)
    word = said.partition(" With ")[2].partition(" more ")[0]
    more = on("model=opt66b", "hardware=gpu64", word)
    assert word.startswith("hardware.micro_batch.rollout=") and fits(more, "ppo")
    assert step_seconds(more, "ppo", 256, 256) < 0.7 * step_seconds(many, "ppo", 256, 256)
    assert fit.slow_rollouts(more).endswith("gathers them anew")
    assert fit.slow_rollouts(on("model=opt66b", "hardware=dgx8")) is None
    assert fit.slow_rollouts(on("model=opt1.3b", "hardware=h100")) is None


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_published_recipe_fits_its_hardware(path):
    cfg = on(f"experiment={path.stem}")
    stages = [stage for stage in ("sft", "reward", "ppo") if getattr(cfg, stage)]
    assert not fit.foreseeable(cfg) or warnings(cfg, stages) == []


def test_the_cheapest_cure_comes_first_and_nothing_is_said_in_vain():
    batch = on("model=opt1.3b", H100, "hardware.micro_batch.sft=128", "hardware.gradient_checkpointing.actor=false")
    assert cure(batch, ["sft"]) == "Type hardware.micro_batch.sft=64"
    stages, memory = "hardware.zero.actor=2 hardware.zero.critic=2", "That takes about 108 GB of CPU memory per machine"
    assert cure(on("model=llama2_7b", "hardware=a6000"), ["sft"]) == f"Type {stages} hardware.offload.optimizer=true. {memory}"
    # Who has adapters already takes them before offloading
    lora = on("model=llama2_7b", "hardware=a6000", "model.actor.lora.dim=16")
    assert "model.reward.lora.dim=16" in cure(lora, ["sft", "reward", "ppo"]) and "offload.optimizer" not in cure(lora, ["reward"])
    # Nothing does alone: adapters and their weights in CPU memory, and no word of micro batches, which would not matter
    words = "model.actor.lora.dim=16 hardware.zero.actor=3 hardware.offload.params=true"
    assert cure(on("model=opt66b", "hardware=a6000"), ["sft"]).startswith(f"Type {words} (adapters train in place of all weights). ")


def test_it_gives_up_where_nothing_helps(monkeypatch):
    monkeypatch.setattr(fit, "fits", lambda cfg, stage: False)
    assert cure(on("model=opt1.3b", H100), ["sft"]) == "Take a smaller model, or more or larger GPUs"


def test_the_table_before_there_are_data(capsys):
    cfg = on("model=opt1.3b", H200)
    show_forecast(cfg, plan(cfg), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["forecast", "memory", "a", "step", "1,000", "steps", "price"]
    assert [line.split()[0] for line in lines[2:5]] == ["sft", "reward", "ppo"]
    assert "26 of 141 GB" in lines[2] and "$" in lines[2]
    assert lines[5].startswith("For sequences of maximum length.")


def test_the_table_once_the_data_are_tokenised(capsys, monkeypatch):
    """1,000 rows of 100 tokens, 40 of them prompt: 8 steps of 128."""
    monkeypatch.setattr("runner.data.cache.mean_lengths", lambda folder: (1000, 40.0, 100.0))
    cfg = on("model=opt1.3b", H200, "sft.epochs=1", "ppo.epochs=1")
    assert steps_of_stage(cfg, "sft", rows_of(cfg, "sft", {"data": "x"})) == 8
    assert steps_of_stage(cfg, "ppo", rows_of(cfg, "ppo", {"data": "x"})) == 3  # whole batches of 256
    show_forecast(cfg, plan(cfg), {stage: {"data": "x"} for stage in ("sft", "reward", "ppo")})
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["forecast", "memory", "a", "step", "steps", "time", "price"]
    assert [line.split()[0] for line in lines[2:]] == ["sft", "reward", "ppo", "all"]
    spent = [float(line.split()[-1].lstrip("$")) for line in lines[2:]]
    assert sum(spent[:3]) == pytest.approx(spent[3], abs=0.02)


def test_nothing_is_said_of_a_cpu_and_why_not_of_unknown_networks(capsys):
    for words, text in (
        (("hardware=cpu",), ""),
        (("model=opt1.3b", H200, "model.actor.path=me/mine"), "no forecast: no preset gives the sizes"),
    ):
        cfg = on(*words)
        show_forecast(cfg, plan(cfg), {})
        assert capsys.readouterr().out.strip().startswith(text)


def test_steps_that_are_behind_a_resumed_stage_are_not_counted():
    cfg = on("model=opt1.3b", H200, "sft.max_steps=10")
    assert (forecast(cfg, "sft", None, 0).steps, forecast(cfg, "sft", None, 7).steps) == (10, 3)


def test_machines_are_paid_by_the_gpu():
    for gpus, paid in ((1, "$1.00"), (8, "$8.00")):
        assert price(on("model=opt1.3b", H200, f"hardware.gpus={gpus}", "hardware.price_per_hour=1"), 3600) == paid
    assert price(on("model=opt1.3b", H200, "hardware.price_per_hour=0"), 3600) == "-"
