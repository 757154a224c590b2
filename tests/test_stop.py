"""Stopping: signals, the time limit and restarts. Most runs use a worker without a model (tests/workers/worker.py)."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny import configured

from runner.config.limits import seconds_of
from runner.errors import UserError
from runner.launch import _await_orphans
from runner.plan import plan
from runner.watch import stop
from runner.worker import WORKERS_LOCK

ROOT = Path(__file__).parents[1]
WORKERS = ROOT / "tests" / "workers"


@pytest.fixture(autouse=True)
def handlers(monkeypatch):
    """Handlers and state of this process are as they were afterwards."""
    before = {number: signal.getsignal(number) for number in stop.SIGNALS}
    monkeypatch.setattr(stop, "_watch", stop.Watch())
    monkeypatch.setattr(stop, "_launcher", stop.Launcher())
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path


# --- the worker asks --------------------------------------------------------------------------------------------------


def test_nobody_asks_unless_somebody_does(folder):
    stop.watch(folder)
    assert stop.asked() is None


def test_a_signal_to_a_worker_is_only_noted(folder):
    stop.watch(folder)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.asked() == "SIGUSR1"


def test_the_launcher_asks_through_a_file(folder):
    stop.watch(folder)
    (folder / stop.STOP_FILE).write_text(str(int(signal.SIGINT)))
    assert stop.asked() == "SIGINT"


def test_time_is_kept_for_the_longest_step_and_the_longest_save(folder, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(stop.time, "time", lambda: clock[0])
    (folder / stop.LIMIT_FILE).write_text("2000")
    stop.watch(folder)

    def asked_at(now: float) -> str | None:
        clock[0] = now
        return stop.asked()

    assert asked_at(1100) is None
    assert asked_at(1300) is None  # a step of 200 s
    assert asked_at(1310) is None
    clock[0] += 70
    stop.saving_took(70)
    assert asked_at(1525) is None  # 145 s of step, for the save does not count
    assert asked_at(2000 - 200 - 70 - stop.MARGIN) is None
    assert asked_at(2000 - 200 - 70 - stop.MARGIN + 1) == "the time limit"


def test_before_the_first_save_a_share_of_the_limit_is_kept_for_it(folder, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(stop.time, "time", lambda: clock[0])
    (folder / stop.LIMIT_FILE).write_text("2000")
    stop.watch(folder)
    clock[0] = 2000 - 50 - stop.MARGIN
    assert stop.asked() is None
    clock[0] += 0.1
    assert stop.asked() == "the time limit"


ASK = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
from runner.watch import stop
folder, rank = Path(sys.argv[2]), int(sys.argv[3])
os.environ.update(RANK=str(rank), WORLD_SIZE="2")
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
stop.watch(folder)
first = stop.asked()
if rank == 1:
    os.kill(os.getpid(), signal.SIGTERM)
print(first, stop.asked())
"""


def test_every_rank_hears_of_a_signal_that_reached_one(folder):
    command = [sys.executable, "-c", ASK, str(ROOT), str(folder)]
    ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    assert [rank.communicate(timeout=60)[0].strip() for rank in ranks] == ["None SIGTERM"] * 2


# --- the configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("90", 5400),
        ("0.5", 30),
        ("30:15", 1815),
        ("01:30:00", 5400),
        ("2-12", 216000),
        ("1-00:30", 88200),
        ("1-02:03:04", 93784),
    ],
)
def test_time_limits_are_minutes_or_what_slurm_writes(text, seconds):
    assert seconds_of(text) == seconds
    assert configured(f"time_limit={text}").time_limit_seconds == seconds


OTHERS = [
    ("soon", r"is not a duration: type minutes \(90\), MM:SS \(90:00\), HH:MM:SS"),
    ("1:2:3:4", "is not a duration"),
    ("0", "must be above 0"),
    ("25:61:00", "has 61 minutes, which is 60 or more"),
    ("90:60", "has 60 seconds"),
    ("1-24", "has 24 hours"),
]


@pytest.mark.parametrize("text, says", OTHERS)
def test_other_time_limits_are_refused(text, says):
    with pytest.raises(UserError, match=says):
        configured(f"time_limit={text}")


def test_when_a_run_ends_does_not_change_what_it_makes():
    keys = [[step.key for step in plan(configured(*words))] for words in ((), ("time_limit=90", "max_restarts=3"))]
    assert keys[0] == keys[1]


# --- the launcher, with a worker that needs no model ------------------------------------------------------------------


