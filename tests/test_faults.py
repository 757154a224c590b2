"""Every way in which a worker can end has its paragraph. What this machine can provoke is provoked; the rest is what the libraries say."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import configured

from runner import faults, launch, worker
from runner.errors import UserError
from runner.plan import plan
from runner.watch import finite, heartbeat, machine, stop

ROOT = Path(__file__).parents[1]
WORKER = ROOT / "tests" / "workers" / "worker.py"


@pytest.fixture(autouse=True)
def handlers():
    """launch() listens for signals; afterwards this process does what it did before."""
    before = {number: signal.getsignal(number) for number in stop.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def made(store: Path, stage: str = "sft", *overrides: str):
    """(configuration, last step) with a folder as a worker would leave it."""
    cfg = configured(f"stage={stage}", f"store={store}", *overrides)
    step = plan(cfg)[-1]
    (step.folder / "logs").mkdir(parents=True)
    return cfg, step


def ended(cfg, step, code=1, lines=(), oom_kills=0) -> faults.Fault:
    return faults.explain(faults.Crash(cfg, step, code, list(lines), oom_kills))


def note(step, message: str, kind="RuntimeError", rank=0, at=1.0, traceback="", **facts) -> None:
    text = {"rank": rank, "time": at, "user": False, "kind": kind, "message": message, "memory": None, "phase": "train", "step": 7}
    text["traceback"] = traceback or f"Traceback\n  File x\n{kind}: {message}"
    (step.folder / "logs" / f"error_rank{rank}.json").write_text(json.dumps(text | facts))


def beat(folder: Path, rank: int, at: float, **facts) -> None:
    text = {"rank": rank, "phase": "train", "step": 7, "total": 9, "time": at, "where": heartbeat.WAITING}
    (folder / "logs" / f"rank_{rank}.alive").write_text(json.dumps(text | facts))


# --- what the libraries say -------------------------------------------------------------------------------------------

SAID = {
    "loss scale": (
        ("Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.", "Exception"),
        ["infinite gradients at every loss scale of fp16", "hardware.precision=bf16", "sft.lr=0.0002"],
        True,
    ),
    "no headers for Triton": (
        ("Command '['/usr/bin/gcc', '/tmp/tmpx/cuda_utils.c', '-O3', '-lcuda']' returned non-zero exit status 1.", "CalledProcessError"),
        ["could not compile Triton's kernels", "python3-dev"],
        True,
    ),
    "hub, offline": (
        ("Cannot reach https://huggingface.co/x: offline mode is enabled.", "OfflineModeIsEnabled"),
        ["could not reach the Hugging Face hub", "HTTPS_PROXY", "HF_ENDPOINT", "HF_HUB_OFFLINE=1"],
        False,
    ),
    "hub, no network": (
        ("We couldn't connect to 'https://huggingface.co' to load the files", "OSError"),
        ["could not reach the Hugging Face hub"],
        False,
    ),
    "disk full": (("[Errno 28] No space left on device: '/x'", "OSError"), ["the disk is full", " are free at ", "store="], True),
    "anything": (("boo\nhoo", "ValueError"), ["in phase train after step 7, failed: ValueError: boo. ", "ValueError: boo\n  hoo"], False),
}


@pytest.mark.parametrize("said, expected, repeats", SAID.values(), ids=SAID)
def test_what_a_worker_says_is_understood(said, expected, repeats, tmp_path):
    cfg, step = made(tmp_path)
    note(step, *said)
    fault = ended(cfg, step)
    assert fault.repeats is repeats
    for words in (*expected, "Full logs: ", "There is no checkpoint yet"):
        assert words in fault.text


def checkpoint(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


def test_a_paragraph_says_what_survives_and_shows_three_lines_or_all(tmp_path):
    cfg, step = made(tmp_path)
    for name in ("step_2", "step_12", "step_14.tmp"):
        checkpoint(step.folder / "checkpoints" / name)
    (step.folder / "checkpoints" / "step_13").mkdir()  # cut short: no manifest
    note(step, "boo", traceback="Traceback (most recent call last):\n  one\n  two\n  three\nRuntimeError: boo")
    text = ended(cfg, step).text
    assert "The checkpoint of step 12 is intact" in text
    assert "three" in text and "  one" not in text
    assert "Traceback (most recent call last)" in ended(replace(cfg, debug=True), step).text


OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"
GPU = {"allocated": 70.12, "free": 0.31, "total": 79.2}
ONE, EIGHT = "hardware=a6000", "hardware=dgx8"
SCORED = 'File "runner/rollout/collect.py", line 80, in score\n'
BY_SIX = ("ppo.rollout_batch=384", "ppo.minibatches=1", "hardware.micro_batch.ppo=6")
OFFLOAD = "hardware.offload.optimizer=true"
LORA = ("model.actor.lora.dim=8", "model.reward.lora.dim=8")
ZERO2 = ("hardware.zero.actor=2", "hardware.zero.critic=2")
FROZEN = "hardware.offload.ref=true hardware.offload.reward=true"
SPREAD = "hardware.zero.reward=3"  # the last of dgx8 that is not
LESS = [
    ("sft", "train", "", (ONE,), "hardware.micro_batch.sft=2 (now 4)"),
    ("sft", "train", "", (ONE, "hardware.micro_batch.sft=1"), f"hardware.zero.actor=2 hardware.zero.critic=2 {OFFLOAD}"),
    ("sft", "", "", (EIGHT,), OFFLOAD),  # and no word of a reward model
    ("dpo", "reference", "", (ONE, "stage=dpo"), "hardware.micro_batch.dpo=1 (now 2)"),
    ("dpo", "", "", (ONE, "stage=dpo", OFFLOAD, *ZERO2), "hardware.zero.ref=3 hardware.offload.ref=true: "),
    ("dpo", "", "", (ONE, "stage=dpo", OFFLOAD, *ZERO2, LORA[0]), "hardware.zero.actor=3 hardware.offload.params=true"),
    ("reward", "train", "", (ONE, "hardware.micro_batch.reward=1"), "hardware.gradient_checkpointing.critic=true"),
    ("reward", "", "", (EIGHT, OFFLOAD), "model.reward.lora.dim=16"),
    ("reward", "", "", (EIGHT, OFFLOAD, "model.reward.lora.dim=8"), "hardware= with more or larger GPUs"),
    ("ppo", "update", "", (EIGHT, *BY_SIX), "hardware.micro_batch.ppo=3 (now 6)"),
    ("ppo", "rollout", "", (ONE,), "hardware.micro_batch.rollout=16 (now 32)"),
    ("ppo", "scoring", SCORED, (ONE,), "hardware.micro_batch.score=8 (now 16)"),
    ("ppo", "eval", SCORED, (ONE,), "hardware.micro_batch.score=8 (now 16)"),
    ("ppo", "", "", (EIGHT, "hardware.zero.actor=2"), f"hardware.zero.actor=3 {SPREAD}: "),
    ("ppo", "", "", (EIGHT, SPREAD), OFFLOAD),
    ("ppo", "", "", (EIGHT, SPREAD, OFFLOAD), FROZEN),
    ("ppo", "", "", (EIGHT, SPREAD, OFFLOAD, *FROZEN.split()), "model.actor.lora.dim=16 model.reward.lora.dim=16"),
    ("ppo", "", "", (EIGHT, SPREAD, OFFLOAD, *FROZEN.split(), *LORA), "hardware.offload.params=true"),
]


@pytest.mark.parametrize("stage, phase, traceback, overrides, expected", LESS)
def test_a_full_gpu_names_phase_numbers_and_the_next_value(stage, phase, traceback, overrides, expected, tmp_path):
    cfg, step = made(tmp_path, stage, "model=opt125m", "dataset=toy", *overrides)
    note(step, OUT_OF_MEMORY, "OutOfMemoryError", traceback=traceback, phase=phase, memory=GPU)
    fault = ended(cfg, step)
    assert expected in fault.text and fault.repeats
    assert "asked for 2.00 GiB (70.1 GB allocated by us, 0.3 GB free of 79.2 GB)" in fault.text
    words = re.split(r" \(now|:", expected)[0].split() if "= " not in expected else []  # and it can be typed
    assert plan(configured(f"stage={stage}", "model=opt125m", "dataset=toy", *overrides, *words))


def test_want_of_memory_is_told_from_a_signal_that_somebody_sent(tmp_path):
    cfg, step = made(tmp_path)
    full, sent, unknown = (ended(cfg, step, -9, oom_kills=kills) for kills in (2, 0, None))
    assert "was killed (-9) by the kernel because CPU memory ran out (2 such kills meanwhile, limit " in full.text and full.repeats
    assert "was killed (-9). Somebody sent the signal" in sent.text and not sent.repeats
    assert "was killed (-9). Most likely by the kernel" in unknown.text


@pytest.mark.parametrize("code, says", [(127, "the launch command is not there: it begins with srun"), (126, "cannot be run")])
def test_a_launch_command_that_cannot_be_started_is_named(code, says, tmp_path):
    cfg, step = made(tmp_path, "sft", "hardware.launch='srun {folder}'")
    fault = ended(cfg, step, code, ["bash: line 1: exec: srun: not found"])
    assert says in fault.text and fault.repeats


def test_fewer_ranks_than_planned_are_refused():
    """One process on a plan for two would train on half the batch, under the key of the whole."""
    hardware = configured("hardware.gpus=2", "hardware.micro_batch.sft=16", "stage=sft").hardware
    worker.check_ranks(hardware, 2)
    with pytest.raises(UserError, match=r"started 1 rank instead of hardware\.nodes=1 x hardware\.gpus=2 = 2"):
        worker.check_ranks(hardware, 1)


@pytest.mark.parametrize(
    ("code", "says"),
    [(135, "died of a bus error (-7)"), (249, "died of a bus error (-7)"), (-7, "died of a bus error (-7)"), (255, "exit code 255")],
    ids=["shell", "DeepSpeed's launcher", "subprocess", "ssh"],
)
def test_exit_codes_of_launchers_are_understood(code, says, tmp_path):
    assert says in ended(*made(tmp_path), code=code).text


def test_the_log_of_another_rank_holds_no_secret(tmp_path):
    """Python would print the message of an exception as it is."""
    token = "hf_" + "Ab1" * 9
    (tmp_path / "logs").mkdir()
    code = (
        "from pathlib import Path; from runner import worker\n"
        f"def work(folder): raise OSError('401 for https://x:{token}@hub')\n"
        f"worker.work = work; worker.main(Path({str(tmp_path)!r}))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"RANK": "1", "WORLD_SIZE": "2"}, check=False)
    log = (tmp_path / "logs" / "rank_1.log").read_text()
    assert ended.returncode == 1 and "OSError: 401" in log and token not in log


# --- several ranks ----------------------------------------------------------------------------------------------------

RESET = "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:5546: Connection reset by peer"
TORCHRUN = """E1124 10:13:12.1 13569 torch/distributed/elastic/multiprocessing/api.py:874] failed (exitcode: -9) local_rank: 1
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
Root Cause (first observed failure):
[0]:
  time      : 2026-11-24_10:13:12
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 13588)
  error_file: <N/A>""".splitlines()


def test_the_first_rank_to_fail_is_blamed_not_its_victims(tmp_path):
    cfg, step = made(tmp_path, "sft", "hardware=cpu2")
    note(step, RESET, rank=0, at=1.0)
    beat(step.folder, 1, 0.5, phase="checkpoint")
    (step.folder / "logs" / "rank_1.log").write_text("rank 1's own words\n")
    killed = ended(cfg, step, 1, ["[sft] step 7/9", *TORCHRUN]).text
    assert "rank 1, last seen in phase checkpoint after step 7 or later, was killed (-9)" in killed and "rank 1's own words" in killed

    assert "rank 1, " in ended(cfg, step, 1).text  # under a launcher that does not say who: the one that is silent
    note(step, "a cosmic ray", rank=1, at=2.0)  # later, but a cause of its own
    assert "rank 1, in phase train after step 7, failed: RuntimeError: a cosmic ray" in ended(cfg, step, 1).text


WAITED = "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete"
NCCL = "[rank0]: Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3, OpType=ALLREDUCE) ran for 1800017 milliseconds"
LATE = {
    "silent": ({"at": 40.0}, "in phase train after step 7, waiting for other ranks, its last sign of life 60 s before the others'"),
    "elsewhere": (
        {"at": 100.2, "where": "runner/data/cache.py:12 (load)"},
        "in phase train after step 7, at runner/data/cache.py:12 (load)",
    ),
    "at work for long after the others gave up": (
        {"at": 106.0, "where": "runner/data/cache.py:12 (load)"},
        "in phase train after step 7, at runner/data/cache.py:12 (load)",
    ),
    "behind": ({"at": 100.2, "step": 6, "phase": "rollout"}, "in phase rollout after step 6"),
}


@pytest.mark.parametrize("facts, expected", LATE.values(), ids=LATE)
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_the_late_rank_is_named(backend, facts, expected, tmp_path):
    cfg, step = made(tmp_path, "sft", "hardware=cpu2", "hardware.gpus=4", "hardware.micro_batch.sft=8")
    for rank in (1, 3):
        beat(step.folder, rank, max(100.0, facts["at"]))
    beat(step.folder, 0, 100.0)  # the first to give up
    beat(step.folder, 2, **facts)
    if backend == "gloo":
        note(step, WAITED, rank=0)
        fault = ended(cfg, step)
    else:  # NCCL's watchdog aborts the process
        fault = ended(cfg, step, 1, [NCCL, *(line.replace("-9", "-6").replace("rank      : 1", "rank      : 0") for line in TORCHRUN)])
    assert f"hardware.timeout_minutes=30; rank 2 is late, {expected}" in fault.text and not fault.repeats


@pytest.mark.parametrize("comes_too_late", [False, True])
@pytest.mark.parametrize("last", [{"at": 94.0}, {"at": 100.0, "where": "runner/worker.py:79 (report)"}], ids=["gone", "failing"])
def test_a_rank_that_waited_in_vain_is_not_the_late_one(last, comes_too_late, tmp_path):
    """Its last heartbeat is from before it failed, minutes ago, or from while it failed; the one that hangs shows signs of life.

    The late one may come to the collective after all, and find the others gone.
    """
    cfg, step = made(tmp_path, "sft", "hardware=cpu2")
    beat(step.folder, 0, **last)
    beat(step.folder, 1, 100.0, where="runner/data/cache.py:12 (load)")
    note(step, WAITED, rank=0)
    if comes_too_late:
        note(step, RESET, rank=1, at=9.0)
    assert "rank 1 is late, in phase train after step 7, at runner/data/cache.py:12 (load)." in ended(cfg, step).text


# --- provoked ---------------------------------------------------------------------------------------------------------


def provoke(store: Path, how: str, *overrides: str) -> str:
    """The paragraph of a worker without a model that ends in this way."""
    cfg = configured("stage=sft", f"store={store}", *overrides)
    several = "-m torch.distributed.run --standalone --nproc-per-node=2 " if cfg.hardware.gpus > 1 else ""
    cfg.hardware.launch = f"{{python}} {several}{WORKER} {{folder}} {how}"
    with pytest.raises(UserError) as caught:
        launch.launch(cfg, plan(cfg)[0], {}, store / "run")
    return str(caught.value)


ENDS = {
    "kill": "was killed (-9)",
    "bus": "died of a bus error (-7); /dev/shm has ",
    "module": "lacks the Python module no_such_module. Type ",
    "memory": "was refused CPU memory (the machine allows ",
}


@pytest.mark.parametrize("how, expected", ENDS.items(), ids=ENDS)
def test_a_worker_that_ends_is_explained(how, expected, tmp_path):
    text = provoke(tmp_path, how)
    assert expected in text
    if how in ("kill", "bus"):
        assert "Its last lines:\n  [sft] step 7/9  loss 1.234\n" in text


@pytest.mark.slow
def test_a_dead_rank_ends_the_others_soon_and_is_the_one_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    start = time.monotonic()
    text = provoke(tmp_path, "rank_1_dies", "hardware=cpu2")
    assert "rank 1, last seen in phase train after step 7 or later, was killed (-9)" in text
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_others_in_time_and_is_the_one_that_is_named(tmp_path, monkeypatch):
    """In a group as DeepSpeed makes its own: they would wait for 30 minutes, NCCL's for 10."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "rank 1 is late, in phase train after step 7" in provoke(tmp_path, "rank_1_is_late", "hardware=cpu2")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_named_whoever_stumbles_over_it(small_disk):
    import torch

    cfg, step = made(small_disk)
    checkpoint(step.folder / "checkpoints" / "step_3")
    with pytest.raises((OSError, RuntimeError)) as caught:
        torch.save(torch.zeros(10**6), step.folder / "weights.pt")
    with pytest.raises(OSError):
        (step.folder / "more").write_bytes(bytes(10**6))
    worker.report(step.folder, 0, caught.value)  # finds no room for its note, and must not fail for that
    text = ended(cfg, step, 1, [f"RuntimeError: {caught.value}"]).text
    assert f"the disk is full: 0 GB of 0.00105 GB are free at {step.folder}" in text
    assert "The checkpoint of step 3 is intact" in text

    with pytest.raises(UserError, match=r"the disk is full: .* Delete old steps"), machine.naming_full_disks(str(small_disk)):
        (small_disk / "data").write_bytes(bytes(10**6))


