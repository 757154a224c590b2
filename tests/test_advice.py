"""The line of advice at the end of a stage: what it says follows from the measured phases, and it keeps quiet where all is well."""

from dataclasses import replace

import pytest
from tiny import configured

from runner.advice import advise


def steps(count: int = 10, **facts: float) -> list[dict]:
    """Rows of metrics.jsonl; names with _ for the slash."""
    row = {name.replace("time_", "time/").replace("perf_", "perf/").replace("rollout_", "rollout/"): value for name, value in facts.items()}
    return [row | {"time/step": sum(v for k, v in row.items() if k.startswith("time/"))}] * count


def on(preset: str, *words: str):
    return configured(f"hardware={preset}", "model=opt1.3b", *words)


@pytest.mark.parametrize(
    ("stage", "facts"),
    [
        ("sft", {"time_train": 9.5, "time_data": 0.1, "time_other": 0.4, "perf_padding_fraction": 0.04}),
        ("ppo", {"time_rollout": 3.0, "time_scoring": 1.0, "time_update": 6.0, "perf_padding_fraction": 0.05}),
    ],
)
def test_where_nothing_is_notable_nothing_is_said(stage, facts, cfg):
    rows = steps(**facts)
    phases = {k.removeprefix("time/"): 10 * v for k, v in rows[0].items() if k.startswith("time/") and k != "time/step"}
    assert advise(cfg, stage, rows, phases) is None


def test_a_few_steps_say_nothing(cfg):
    rows = steps(4, time_train=1.0, perf_padding_fraction=0.9)
    assert advise(cfg, "sft", rows, {"train": 4.0}) is None
    assert advise(cfg, "sft", 2 * rows, {"train": 8.0}) is not None


def test_padding_is_named_with_what_avoids_it(cfg):
    rows = steps(time_train=1.0, perf_padding_fraction=0.62)
    assert advise(cfg, "reward", rows, {"train": 10.0}) == "62 % of the positions were padding: model.attention=packed computes no padding"


def test_evaluations_and_checkpoints_count_over_the_whole_stage(cfg):
    rows = steps(time_train=1.0)
    assert "evaluations took 50 % of the stage: sft.eval_every=0" in advise(cfg, "sft", rows, {"train": 10.0, "eval": 10.0})
    assert "checkpoints took 33 % of the stage" in advise(cfg, "sft", rows, {"train": 10.0, "checkpoint": 5.0})


def test_rollouts_name_the_engine_and_the_micro_batch():
    rows = steps(time_rollout=7.1, time_scoring=0.9, time_update=2.0, perf_gpu_mem_peak_gb=20.0)
    phases = {"rollout": 71.0, "scoring": 9.0, "update": 20.0}
    assert "rollouts took 71 % of a PPO step: rollout.engine=auto" in advise(on("h200", "rollout.engine=hf"), "ppo", rows, phases)
    few = on("h200", "hardware.micro_batch.rollout=16", "ppo.rollout_batch=64", "hardware.micro_batch.ppo=16")
    assert "hardware.micro_batch.rollout=32 samples more" in advise(few, "ppo", rows, phases)


def test_a_full_gpu_is_not_told_to_take_more():
    cfg = on("h200", "hardware.micro_batch.rollout=16", "ppo.rollout_batch=64", "hardware.micro_batch.ppo=16")
    rows = steps(time_rollout=7.1, time_scoring=0.9, time_update=2.0, perf_gpu_mem_peak_gb=120.0)
    assert advise(cfg, "ppo", rows, {"rollout": 71.0, "scoring": 9.0, "update": 20.0}) is None


def test_room_in_memory_saves_the_recomputation():
    rows = steps(time_train=1.0, perf_gpu_mem_peak_gb=30.0, perf_mfu=0.4)
    advice = advise(on("h200", "hardware.gradient_checkpointing.actor=true"), "sft", rows, {"train": 10.0})
    assert advice == "30 of 141 GB were used: hardware.gradient_checkpointing.actor=false saves up to 25 % of the time"
    assert advise(on("h200", "hardware.gradient_checkpointing.actor=false"), "sft", rows, {"train": 10.0}) is None


def test_dpo_is_advised_as_sft_is():
    rows = steps(time_reference=0.2, time_train=0.8, perf_gpu_mem_peak_gb=30.0, perf_mfu=0.4)
    on_h200 = on("h200", "stage=dpo", "hardware.gradient_checkpointing.actor=true")
    assert "hardware.gradient_checkpointing.actor=false saves up to 20 %" in advise(on_h200, "dpo", rows, {"train": 10.0})


def test_low_utilisation_with_room_asks_for_larger_micro_batches():
    cfg = on("h200", "hardware.gradient_checkpointing.actor=false", "sft.global_batch=64", "hardware.micro_batch.sft=8")
    rows = steps(time_train=1.0, perf_gpu_mem_peak_gb=30.0, perf_mfu=0.1)
    assert advise(cfg, "sft", rows, {"train": 10.0}) == "30 of 141 GB were used at 10 % MFU: try hardware.micro_batch.sft=16"


def test_the_largest_win_is_the_one_that_is_named(cfg):
    rows = steps(time_train=1.0, perf_padding_fraction=0.3)
    assert "padding" in advise(cfg, "sft", rows, {"train": 10.0, "eval": 2.0})
    assert "evaluations" in advise(cfg, "sft", rows, {"train": 10.0, "eval": 20.0})


def test_a_rollout_that_is_always_read_again_is_named(cfg):
    rows = steps(time_rollout=1.0, time_scoring=4.5, time_update=4.5, rollout_reread=1.0, rollout_logprob_mismatch=0.2)
    phases = {"rollout": 10.0, "scoring": 45.0, "update": 45.0}
    assert "rollout/logprob_mismatch" in advise(cfg, "ppo", rows, phases)
    forced = replace(cfg, rollout=replace(cfg.rollout, max_mismatch=0.0))
    assert advise(forced, "ppo", rows, phases) is None
