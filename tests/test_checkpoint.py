"""Checkpoints: exact, complete or absent, verified, bounded, and readable by other numbers of ranks and ZeRO stages."""

import json
import os
import random
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from tiny import actor, causal, configured, scalar
from trained import bits, run_worker, train, trainable
from workers import resize, update

from runner import ranks
from runner.config.schema import Lora
from runner.durable import checkpoint
from runner.durable.checkpoint import Checkpoints
from runner.durable.manifest import scored, write_manifest
from runner.errors import UserError
from runner.metrics import RunLog
from runner.models.ema import Ema
from runner.models.lora import add_lora
from runner.models.wrappers import Actor
from runner.watch import stop
from runner.watch.stop import Stopped


def checkpoints(folder: Path, engines: dict, average=None, **settings) -> Checkpoints:
    """Checkpoints of a step in `folder`, which keep one, in the foreground, unless told otherwise."""
    cfg = configured("wandb.mode=disabled")
    cfg = replace(cfg, checkpoint=replace(cfg.checkpoint, **{"keep_last": 1, "background": False} | settings))
    return Checkpoints(folder, "key", cfg, engines, RunLog(cfg, "sft", folder, {}, torch.device("cpu")), average)


def save(made: Checkpoints, step: int, state: dict, **more) -> None:
    made.save(f"step_{step}", step, state, **more)


def seeded(seed: int) -> None:
    torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)


def with_dropout(seed: int, lora: bool):
    torch.manual_seed(seed)
    model = causal("opt", seed=0 if lora else seed)  # what adapters leave frozen comes back from the parent, not from the checkpoint
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.1
    if lora:
        model = add_lora(model, Lora(dim=2, alpha=4, dropout=0.1, targets=[], train_rest=False))
    return Actor(model, "opt", 0)


KINDS = [(0, False, "fp32"), (1, False, "fp32"), (2, False, "fp32"), (3, False, "fp32"), (0, True, "fp32"), (3, True, "fp32")]
KINDS += [(0, False, "bf16"), (1, False, "bf16"), (2, True, "bf16"), (3, False, "bf16"), (2, False, "offload"), (3, False, "offload")]


@pytest.mark.slow
@pytest.mark.parametrize("zero, lora, precision", KINDS)
def test_a_resumed_run_is_the_same_bit_for_bit(zero, lora, precision, alone, tmp_path):
    """Weights, optimizer, random numbers of torch, numpy and Python, averaged weights, and the stage's own facts."""

    def begin(seed: int):
        model = with_dropout(seed, lora)
        half = precision != "fp32"
        made = trainable(model.bfloat16() if half else model, zero, "bf16" if half else "fp32", offload=precision == "offload")
        return made, Ema(made.module, 0.9)

    first, ema = begin(1)
    seeded(11)
    train(first, 2)
    ema.update()
    state = {"kl_coef": 0.1 + 0.2, "before": {"loss": 1 / 3}, "rows": [{"score": -0.5}]}
    shared = {"rollout": torch.randn(3, 2), "ended": torch.tensor([True, False])}
    save(checkpoints(tmp_path, {"actor": first}, ema), 2, state, shared=shared)
    train(first, 2)
    ema.update()

    seeded(99)
    second, other = begin(2)
    begun = bits(second)
    step, restored, tensors = checkpoints(tmp_path, {"actor": second}, other).restore()
    assert (step, restored) == (2, state)
    assert all(torch.equal(tensors[name], shared[name]) for name in shared)
    train(second, 2)
    other.update()
    expected, found = bits(first), bits(second)
    assert any(not torch.equal(begun[n], found[n]) for n in found)
    assert all(torch.equal(expected[n], found[n]) for n in expected)
    assert all(torch.equal(a, b) for a, b in zip(ema.shadow, other.shadow, strict=True))


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_an_average_that_no_checkpoint_holds_begins_with_its_weights(zero, alone, tmp_path, capsys):
    """resume=force with ppo.ema_decay switched on, and off again."""
    first, second = trainable(actor("opt"), zero), trainable(actor("opt", seed=1), zero)
    save(checkpoints(tmp_path, {"actor": first}), 2, {})
    ema = Ema(second.module, 0.9)
    checkpoints(tmp_path, {"actor": second}, ema).restore()
    assert "step_2 has no averaged weights: the average starts from its weights" in capsys.readouterr().out
    with ema.swapped_in():
        assert all(torch.equal(t, bits(second)[n]) for n, t in bits(first).items())
    save(checkpoints(tmp_path, {"actor": first}, Ema(first.module, 0.9)), 3, {})
    assert checkpoints(tmp_path, {"actor": second}).restore()[0] == 3