EAT = """
import os, sys
sys.path.insert(0, sys.argv[1])
from runner.watch.machine import oom_kills, memory_limit
with open(sys.argv[2] + "/cgroup.procs", "w") as file:
    file.write(str(os.getpid()))
before = oom_kills()
child = os.fork()
if not child:
    bytearray(b"x" * 10**9)
_, status = os.waitpid(child, 0)
print(os.WTERMSIG(status), oom_kills() - before, memory_limit())
"""


def test_the_kernels_kills_are_counted_in_a_real_control_group():
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    group = (v1 if v1.exists() else v2) / f"runner-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if v1.exists() else "memory.max")).write_text(str(200 * 2**20))
        swap = group / "memory.swap.max"
        swap.exists() and swap.write_text("0")
    except OSError:
        if group.exists():
            group.rmdir()
        pytest.skip("may not make a control group here")
    try:
        done = subprocess.run([sys.executable, "-c", EAT, str(ROOT), str(group)], capture_output=True, text=True, timeout=60)
        number, kills, limit = map(int, done.stdout.split())
    finally:
        group.rmdir()
    assert number == signal.SIGKILL
    assert kills == 1
    assert limit == 200 * 2**20


# --- not a number -----------------------------------------------------------------------------------------------------


class Words:
    def decode(self, ids) -> str:
        return " ".join(f"w{i}" for i in ids)


