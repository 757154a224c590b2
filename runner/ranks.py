"""Which of the processes am I, and the few collectives they share."""

import os
import socket
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

_new_group = dist.new_group


def start(accelerator: str, timeout_minutes: float = 30) -> torch.device:
    """Join the process group and return this rank's device. Works under torchrun, deepspeed, srun + torchrun, or alone.

    timeout_minutes: how long a rank waits for the others in a collective before it raises (gloo) or aborts (NCCL).
    """
    os.environ.setdefault("LOCAL_RANK", "0")
    cuda = accelerator == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # Gloo as well as NCCL: a few Python objects travel over the CPU
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    # DeepSpeed makes groups of its own without a timeout; torch would give them NCCL's 10 minutes
    dist.new_group = partial(_new_group, timeout=timeout)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout, **_meeting_here(timeout))
    else:
        # Alone: a store in memory needs no port, which another process could hold
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def _meeting_here(timeout: timedelta) -> dict:
    """The store through which ranks of one machine meet, at 127.0.0.1, when the launcher opened none (conf/hardware).

    A store that PyTorch opens by itself listens on all interfaces and trusts whoever connects.
    """
    alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    if not alone or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "False":
        return {}
    if any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    rank, world, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    listening = {}
    if rank == 0:
        server = socket.create_server(("127.0.0.1", port), backlog=1024)
        listening = {"is_master": True, "master_listen_fd": server.detach()}
    store = dist.TCPStore("127.0.0.1", port, world, timeout=timeout, **listening)
    return {"store": store, "rank": rank, "world_size": world}


def rank() -> int:
    """0 without a process group, as in runner.chat."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(values: dict[str, float | torch.Tensor], device: torch.device) -> dict[str, float]:
    """Sum each entry over all ranks, in one transfer. Collective."""
    packed = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device).detach() for v in values.values()])
    dist.all_reduce(packed)
    return dict(zip(values, packed.tolist(), strict=True))


def all_gather(value) -> list:
    """A Python object of each rank, in rank order, on all ranks. Collective."""
    out = [None] * world()
    dist.all_gather_object(out, value)
    return out


def from_rank0(make):
    """What `make()` returns on rank 0, on all ranks. Collective."""
    return all_gather(make() if rank() == 0 else None)[0]


def all_true(flag: bool) -> bool:
    """Whether it is true on every rank. Collective, over the CPU: does not wait for the GPU."""
    least = torch.tensor(int(flag))
    if world() > 1:
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return bool(least)


def barrier() -> None:
    """Wait for all ranks, over the CPU."""
    all_true(True)
