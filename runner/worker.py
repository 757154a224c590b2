"""What every rank runs: `python -m runner.worker <step folder>`, started by runner/launch.py, through torchrun or directly."""

import json
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from runner.checks.secrets import redact
from runner.durable.lock import share
from runner.errors import UserError
from runner.files import write_text
from runner.watch import heartbeat, stop

WORKERS_LOCK = "logs/workers.lock"
ENVIRONMENT = "environment.json"
# Environment variable: the launcher's process id, where it runs on this machine
LAUNCHER_PID = "RLHF_RUNNER_PID"


def main(folder: Path) -> None:
    # Without the process that started us, nobody could see or stop us
    stop.die_with_parent(signal.SIGKILL, os.getppid())
    if LAUNCHER_PID in os.environ:
        os.kill(int(os.environ[LAUNCHER_PID]), 0)  # raises if the launcher died before torchrun asked the kernel for that signal
    inherit(folder)
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        # Rank 0's lines go to the launcher; the others each have a file
        log = os.open(folder / "logs" / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
    stop.watch(folder)
    share(folder / WORKERS_LOCK)
    heartbeat.start(folder, rank)
    try:
        work(folder)
    except BaseException as error:
        report(folder, rank, error)
        if not isinstance(error, Exception):
            raise
        print(redact(traceback.format_exc()), file=sys.stderr, flush=True)  # Python itself would print secrets too
        sys.exit(1)


def inherit(folder: Path) -> None:
    """Restore what ssh lost of the launcher's environment. Must come before torch reads its number of threads."""
    if (file := folder / ENVIRONMENT).exists():
        for name, value in json.loads(file.read_text()).items():
            os.environ.setdefault(name, value)


def work(folder: Path) -> None:
    """Join the other ranks, run the stage, mark the step as done."""
    import torch
    import torch.distributed as dist

    from runner import engine, ranks
    from runner.config.loading import load
    from runner.metrics import RunLog
    from runner.stages import dpo, ppo, reward, sft
    from runner.stages.build import Inputs

    cfg = load(folder / "config.yaml")
    inputs = Inputs(folder=folder, **json.loads((folder / "step.json").read_text()))
    if cfg.hardware.accelerator == "cpu":
        engine.skip_cpu_op_builds()
    if cfg.hardware.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True, warn_only=True)  # warn: cumsum has no deterministic kernel
    device = ranks.start(cfg.hardware.accelerator, cfg.hardware.timeout_minutes)
    check_ranks(cfg.hardware, ranks.world())
    check_precision(cfg.hardware)
    torch.manual_seed(cfg.seed + ranks.rank())
    log = RunLog(cfg, inputs.stage, folder, inputs.parents, device)
    try:
        {"sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo}[inputs.stage].train(cfg, inputs, log, device)
    except stop.Stopped as stopped:
        log.close()
        leave(folder, stop.NOTE, json.dumps({"reason": str(stopped), **heartbeat.status}))
    else:
        leave(folder, "DONE", time.strftime("%Y-%m-%d %H:%M:%S\n"))
    dist.destroy_process_group()


def check_ranks(hardware, started: int) -> None:
    """Refuse another number of ranks than was planned: fewer would train on smaller batches, under the same key."""
    if started != hardware.world_size:
        raise UserError(
            f"hardware.launch started {started} rank{'s' * (started > 1)} instead of hardware.nodes={hardware.nodes} x "
            f"hardware.gpus={hardware.gpus} = {hardware.world_size}. Pick a preset that starts that many (cpu2, dgx8, gpu64, slurm), or "
            "change hardware.launch so that it does"
        )


def check_precision(hardware) -> None:
    """Refuse bf16 on a GPU that lacks it: torch would emulate it, many times slower. In a worker, as only those may open the GPU."""
    import torch

    wanted = hardware.accelerator == "cuda" and hardware.precision == "bf16"
    if wanted and not torch.cuda.is_bf16_supported(including_emulation=False):
        card = torch.cuda.get_device_name()
        raise UserError(f"hardware.precision=bf16: {card} has no bf16, and emulating it is many times slower. Type hardware.precision=fp16")


def leave(folder: Path, name: str, text: str) -> None:
    """Once all ranks are here, rank 0 writes the file that tells the launcher how the stage ended: an exit code cannot. Collective."""
    from runner import ranks

    ranks.barrier()
    if ranks.rank() == 0:
        write_text(folder / name, text)


def report(folder: Path, rank: int, error: BaseException) -> None:
    """Leave a note for the launcher: what went wrong on this rank, and where. runner/faults.py reads it."""
    note = {
        "rank": rank,
        "time": time.time(),
        "user": isinstance(error, UserError),
        "kind": type(error).__name__,
        "message": redact(str(error)),
        "traceback": redact(traceback.format_exc()),
        "memory": gpu_memory(error),
        **{name: heartbeat.status[name] for name in ("phase", "step")},
    }
    with suppress(OSError):  # a full disk: the log's last lines, which the launcher keeps, must do
        (folder / "logs" / f"error_rank{rank}.json").write_text(json.dumps(note))


def gpu_memory(error: BaseException) -> dict | None:
    """GB of this rank's GPU, if the error is that it is full."""
    if type(error).__name__ != "OutOfMemoryError":
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return {"allocated": torch.cuda.memory_allocated() / 1e9, "free": free / 1e9, "total": total / 1e9}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # All is written. Taking the process apart costs seconds, and a thread of gloo's sometimes aborts it
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)