ROWS = [{"chosen_ids": [1, 2], "rejected_ids": [3], "source": "toy"}, {"chosen_ids": [4], "rejected_ids": [5], "source": "toy"}]


@pytest.mark.parametrize("loss, norm", [(float("nan"), 1.0), (float("inf"), 1.0), (0.5, float("nan")), (0.5, float("inf"))])
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_batch(loss, norm, tmp_path):
    cfg = configured()
    with pytest.raises(UserError, match=r"step 12 gave loss .*reward\.lr=0\.0001"):
        finite.check_finite(cfg, tmp_path, "reward", 12, loss, norm, finite.numbered(ROWS, [1, -1, 0]), Words())
    saved = [json.loads(line) for line in (tmp_path / "bad_batch_step_12.jsonl").read_text().splitlines()]
    assert [row["row"] for row in saved] == [1, 0]
    assert saved[1]["chosen_ids"] == [1, 2] and saved[1]["chosen_text"] == "w1 w2" and saved[1]["rejected_text"] == "w3"


@pytest.mark.parametrize(
    ("allotted", "quota", "expected"),
    [({0, 5, 9}, None, 3), ({0}, "max 100000", 1), (set(range(64)), "400000 100000", 4), ({0, 1}, "800000 100000", 2), ({0}, "5 100", 1)],
)
def test_cores_are_those_that_we_may_use(allotted, quota, expected, tmp_path, monkeypatch):
    """Of a shared node SLURM allots some, and a container has a quota."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allotted)
    file = tmp_path / "cpu.max"
    if quota:
        file.write_text(quota)
    monkeypatch.setattr(machine, "_cgroup_files", lambda name: [tmp_path / name])
    assert machine.cores() == expected
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert launch._environment(configured("hardware=cpu2"))["OMP_NUM_THREADS"] == str(max(1, expected // 2))


def test_threads_that_wait_leave_the_cores_to_other_runs(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    assert launch.inherited(launch._environment(configured()))["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")  # what the user asks for, GOMP_SPINCOUNT would overrule
    assert "GOMP_SPINCOUNT" not in launch._environment(configured())


def test_finite_numbers_pass_and_so_does_an_overflow_of_fp16(tmp_path):
    finite.check_finite(configured(), tmp_path, "sft", 1, 0.5, 1.0, (), None)
    fp16 = configured("hardware=v100")
    finite.check_finite(fp16, tmp_path, "sft", 1, 0.5, float("inf"), (), None)
    with pytest.raises(UserError):
        finite.check_finite(fp16, tmp_path, "sft", 1, float("nan"), 1.0, (), None)


def test_the_rate_to_lower_is_one_that_is_read():
    assert finite.lower_rate(configured("ppo.actor_lr=4e-3", "ppo.critic_lr=2e-3"), "ppo") == "ppo.actor_lr=0.0004 ppo.critic_lr=0.0002"
    cfg = configured("model.actor.lora.dim=4", "model.reward.lora.dim=4", "reward.lr=2e-3")
    assert finite.lower_rate(cfg, "sft") == "sft.lora_lr=2e-05"
    assert finite.lower_rate(cfg, "reward") == "reward.lora_lr=2e-05 reward.lr=0.0002"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_weights_that_became_nan_are_never_saved(stage, tmp_path, alone):
    """The whole stage, in this process: an enormous learning rate spoils the weights in the first step."""
    from runner.metrics import RunLog
    from runner.prepare import prepare
    from runner.stages import reward, sft
    from runner.stages.build import Inputs

    words = ["experiment=debug", f"stage={stage}", f"store={tmp_path}", "dataset.toy_rows=2000", "model.max_response_tokens=16"]
    cfg = configured(*words, f"{stage}.lr=1e25", f"{stage}.warmup=0", f"{stage}.max_steps=9", f"{stage}.eval_every=0")
    step = plan(cfg)[0]
    inputs = Inputs(folder=step.folder, stage=stage, key=step.key, parents={}, **prepare(cfg, [step])[stage])
    step.folder.mkdir()
    with pytest.raises(UserError, match=r"gave loss (nan|inf)|gradient norm (nan|inf)"):
        {"sft": sft, "reward": reward}[stage].train(cfg, inputs, RunLog(cfg, stage, step.folder, {}, alone), alone)
    (batch,) = step.folder.glob("bad_batch_step_*.jsonl")
    bad = int(batch.stem.rpartition("_")[2])
    assert len(batch.read_text().splitlines()) == getattr(cfg, stage).global_batch
    assert not (step.folder / "checkpoints" / f"step_{bad}").exists() and not (step.folder / "model").exists()
    shutil.rmtree(tmp_path)


def test_workers_on_other_machines_inherit_what_is_harmless(tmp_path, monkeypatch):
    """Over ssh a worker starts with the environment of a login; secrets are in no file."""
    secrets = {"HF_TOKEN": "hf_" + "a1B2" * 8, "WANDB_API_KEY": "0123456789" * 4, "HTTPS_PROXY": "http://ann:pears12@proxy:3128"}
    plain = {"HF_HUB_OFFLINE": "1", "HF_HOME": "/shared/hf", "TOKENIZERS_PARALLELISM": "false", "WANDB_BASE_URL": "https://wandb.here"}
    for name, value in (secrets | plain | {"OMP_NUM_THREADS": "3", "EDITOR": "vi", "RANK": "5"}).items():
        monkeypatch.setenv(name, value)
    cfg, step = made(tmp_path)
    launch._write_inputs(cfg, step, {})
    text = (step.folder / worker.ENVIRONMENT).read_text()
    assert not any(value in text for value in secrets.values())
    found = json.loads(text)
    assert (plain | {"OMP_NUM_THREADS": "3"}).items() <= found.items() and not {"EDITOR", "RANK", "PATH"} & found.keys()
    monkeypatch.setattr(os, "environ", {"HF_HOME": "/of/this/machine"})
    worker.inherit(step.folder)
    assert os.environ["HF_HUB_OFFLINE"] == "1" and os.environ["OMP_NUM_THREADS"] == "3" and os.environ["HF_HOME"] == "/of/this/machine"
