"""resume=force in PPO: whatever has a state can be switched on and off, between two iterations and in the middle of an update."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_exact_resume import configuration, run
from workers import update

from runner.config.schema import Config
from runner.durable.manifest import complete
from runner.durable.resume import Unfinished, adopt
from runner.watch import stop

pytestmark = pytest.mark.slow

# Two runs to begin with: with everything that has a state, and with nothing
RICH = {"ema_decay": 0.9, "ptx_coef": 0.5, "kl_target": 0.1, "kl_horizon": 20, "kl_coef": 0.05}
PLAIN = {"ema_decay": 0.0, "ptx_coef": 0.0, "kl_target": None, "kl_horizon": 20, "kl_coef": 0.05}
# Who asks stop.asked when the first run is stopped: after its first optimizer step, and after its first iteration
PLACES = {"step_0_1": "update", "step_1": "after"}


def configured(changes: dict) -> Config:
    cfg = configuration(0, False)
    small = {"rollout_batch": 8, "minibatches": 2, "ppo_epochs": 2, "max_steps": 2, "eval_prompts": 2, "eval_every": 0}
    return replace(cfg, ppo=replace(cfg.ppo, **small | changes))


@pytest.fixture(scope="module")
def begun(tmp_path_factory, tokenizer, alone):
    """Gives the prepared folder, and the step folder of a run that was stopped in a given place; each is made once."""
    folder, made = tmp_path_factory.mktemp("forced"), {}
    update.prepare(folder, tokenizer)

    def stopped(settings: dict, place: str) -> Path:
        work = folder / f"{'rich' if settings is RICH else 'plain'}-{place}"
        if work not in made:
            with pytest.MonkeyPatch.context() as patched, pytest.raises(stop.Stopped):
                patched.setattr(stop, "asked", lambda: "SIGTERM" if sys._getframe(1).f_code.co_name == PLACES[place] else None)
                run(configured(settings), "ppo", folder, work, alone)
            made[work] = [path.name for path in complete(work)]
        assert made[work] == [place]
        return work

    return folder, stopped


CASES = [
    (RICH, "step_1", {"ema_decay": 0.0}),
    (RICH, "step_1", {"ptx_coef": 0.0, "kl_target": None, "kl_coef": 0.2}),
    (PLAIN, "step_1", {"ema_decay": 0.9, "minibatches": 4}),
    (PLAIN, "step_1", {"ptx_coef": 0.5, "kl_target": 0.1}),
    (PLAIN, "step_0_1", {"minibatches": 4}),
    (PLAIN, "step_0_1", {"minibatches": 1, "ppo_epochs": 1}),
    (PLAIN, "step_0_1", {"rollout_batch": 4, "kl_coef": 0.2}),
    (RICH, "step_0_1", PLAIN),
]


@pytest.mark.parametrize("settings, place, change", CASES, ids=[f"{place}-{'+'.join(change)}" for _, place, change in CASES])
def test_a_changed_setting_holds_from_there_on(settings, place, change, begun, alone, tmp_path, monkeypatch, capsys):
    folder, stopped = begun
    earlier, new = stopped(settings, place), settings | change
    cfg = configured(new)
    monkeypatch.setattr(stop, "asked", lambda: None)
    adopt(tmp_path, "", Unfinished(earlier, 0, {}))
    first = int(place.split("_")[1])
    assert [path.name for path in complete(tmp_path)] == [f"step_{first}"]
    run(cfg, "ppo", folder, tmp_path, alone)
    said = "".join(capsys.readouterr())
    assert ("the unfinished rollout of step_0_1 was made with the old configuration" in said) == (place == "step_0_1")
    assert ("has no averaged weights" in said) == (new["ema_decay"] > 0 and not settings["ema_decay"])

    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "policy/updates" in row]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows[first:]:
        assert row["policy/updates"] == cfg.ppo.minibatches * cfg.ppo.ppo_epochs
        assert ("loss/ptx_avg" in row) == (new["ptx_coef"] > 0)
    if new["kl_target"] is None:
        assert {row["objective/kl_coef"] for row in rows[first:]} == {new["kl_coef"]}
    assert (tmp_path / "model_ema").exists() == (new["ema_decay"] > 0)
    assert torch.isfinite(torch.tensor([row["loss/policy_avg"] for row in rows])).all()