def launch(store: Path, how: str, *overrides: str) -> subprocess.Popen:
    words = ["stage=sft", f"store={store}", f"hydra.run.dir={store}/run", f"hydra.sweep.dir={store}/sweep", "wandb.mode=disabled"]
    words.append(f"hardware.launch='{{python}} {WORKERS / 'worker.py'} {{folder}} {how}'")
    command = [sys.executable, str(WORKERS / "launcher.py"), *words, *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def worker_of(launcher: subprocess.Popen, store: Path) -> psutil.Process:
    """The worker, once it runs."""
    deadline = time.monotonic() + 60
    while not (found := [path for path in store.glob("sft-*/pid_0") if path.read_text()]):
        assert launcher.poll() is None and time.monotonic() < deadline, launcher.communicate()[0]
        time.sleep(0.02)
    return psutil.Process(int(found[0].read_text()))


def is_gone(process: psutil.Process) -> bool:
    try:
        process.wait(10)
    except psutil.TimeoutExpired:
        return process.status() == psutil.STATUS_ZOMBIE  # nobody has asked for its exit code
    return True


@pytest.mark.parametrize("number", stop.SIGNALS)
def test_the_first_signal_stops_in_good_order_and_says_resume_me(number, tmp_path):
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("these tests run under nohup")
    launcher = launch(tmp_path, "stops")
    worker_of(launcher, tmp_path)
    launcher.send_signal(number)
    printed = launcher.communicate(timeout=30)[0]
    assert launcher.returncode == stop.RESUME_ME == 75, printed
    assert f"stopped by {number.name} at step 7 of 9; the same command resumes from there" in printed


def test_nohup_is_respected(tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it to what it starts
    try:
        launcher = launch(tmp_path, "stops")
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    worker_of(launcher, tmp_path)
    launcher.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM" in launcher.communicate(timeout=30)[0]


def test_a_signal_to_the_worker_alone_does_the_same(tmp_path):
    launcher = launch(tmp_path, "stops")
    worker_of(launcher, tmp_path).send_signal(signal.SIGUSR1)
    printed = launcher.communicate(timeout=30)[0]
    assert launcher.returncode == 75 and "stopped by SIGUSR1 at step 7 of 9" in printed


def test_the_second_signal_ends_at_once_and_takes_the_workers_along(tmp_path):
    launcher = launch(tmp_path, "hangs")
    worker = worker_of(launcher, tmp_path)
    launcher.send_signal(signal.SIGINT)
    assert _until(launcher, "a second signal ends it at once")
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=30)
    assert launcher.returncode == 128 + signal.SIGINT
    assert is_gone(worker)


def test_a_reader_that_ends_by_the_same_signal_loses_nothing(tmp_path):
    """`python run.py | tee log` and Ctrl-C: tee is gone before the workers have saved."""
    launcher = launch(tmp_path, "stops")
    worker_of(launcher, tmp_path)
    launcher.stdout.close()
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(30) == 75
    assert json.loads(next(tmp_path.glob(f"sft-*/{stop.NOTE}")).read_text())["step"] == 7


def _until(launcher: subprocess.Popen, words: str) -> str:
    """What the launcher prints, up to the line that holds these words."""
    for line in launcher.stdout:
        if words in line:
            return line
    return ""


def test_a_killed_launcher_leaves_no_worker_behind(tmp_path):
    launcher = launch(tmp_path, "hangs")
    worker = worker_of(launcher, tmp_path)
    launcher.kill()
    assert is_gone(worker)
    launcher.wait()


def test_a_sweep_ends_with_the_job_that_was_stopped(tmp_path):
    launcher = launch(tmp_path, "stops", "seed=1,2", "-m")
    worker_of(launcher, tmp_path)
    launcher.send_signal(signal.SIGTERM)
    printed = launcher.communicate(timeout=30)[0]
    assert launcher.returncode == 75, printed
    assert len(list(tmp_path.glob("sft-*"))) == 1 and "Sweep of 2 jobs, 1 not started, 1 stopped" in printed and "failed" not in printed


def test_the_time_limit_stops_a_worker_that_asks(tmp_path):
    launcher = launch(tmp_path, "stops", "time_limit=0.07")
    printed = launcher.communicate(timeout=30)[0]
    assert launcher.returncode == 75 and "stopped by the time limit at step 7 of 9" in printed


@pytest.mark.parametrize("how, code", [("hangs", 1), ("saves_and_hangs", 75)])
def test_the_time_limit_ends_a_worker_that_does_not_ask(how, code, tmp_path):
    """75 only where something was saved: a script that repeats what ends with it would otherwise do so for ever."""
    launcher = launch(tmp_path, how, "time_limit=0.07")
    worker = worker_of(launcher, tmp_path)
    printed = launcher.communicate(timeout=30)[0]
    assert launcher.returncode == code and "before a checkpoint could be saved" in printed
    assert ("Type a longer time_limit" in printed) == (code == 1)
    assert is_gone(worker)


def test_no_stage_starts_when_no_time_is_left_or_a_signal_came():
    stop._launcher.deadline = time.time() + 1000
    stop.check("reward")
    stop._launcher.deadline = time.time() + 20
    stop.STARTED, before = time.time() - 1000, stop.STARTED
    try:
        with pytest.raises(
            UserError, match=r"the time limit was reached before stage reward, and nothing was saved.* Type a longer time_limit"
        ):
            stop.check("reward")
        stop._launcher.progressed = True
        with pytest.raises(stop.Stopped, match="the time limit before stage reward"):
            stop.check("reward")
    finally:
        stop.STARTED = before
    stop._launcher.deadline, stop._launcher.number = None, signal.SIGTERM
    with pytest.raises(stop.Stopped, match="SIGTERM before stage reward"):
        stop.check("reward")


def test_a_step_that_crashed_is_resumed_as_often_as_allowed(tmp_path):
    launcher = launch(tmp_path, "crashes_once", "max_restarts=1")
    printed = launcher.communicate(timeout=30)[0]
    assert launcher.returncode == 0, printed
    assert printed.count("Restart ") == printed.count("a cosmic ray. Restart 1 of 1, from the newest checkpoint") == 1


def test_a_step_is_not_resumed_without_leave(tmp_path):
    launcher = launch(tmp_path, "crashes_once")
    printed = launcher.communicate(timeout=30)[0]
    assert launcher.returncode == 1 and "Restart" not in printed and "a cosmic ray" in printed


@pytest.mark.parametrize("how, says", [("refuses", "type something else"), ("module", "lacks the Python module no_such_module")])
def test_what_would_only_happen_again_is_not_tried_again(how, says, tmp_path):
    launcher = launch(tmp_path, how, "max_restarts=5")
    printed = launcher.communicate(timeout=30)[0]
    assert launcher.returncode == 1 and says in printed and "Restart" not in printed


HOLD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from runner.durable.lock import share
share(sys.argv[2])
print(flush=True)
time.sleep(0.5)
"""


def test_a_launcher_waits_for_workers_that_an_earlier_one_left(tmp_path):
    step = plan(configured("stage=sft", f"store={tmp_path}"))[0]
    _await_orphans(step)
    orphans = [
        subprocess.Popen([sys.executable, "-c", HOLD, str(ROOT), str(step.folder / WORKERS_LOCK)], stdout=subprocess.PIPE) for _ in range(2)
    ]
    for orphan in orphans:
        orphan.stdout.readline()
    start = time.monotonic()
    _await_orphans(step)
    assert time.monotonic() - start > 0.2


# --- the real thing ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stopped_run_goes_on_where_it_stopped(tmp_path):
    words = [
        "experiment=debug",
        "debug=false",
        "stage=sft",
        "dataset.toy_rows=3000",
        "sft.max_steps=30",
        "sft.epochs=9",
        "sft.eval_every=0",
    ]
    words += ["checkpoint.every=0", f"store={tmp_path}", f"hydra.run.dir={tmp_path}/run"]
    command = [sys.executable, str(ROOT / "run.py"), *words]
    options = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "text": True}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    assert _until(run, "step 1/30")
    with next(tmp_path.glob("sft-*/logs/workers.lock")).open("w") as held, pytest.raises(BlockingIOError):
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the worker's own: torchrun would not pass the launcher's on
    run.send_signal(signal.SIGTERM)
    printed = run.communicate(timeout=100)[0]
    assert run.returncode == 75, printed
    (folder,) = tmp_path.glob("sft-*")
    stopped = json.loads((folder / stop.NOTE).read_text())
    assert f"stopped by SIGTERM at step {stopped['step']} of 30" in printed and 1 <= stopped["step"] < 30
    assert (folder / "checkpoints" / f"step_{stopped['step']}").exists()
    again = subprocess.run(command, capture_output=True, timeout=100, **options)
    assert again.returncode == 0, again.stderr
    assert f"resumed at step {stopped['step']} of 30" in again.stdout
    steps = [row["step"] for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "train/loss" in row]
    assert steps == list(range(1, 31))
