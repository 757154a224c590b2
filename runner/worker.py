"""What every rank runs: `python -m runner.worker <step folder>`, started by runner/launch.py through torchrun or alone."""

import json
import os
import sys
import time
import traceback
from pathlib import Path


def main(folder: Path) -> None:
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        # Rank 0's lines go to the launcher; the others each have a file
        log = os.open(folder / "logs" / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
    try:
        work(folder)
    except BaseException as error:
        report(folder, rank, error)
        raise


def work(folder: Path) -> None:
    """Join the other ranks, run the stage, mark the step as done."""
    import torch
    import torch.distributed as dist

    from runner import engine, ranks
    from runner.config import load
    from runner.metrics import RunLog
    from runner.stages import ppo, reward, sft
    from runner.stages.build import Inputs

    cfg = load(folder / "config.yaml")
    inputs = Inputs(folder=folder, **json.loads((folder / "step.json").read_text()))
    if cfg.hardware.accelerator == "cpu":
        engine.skip_cpu_op_builds()
    device = ranks.start(cfg.hardware.accelerator)
    torch.manual_seed(cfg.seed + ranks.rank())
    log = RunLog(cfg, inputs.stage, folder, inputs.parents, device)
    {"sft": sft, "reward": reward, "ppo": ppo}[inputs.stage].train(cfg, inputs, log, device)
    dist.barrier()
    if ranks.rank() == 0:
        (folder / "DONE").write_text(time.strftime("%Y-%m-%d %H:%M:%S\n"))
    dist.destroy_process_group()


def report(folder: Path, rank: int, error: BaseException) -> None:
    """Leave a note for the launcher: what went wrong here, in words if we have them."""
    from runner.errors import UserError

    message = str(error) if isinstance(error, UserError) else out_of_memory(error) or f"{type(error).__name__}: {error}"
    known = isinstance(error, UserError) or bool(out_of_memory(error))
    note = {"rank": rank, "time": time.time(), "user": known, "message": message, "traceback": traceback.format_exc()}
    (folder / "logs" / f"error_rank{rank}.json").write_text(json.dumps(note))


def out_of_memory(error: BaseException) -> str | None:
    if type(error).__name__ != "OutOfMemoryError":
        return None
    return (
        f"the GPU is out of memory ({str(error).splitlines()[0]}). Lower hardware.micro_batch (sft, reward, ppo, rollout or score: the "
        "phase is in the traceback), raise hardware.zero.actor to 3, set hardware.gradient_checkpointing.actor=true, or train adapters "
        "with model.actor.lora.dim=16"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
