"""DPO: what its plan holds, what it computes, that it begins at the SFT model, and that it learns on the toy task."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import EOS, NAMES, PAD, actor, causal, configured, family
from workers import update

from runner.config.schema import SHARES, Config, Lora
from runner.data.batches import preference_batch
from runner.deepspeed_config import engine_configs
from runner.errors import UserError
from runner.metrics import RunLog
from runner.models.loading import load_causal
from runner.plan import plan
from runner.stages import dpo, invariants

# --- the plan ---------------------------------------------------------------------------------------------------------


def key(*overrides: str, stage: str = "dpo") -> str:
    return plan(configured(f"stage={stage}", *overrides))[-1].key


def test_it_needs_the_sft_model_and_nothing_else():
    steps = plan(configured("stage=dpo"))
    assert [step.stage for step in steps] == ["sft", "dpo"]
    assert steps[1].parents == {"sft": steps[0].model}
    assert steps[0].key == plan(configured())[0].key  # the one that PPO shares


def test_its_key_holds_what_shapes_it():
    others = ("dpo.beta=0.2", "dpo.label_smoothing=0.1", "sft.lr=1", "model.actor.lora.dim=4")
    assert len({key(), *map(key, others)}) == 5
    assert key("dpo.eval_every=3", "dpo.eval_examples=5", "hardware=cpu2", "hardware.micro_batch.dpo=4", "model.reward.lora.dim=4") == key()


def test_it_has_an_engine_for_its_reference_only_where_that_is_partitioned():
    def names(*words: str) -> list[str]:
        return list(engine_configs(configured("stage=dpo", *words), "dpo"))

    partitioned = "hardware.zero={actor: 3, critic: 3, ref: 3, reward: 3}"
    assert names() == ["actor"] and names(partitioned) == ["actor", "ref"]
    assert names(partitioned, "model.actor.lora.dim=4") == ["actor"]  # the reference is the actor without adapters
    assert names(partitioned, "model.actor.lora.dim=4", "model.actor.lora.train_rest=true") == ["actor", "ref"]


def test_the_prompts_it_learns_from_are_the_reward_models():
    assert SHARES["dpo"] == "reward"
    with pytest.raises(
        UserError, match=r"leaves stage dpo no rows \(dataset.split.reward=0\): .* dataset.split.reward=1, or a checkpoint with .*dpo.use="
    ):
        plan(configured("stage=dpo", "dataset.split.reward=0"))


# --- what it computes -------------------------------------------------------------------------------------------------

PAIRS = [
    {"chosen_ids": [11, 12, 13, 14, EOS], "rejected_ids": [11, 12, 15, EOS], "prompt_length": 2},
    None,
    {"chosen_ids": [21, 22, EOS], "rejected_ids": [21, 23, 24, 25, 26, EOS], "prompt_length": 1},
]


@pytest.mark.parametrize("name", NAMES)
def test_the_log_probability_of_a_response_is_the_sum_over_its_tokens_and_its_end(name):
    model = actor(name, chunk=4)
    found = dpo.response_logprobs(model, preference_batch(PAIRS, PAD))
    expected = []
    for kind in ("chosen_ids", "rejected_ids"):
        for row in PAIRS:
            if row is None:
                expected.append(0.0)
                continue
            ids = torch.tensor([row[kind]])
            logp = model.hf(input_ids=ids).logits.log_softmax(-1)[0]
            expected.append(sum(logp[t - 1, ids[0, t]].item() for t in range(row["prompt_length"], ids.size(1))))
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_implicit_rewards_are_beta_times_the_log_ratio():
    model, other, batch = actor("llama"), actor("llama", seed=1), preference_batch(PAIRS, PAD)
    chosen, rejected = dpo.implicit_rewards(model, batch, dpo.reference_logprobs(None, other, batch), beta=0.5)
    both = 0.5 * (dpo.response_logprobs(model, batch) - dpo.response_logprobs(other, batch))
    assert torch.equal(torch.cat([chosen, rejected]), both)
    assert chosen[1] == rejected[1] == 0 and both.abs().sum() > 1


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    made = tmp_path_factory.mktemp("dpo")
    update.prepare(made, tokenizer)
    return made


def run(cfg: Config, folder: Path, work: Path, device: torch.device) -> list[dict]:
    """Train, and return the rows of metrics.jsonl."""
    work.mkdir(exist_ok=True)
    dpo.train(cfg, update.inputs(folder, "dpo", work), RunLog(cfg, "dpo", work, {}, device), device)
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


def small(adapters: Lora | None = None, **changes) -> Config:
    cfg = update.configuration(1, 0)
    model = replace(cfg.model, actor=replace(cfg.model.actor, lora=adapters)) if adapters else cfg.model
    return replace(cfg, model=model, dpo=replace(cfg.dpo, lr=1e-3, eps=1e-8, **changes))


@pytest.mark.parametrize("name", NAMES)
def test_every_family_begins_at_log_2_and_moves(name, folder, alone, tmp_path, tokenizer):
    causal(name, vocab=256, scale=0.1).save_pretrained(tmp_path / "actor")
    for shared in ("tokenizer", "data"):
        (tmp_path / shared).symlink_to(folder / shared)
    cfg = small(max_steps=1)
    before, first, after = run(replace(cfg, model=replace(cfg.model, family=family(name))), tmp_path, tmp_path / "work", alone)
    assert [before["eval/loss"], first["train/loss"]] == pytest.approx([math.log(2)] * 2, rel=1e-6)
    assert before["eval/accuracy"] == first["train/accuracy"] == 0.5  # ties
    assert first["train/margin"] == first["reward/chosen_mean"] == first["reward/rejected_mean"] == 0
    assert first["grad_norm"] > 0 and after["eval/loss"] < before["eval/loss"]


ADAPTERS = Lora(dim=2, alpha=4, dropout=0.3, targets=[], train_rest=False)


@pytest.mark.parametrize("rest", [False, True])
def test_with_adapters_the_reference_is_what_it_was(rest, folder, alone, tmp_path, monkeypatch):
    """Without a copy where only adapters train. Their dropout is off: the first margins are 0."""
    copies = []
    load = dpo.load_reference
    monkeypatch.setattr(dpo, "load_reference", lambda *args: copies.append(load(*args)) or copies[-1])
    found = run(small(replace(ADAPTERS, train_rest=rest), max_steps=2, lora_lr=1e-2), folder, tmp_path / "work", alone)
    assert (copies[0] is None) == (not rest)
    assert found[1]["train/loss"] == pytest.approx(math.log(2), rel=1e-6) and found[2]["train/loss"] < math.log(2) - 1e-4
    result = json.loads((tmp_path / "work" / "result.json").read_text())
    assert result["eval_loss"] < result["eval_loss_before"] == pytest.approx(math.log(2), rel=1e-6)
    assert (tmp_path / "work" / "adapter" / "adapter_config.json").exists()
    load_causal(str(tmp_path / "work" / "model"), FakeTokenizer(), dtype=torch.float32, attention="auto", dropout=None)


class FakeTokenizer:
    pad_token_id, eos_token_id, bos_token_id = PAD, EOS, None

    def __len__(self) -> int:
        return 1


def test_a_reference_that_is_another_model_stops_the_run_before_it_saves(folder, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo, "load_reference", lambda *_: actor("opt", seed=1))
    with pytest.raises(UserError, match=r"invariant first_margin is broken in step 1: actor and reference differ by .* not log 2"):
        run(replace(small(max_steps=1), checkpoint=replace(small().checkpoint, every=1)), folder, tmp_path / "work", alone)
    assert not (tmp_path / "work" / "checkpoints").exists()


def test_the_first_margin_is_0():
    assert invariants.first_margin(5e-4, "fp32") is None and invariants.first_margin(0.05, "bf16") is None
    assert "differ by 0.05 nats a token before the first update (bound 0.001 in fp32)" in invariants.first_margin(0.05, "fp32")
    assert invariants.first_margin(math.nan, "bf16")


def test_the_best_is_exported_beside_the_last(folder, alone, tmp_path, monkeypatch):
    """Of three evaluations during training the second is the best."""
    accuracies = iter([0.5, 0.6, 0.9, 0.7, 0.8])
    evaluate = dpo.evaluate_pairs
    monkeypatch.setattr(dpo, "evaluate_pairs", lambda *args: evaluate(*args) | {"accuracy": next(accuracies)})
    cfg = small(max_steps=4, epochs=9, eval_every=1)
    run(replace(cfg, checkpoint=replace(cfg.checkpoint, every=0, keep_best=1)), folder, tmp_path / "work", alone)
    assert (tmp_path / "work" / "model_best" / "model.safetensors").exists()


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_learns_the_toy_task(alone, tmp_path):
    """From the SFT actor: pairs it has not seen are ordered rightly, and its answers please the judge no less than before."""
    from runner.data import cache, toy
    from runner.models.tokenizer import decode_response, load_tokenizer
    from runner.prepare import prepare
    from runner.rollout import graph
    from runner.rollout.families import network_of
    from runner.rollout.sampling import uniforms
    from runner.stages import sft
    from runner.stages.build import Inputs

    words = ["model.max_prompt_tokens=64", "model.max_response_tokens=32", "dataset.toy_rows=4000", "wandb.mode=disabled"]
    words += ["sft.eval_every=0", "sft.epochs=2", "dpo.eval_every=0", "dpo.max_steps=20"]
    cfg = configured("stage=dpo", f"store={tmp_path}", *words)
    steps = plan(cfg)
    inputs = prepare(cfg, steps)
    for step, train in zip(steps, (sft.train, dpo.train), strict=True):
        step.folder.mkdir()
        given = Inputs(folder=step.folder, stage=step.stage, key=step.key, parents=step.parents, **inputs[step.stage])
        train(cfg, given, RunLog(cfg, step.stage, step.folder, {}, alone), alone)
    result = json.loads((steps[1].folder / "result.json").read_text())
    assert result["accuracy_before"] == 0.5 and result["accuracy_low"] > 0.7

    tokenizer = load_tokenizer(inputs["dpo"]["tokenizer"], chat_template=cfg.model.chat_template)
    prompts = [row["chosen_ids"][: row["prompt_length"]] for row in cache.load(Path(inputs["dpo"]["data"]))[1].select(range(60))] * 5

    def judged(path: str) -> float:
        model = load_causal(path, tokenizer, dtype=torch.float32, attention="auto", dropout=0.0)
        with torch.no_grad():
            uniform = uniforms(1, list(range(len(prompts))), 32)
            options = {"slots": len(prompts), "min_tokens": 0, "pad": tokenizer.pad_token_id, "eos": tokenizer.eos_token_id}
            found = graph.Decoder(network_of(model), (1.0, 0, 1.0), prompts, uniform, **options).run()
        texts = [decode_response(tokenizer, row[:n]) for row, n in zip(found.responses.tolist(), found.lengths.tolist(), strict=True)]
        return sum(map(toy.judge, texts)) / len(texts)

    assert judged(steps[1].model) > judged(steps[0].model) - 0.05