@pytest.mark.parametrize("before, after", [(0, 3), (3, 0), (2, 1), (1, 3)])
def test_another_zero_stage_goes_on_alike(before, after, alone, tmp_path):
    """Shards are named and placed, not laid out as one stage has them."""
    # AdamW with a small epsilon would move weights by gradients that are rounding noise
    first, second = trainable(actor("opt"), before, lr=1.0, eps=1.0), trainable(actor("opt", seed=1), after, lr=1.0, eps=1.0)
    train(first, 2)
    save(checkpoints(tmp_path, {"actor": first}), 2, {})
    checkpoints(tmp_path, {"actor": second}).restore()
    assert all(torch.equal(t, bits(second)[n]) for n, t in bits(first).items())
    begun = bits(first)
    for one in (first, second):
        seeded(5)
        train(one, 2)
    for name, weight in bits(first).items():
        torch.testing.assert_close(bits(second)[name] - begun[name], weight - begun[name], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def resized(tmp_path_factory, tokenizer, alone):
    """A folder in which every chain of tests/workers/resize.py was walked through; and weights before and after as many steps in one go."""
    folder = tmp_path_factory.mktemp("resized")
    update.prepare(folder, tokenizer)
    run_worker(resize.__file__, folder)
    before, _ = resize.train(folder, folder / "untrained", 0, 0, 0, alone)
    return folder, before, resize.train(folder, folder / "straight", 0, 0, 2 * resize.STEPS, alone)


@pytest.mark.slow
@pytest.mark.parametrize("chain", resize.CHAINS, ids=resize.name)
def test_another_number_of_ranks_goes_on_alike(chain, resized):
    """Weights and averages, by how they moved: to 1e-5 of the whole movement."""
    folder, before, straight = resized
    for found, expected in zip(torch.load(folder / f"{resize.name(chain)}.pt", weights_only=True), straight, strict=True):
        assert (expected - before).norm() > 0.2
        assert (found - expected).norm() < 1e-5 * (expected - before).norm()


@pytest.mark.slow
def test_ppo_asks_the_same_prompts_on_another_number_of_ranks_and_is_calibrated_alike(resized):
    """An odd number of prompts, which two ranks cannot share, and another ppo.eval_prompts than at the beginning."""
    folder, *_ = resized
    one, two = (json.loads((folder / work / "result.json").read_text()) for work in ("ppo", "ppo_on_2"))
    assert (one["steps"], one["eval_prompts"]) == (2, 7) and (two["steps"], two["eval_prompts"]) == (1, 3)
    rows = [json.loads(line) for line in (folder / "ppo" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 7 and all({"prompt", "sft", "ppo"} <= row.keys() for row in rows)
    assert [s["sft"] for s in one["samples"]] == [s["sft"] for s in two["samples"]]  # three prompts are the first of seven
    scales = ("score_mean", "score_std", "value_mean", "value_std")
    assert [one[name] for name in scales] == pytest.approx([two[name] for name in scales], rel=1e-4)
    exported = json.loads((folder / "ppo" / "critic" / "config.json").read_text())
    assert [exported[name] for name in scales] == [one[name] for name in scales]


@pytest.fixture(scope="module")
def two_engines(alone):
    return {"actor": trainable(actor("opt"), 2), "critic": trainable(scalar("opt"), 2)}


def test_nothing_to_restore(two_engines, tmp_path):
    assert checkpoints(tmp_path, two_engines).restore() == (0, {}, {})


def test_both_engines_come_back(two_engines, tmp_path):
    before = {name: bits(one) for name, one in two_engines.items()}
    save(checkpoints(tmp_path, two_engines), 1, {})
    train(two_engines["actor"], 1)
    assert any(not torch.equal(before["actor"][n], t) for n, t in bits(two_engines["actor"]).items())
    assert checkpoints(tmp_path, two_engines).restore()[0] == 1
    for name, one in two_engines.items():
        assert all(torch.equal(before[name][n], t) for n, t in bits(one).items())


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def test_keep_last_and_the_newest_by_number(two_engines, tmp_path):
    made = checkpoints(tmp_path, two_engines, keep_last=2)
    for step in (2, 9, 10):
        save(made, step, {"at": step})
    made.save("step_10_3", 10, {"at": "in the eleventh"})
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_10", "step_10_3"]
    assert names(tmp_path) == ["step_10", "step_10_3"]
    assert checkpoints(tmp_path, two_engines).restore()[:2] == (10, {"at": "in the eleventh"})


def test_the_best_are_kept_and_exported(two_engines, tmp_path):
    made = checkpoints(tmp_path, two_engines, keep_best=1, every=0)
    scores = [0.5, 0.9, 0.7, None]
    weights = []
    for done, score in enumerate(scores, start=1):
        train(two_engines["actor"], 1)
        weights.append(bits(two_engines["actor"]))
        made.after(done, 4, {}, score)
    # The third beat nothing and was not due: it was not even written
    assert names(tmp_path) == ["step_2", "step_4"]
    assert not made.load_best(0.95)
    assert made.load_best(0.6)
    assert all(torch.equal(t, weights[1][n]) for n, t in bits(two_engines["actor"]).items())
    again = checkpoints(tmp_path, two_engines, keep_best=1)
    again.restore()
    assert max(again.scores) == 0.9


def test_as_many_of_the_best_are_kept_as_asked_for_in_whatever_order_they_come(two_engines, tmp_path):
    made = checkpoints(tmp_path, two_engines, keep_best=2, every=0, keep_last=1)
    for done, score in enumerate([0.9, 0.8, 0.7, 0.85], start=1):
        made.after(done, 9, {}, score)
    made.finish()
    assert names(tmp_path) == ["step_1", "step_4"]
    made = checkpoints(tmp_path, two_engines, keep_best=2, every=0, keep_last=1)
    made.restore()
    for done, score in enumerate([0.8, 0.95], start=5):
        made.after(done, 9, {}, score)
    made.finish()
    assert names(tmp_path) == ["step_1", "step_6"]


def test_a_checkpoint_that_was_cut_short_is_none(two_engines, tmp_path, monkeypatch):
    made = checkpoints(tmp_path, two_engines)
    save(made, 3, {"at": 3})
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        save(made, 4, {"at": 4})
    folder = tmp_path / "checkpoints"
    assert (folder / "step_4.tmp" / "manifest.json").exists()
    shutil.copytree(folder / "step_3", folder / "step_8")
    (folder / "step_8" / "manifest.json").unlink()  # a copy that was cut short
    made = checkpoints(tmp_path, two_engines)
    assert made.restore()[:2] == (3, {"at": 3})
    assert not (folder / "step_4.tmp").exists()  # cleared away
    save(made, 4, {"at": 5})
    assert checkpoints(tmp_path, two_engines).restore()[:2] == (4, {"at": 5})


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit": (lambda p: flip_a_bit(p / "actor.rank_0.safetensors"), r"actor.rank_0.safetensors is not what was written"),
    "a file cut short": (lambda p: os.truncate(p / "critic.rank_0.safetensors", 100), r"critic.rank_0.safetensors has 100 bytes"),
    "a lost file": (lambda p: (p / "rank_0.json").unlink(), r"rank_0.json is missing"),
    "another step in the manifest": (
        lambda p: (p / "manifest.json").write_text((p / "manifest.json").read_text().replace('"step": 2', '"step": 3')),
        r"manifest.json: it is not what was written",
    ),
    "a broken manifest": (lambda p: (p / "manifest.json").write_text("{"), r"manifest.json: "),
    "a path that leads away": (
        lambda p: write_manifest(p, {"files": {"../../secret": {"bytes": 0, "sha256": ""}}, "score": None}),
        r"secret is missing",
    ),
}


@pytest.mark.parametrize("spoil, says", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(spoil, says, two_engines, tmp_path, capsys):
    made = checkpoints(tmp_path, two_engines, keep_last=2)
    save(made, 1, {"at": 1})
    before = bits(two_engines["actor"])
    train(two_engines["actor"], 1)
    save(made, 2, {"at": 2})
    spoil(tmp_path / "checkpoints" / "step_2")
    made = checkpoints(tmp_path, two_engines, keep_last=2)
    assert made.restore()[:2] == (1, {"at": 1})
    assert all(torch.equal(t, bits(two_engines["actor"])[n]) for n, t in before.items())
    assert re.search(f"checkpoint step_2 is damaged and skipped: .*{says}", capsys.readouterr().out)
    assert names(tmp_path) == ["step_1", "step_2.damaged"]
    save(made, 2, {"at": "again"})  # takes its place
    assert names(tmp_path) == ["step_1", "step_2"]
    assert checkpoints(tmp_path, two_engines).restore()[:2] == (2, {"at": "again"})


def test_a_checkpoint_of_another_model_is_refused(two_engines, tmp_path):
    save(checkpoints(tmp_path, two_engines), 3, {})
    with pytest.raises(UserError, match=r"it belongs to another model"):
        checkpoints(tmp_path, {"actor": trainable(actor("llama"), 0), "critic": two_engines["critic"]}).restore()


def test_a_checkpoint_of_another_configuration_is_refused(two_engines, tmp_path):
    save(checkpoints(tmp_path, two_engines), 3, {})
    made = checkpoints(tmp_path, two_engines)
    made.key = "other"
    with pytest.raises(UserError, match=r"belongs to step key, this is other"):
        made.restore()


def test_a_broken_older_checkpoint_stops_nothing(two_engines, tmp_path):
    made = checkpoints(tmp_path, two_engines, keep_last=2, keep_best=1)
    for step in (1, 2):
        save(made, step, {}, score=0.5)
    (tmp_path / "checkpoints" / "step_1" / "manifest.json").write_text("{")
    made = checkpoints(tmp_path, two_engines, keep_last=2, keep_best=1)
    assert made.restore()[0] == 2
    save(made, 3, {})
    assert names(tmp_path) == ["step_2", "step_3"]


def test_a_damaged_best_is_not_exported(two_engines, tmp_path, capsys):
    made = checkpoints(tmp_path, two_engines, keep_best=1)
    save(made, 1, {}, score=0.0)
    save(made, 2, {})
    flip_a_bit(tmp_path / "checkpoints" / "step_1" / "actor.rank_0.safetensors")
    assert not made.load_best(-1.0)
    assert "checkpoint step_1 is damaged" in capsys.readouterr().out


def test_time_alone_makes_a_checkpoint_due(two_engines, tmp_path):
    made = checkpoints(tmp_path, two_engines, every=0, minutes=1.0)
    made.after(1, 9, {})
    assert not (tmp_path / "checkpoints").exists()
    made._last -= 61
    made.after(2, 9, {})
    made.after(3, 9, {})
    assert names(tmp_path) == ["step_2"]


def test_remains_of_a_deletion_are_cleared_away(two_engines, tmp_path):
    save(checkpoints(tmp_path, two_engines), 2, {})
    (tmp_path / "checkpoints" / "step_1").mkdir()
    checkpoints(tmp_path, two_engines).restore()
    assert names(tmp_path) == ["step_2"]


# --- the disk ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_foreseen_and_the_last_checkpoint_stays(two_engines, tmp_path, monkeypatch):
    made = checkpoints(tmp_path, two_engines, keep_last=3)
    for step in (1, 2):
        save(made, step, {})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=70_000_000 - 64 * len(names(tmp_path))))
    with pytest.raises(UserError, match=r"the disk is full: a checkpoint needs .* MB, .* MB are free at .*step_2, is intact"):
        monkeypatch.setattr(checkpoint, "SPARE_BYTES", 80_000_000)
        save(made, 3, {})
    # The older one went, to make room
    assert names(tmp_path) == ["step_2"]
    assert checkpoints(tmp_path, two_engines).restore()[0] == 2


def test_an_error_while_writing_reaches_the_loop(two_engines, tmp_path, monkeypatch):
    made = checkpoints(tmp_path, two_engines, background=True)
    save(made, 1, {})
    made.finish()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    save(made, 2, {})
    with pytest.raises(OSError, match="No space left") as caught:
        made.finish()
    assert caught.value.errno == 28
    assert checkpoints(tmp_path, two_engines).restore()[0] == 1


def test_training_goes_on_while_a_checkpoint_is_written(two_engines, tmp_path, monkeypatch):
    """What is written is the state at the call, and it gets its name at the first step after all is written."""
    gate, written = threading.Event(), checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda *a: (gate.wait(20), written(*a)))
    made = checkpoints(tmp_path, two_engines, background=True, every=2)
    train(two_engines["actor"], 1)
    expected = bits(two_engines["actor"])
    made.after(2, 9, {"at": 2})
    train(two_engines["actor"], 1)
    made.after(3, 9, {"at": 3})
    assert names(tmp_path) == ["step_2.tmp"]
    gate.set()
    made._writer.thread.join()
    made.after(5, 9, {"at": 5})
    assert names(tmp_path) == ["step_2"]
    checkpoints(tmp_path, two_engines).restore()
    assert all(torch.equal(t, bits(two_engines["actor"])[n]) for n, t in expected.items())


