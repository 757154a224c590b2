"""The whole pipeline as a user starts it: `python run.py ...` in a subprocess, on toy and on real data.

Each start of a worker costs seconds, so runs are few and each is looked at from several sides.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import faults
import psutil
import pytest
import torch
from safetensors.torch import load_file

from runner.metrics import CLOCK

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow
# Few and small steps of everything, with a checkpoint after each
SMALL = ["experiment=debug", "debug=false", "name=test", "dataset.toy_rows=3000", "model.max_response_tokens=16"]
SMALL += ["hardware.micro_batch.ppo=4", "hardware.micro_batch.sft=8"]
SMALL_PPO = ["ppo.rollout_batch=32", "ppo.eval_prompts=8", "ppo.calibration_prompts=8"]


def command(store: Path, *overrides: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "run.py"),
        *SMALL,
        f"store={store}",
        f"hydra.run.dir={store}/run",
        f"hydra.sweep.dir={store}/sweep",
        *overrides,
    ]


def run(store: Path, *overrides: str, timeout: int = 200) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command(store, *overrides), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def succeed(store: Path, *overrides: str) -> str:
    done = run(store, *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def step_folder(store: Path, stage: str) -> Path:
    (folder,) = store.glob(f"{stage}-*")
    return folder


def metrics(folder: Path) -> list[dict]:
    """Rows of metrics.jsonl without what the clock decides."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in rows]


def assert_same_weights(a: Path, b: Path) -> None:
    one, other = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A store with all three stages trained, and what the run printed. Uses every feature of PPO that has a state."""
    store = tmp_path_factory.mktemp("finished")
    return store, succeed(store, *STATEFUL)


STATEFUL = [
    *SMALL_PPO,
    "ppo.ema_decay=0.9",
    "ppo.ptx_coef=0.5",
    "ppo.kl_target=1.0",
    "ppo.kl_horizon=100",
    "ppo.ppo_epochs=2",
    "sft.dropout=0.1",
]
STATEFUL += ["sft.max_steps=4", "reward.max_steps=4", "ppo.max_steps=3", "sft.eval_every=0", "reward.eval_every=0", "ppo.eval_every=0"]


def test_three_stages_leave_models_that_plain_transformers_loads(finished):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    store, printed = finished
    ppo, reward = step_folder(store, "ppo"), step_folder(store, "reward")
    for folder in (step_folder(store, "sft") / "model", ppo / "model", ppo / "model_ema"):
        AutoModelForCausalLM.from_pretrained(folder)
    AutoModelForSequenceClassification.from_pretrained(reward / "model")
    AutoModelForSequenceClassification.from_pretrained(ppo / "critic")
    tokenizer = AutoTokenizer.from_pretrained(ppo / "model")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert text.endswith("\n\nHuman: Hi\n\nAssistant:")
    assert "Sample 1" in printed and "python -m runner.chat" in printed


def test_metrics_have_their_names_and_plausible_values(finished):
    store, _ = finished
    steps = [row for row in metrics(step_folder(store, "ppo")) if "objective/kl" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert steps[0]["objective/kl"] == pytest.approx(0, abs=1e-4)  # the actor is still the reference
    for row in steps:
        assert row["val/first_ratio_error"] < 1e-3
        assert row["objective/rlhf_reward"] == pytest.approx(row["objective/scores"] + row["objective/non_score_reward"], abs=1e-5)
        assert row["policy/updates"] == 8  # two passes of four minibatches
        assert row["grad_norm/actor"] > 0 and row["grad_norm/critic"] > 0
    assert steps[1]["objective/kl_coef"] != steps[0]["objective/kl_coef"]  # the controller moved
    assert steps[-1]["episode"] == 3 * 32
    after = json.loads((step_folder(store, "ppo") / "result.json").read_text())["after"]
    assert 0 < after["score_se"] < 1  # of 8 prompts, whose scores are about one apart


def test_running_again_reuses_everything_and_a_change_of_ppo_reuses_its_parents(finished, tmp_path):
    store, _ = finished
    stamps = {p: p.stat().st_mtime_ns for p in store.glob("*/result.json")}
    printed = succeed(store, *STATEFUL, f"--config-dir={tmp_path}")
    assert printed.count("reused") >= 3 and f"run.py --config-dir={tmp_path} -m " in printed  # in what to type next
    assert {p: p.stat().st_mtime_ns for p in store.glob("*/result.json")} == stamps and len(stamps) == 3
    plan = succeed(store, *STATEFUL, "ppo.kl_coef=0.5", "dry_run=true")
    assert plan.count("reused") == 2 and plan.count("resume") == 0


BLOWS = [
    ("sft", "SIGKILL to the launcher", "save"),
    ("reward", "SIGKILL to everything", "export"),
    ("ppo", "SIGKILL to all workers", "training"),
]


@pytest.mark.parametrize("stage, what, when", BLOWS)
def test_a_blow_loses_nothing(finished, tmp_path, stage, what, when):
    """A share of benchmarks/faults.py: after a kill and a second run, the same metrics and the same weights, bit for bit."""
    store, printed = finished
    overrides = list(STATEFUL)
    if stage == "ppo":
        overrides += [f"sft.use={step_folder(store, 'sft')}/model", f"reward.use={step_folder(store, 'reward')}/model"]
    else:
        overrides = [o for o in overrides if o.startswith(stage)] + [f"stage={stage}"]
    broken = tmp_path / "broken"
    process = subprocess.Popen(
        command(broken, *overrides),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    workers = strike_when(process, broken, stage, what, when)
    said = process.communicate(timeout=60)[1]
    assert "was killed (-9). Somebody sent the signal" in said if what == "SIGKILL to all workers" else process.returncode == -9
    assert psutil.wait_procs(workers, timeout=10)[1] == []  # none runs on unseen
    assert "resumed at step" in succeed(broken, *overrides) and "resumed" not in printed

    a, b = step_folder(store, stage), step_folder(broken, stage)
    assert metrics(a) == metrics(b)
    assert_same_weights(a / "model", b / "model")
    if stage == "ppo":
        assert_same_weights(a / "model_ema", b / "model_ema")
        assert_same_weights(a / "critic", b / "critic")


def strike_when(process: subprocess.Popen, store: Path, stage: str, what: str, when: str) -> list[psutil.Process]:
    """Returns the workers that ran at that moment. Not before the first checkpoint: then there would be nothing to go on from."""
    deadline = time.monotonic() + 120
    while not (faults.checkpoints(store, stage) and faults.has_come(when, faults.step_folder(store, stage), lines=2)):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before the moment came"
        time.sleep(0.001)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if faults.is_worker(p)]
    faults.strike(what, process)
    return workers


def test_a_sweep_trains_the_parents_once_and_ends_with_a_table(finished):
    store, _ = finished
    printed = succeed(store, *STATEFUL, "ppo.kl_coef=0.05,0.2", "-m")
    assert len(list(store.glob("sft-*"))) == len(list(store.glob("reward-*"))) == 1
    assert len(list(store.glob("ppo-*"))) == 2  # one is the fixture's
    table = printed[printed.index("Sweep of") :]
    assert "0.05" in table and "0.2" in table


def test_jobs_side_by_side_train_a_shared_step_once(tmp_path):
    jobs = [
        subprocess.Popen(
            command(tmp_path, "stage=sft", f"wandb.project=job{i}", f"hydra.run.dir={tmp_path}/job{i}"),
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [job.communicate(timeout=200)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert sum("step 2/2  loss" in output for output in outputs) == 1
    assert [row["step"] for row in metrics(step_folder(tmp_path, "sft")) if "train/loss" in row] == [1, 2]