# --- stopping ---------------------------------------------------------------------------------------------------------


def test_who_asks_for_a_stop_gets_a_checkpoint_first(two_engines, tmp_path, monkeypatch):
    made = checkpoints(tmp_path, two_engines, background=True, every=100)
    made.after(1, 9, {"at": 1})
    assert not (tmp_path / "checkpoints").exists()
    monkeypatch.setattr(stop, "asked", lambda: "SIGTERM")
    with pytest.raises(Stopped, match="SIGTERM"):
        made.after(2, 9, {"at": 2})
    assert checkpoints(tmp_path, two_engines).restore()[:2] == (2, {"at": 2})


def test_what_wandb_has_been_told_it_is_not_told_again(two_engines, tmp_path):
    def told(made: Checkpoints) -> list[float]:
        return [call.args[0]["x"] for call in made.log.wandb.log.call_args_list]

    first, second = (checkpoints(tmp_path, two_engines) for _ in range(2))
    first.log.wandb = MagicMock(offline=False)
    first.log.log(1, {"x": 0.1})
    save(first, 1, {})
    first.log.log(2, {"x": 0.2})
    second.log.wandb = MagicMock(offline=False)
    second.restore()
    for step, value in ((2, 0.2), (3, 0.3)):
        second.log.log(step, {"x": value})
    assert (told(first), told(second)) == ([0.1, 0.2], [0.3])
    assert [json.loads(line)["x"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0.1, 0.2, 0.3]


def test_lines_logged_after_the_checkpoint_go(two_engines, tmp_path):
    made = checkpoints(tmp_path, two_engines)
    lines = tmp_path / "metrics.jsonl"
    lines.write_text('{"step": 1}\n')
    save(made, 1, {})
    with lines.open("a") as file:
        file.write('{"step": 1, "eval/loss": 2}\n{"step": 2}\n{"st')
    checkpoints(tmp_path, two_engines).restore()
    assert lines.read_text() == '{"step": 1}\n'


def test_what_is_not_finite_is_left_out_of_the_log(two_engines, tmp_path):
    """JSON has no word for it, and strict readers refuse Python's: the gradient norm of a step that fp16 skipped."""

    def refuse(word: str):
        raise ValueError(word)

    made = checkpoints(tmp_path, two_engines)
    made.log.log(1, {"a": 1.0, "grad_norm": float("inf"), "b": torch.tensor(float("nan")), "c": 2})
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert {"a": 1.0, "c": 2}.items() <= row.items() and not {"grad_norm", "b"} & row.keys()


def test_rank_0_says_what_the_best_score_is(two_engines, tmp_path, monkeypatch):
    """A network disk may show others something else, and a best score means that all ranks save together."""
    first = ranks.from_rank0
    views = []

    def as_rank_0(make):
        views.append("rank 0")
        found = first(make)
        views.pop()
        return found

    save(checkpoints(tmp_path, two_engines), 1, {}, score=2.5)
    monkeypatch.setattr(ranks, "from_rank0", as_rank_0)
    monkeypatch.setattr(checkpoint, "scored", lambda paths: scored(paths) if views else [])
    made = checkpoints(tmp_path, two_engines)
    made.restore()
    assert made.scores == [2.5]
