"""What this machine may lack for a run, checked by the launcher before it reads models and data.

GPUs, packages, values that only DeepSpeed can judge, the API key of W&B, and the Hugging Face hub.
"""

import logging
import os
import socket
import sys
import threading
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from runner.checks.paths import is_local
from runner.config.schema import Config
from runner.data.sources import sources_of
from runner.deepspeed_config import engine_configs
from runner.errors import UserError
from runner.launch_command import missing_hostfile, over_ssh
from runner.plan import Step
from runner.wandb_login import has_wandb_key, wandb_server


def preflight(cfg: Config, steps: list[Step]) -> None:
    """Raise UserError for the first thing that is missing. Without network, go offline."""
    _check_devices(cfg)
    _check_packages(cfg)
    _check_deepspeed(cfg, [step for step in steps if not step.done])
    _check_wandb(cfg)
    _go_offline_without_network(cfg, steps)
    _check_hub_token(cfg)


def _check_devices(cfg: Config) -> None:
    """Check that this machine has enough GPUs. A job of several nodes may be started from a machine without any."""
    h = cfg.hardware
    if problem := missing_hostfile(cfg):
        raise UserError(problem)
    if h.accelerator != "cuda" or h.nodes > 1:
        return
    import torch

    found = torch.cuda.device_count()
    if found < h.gpus:
        instead = f"hardware.gpus={found}" if found else "hardware=cpu"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "CUDA_VISIBLE_DEVICES is not set" if visible is None else f"CUDA_VISIBLE_DEVICES={visible}"
        raise UserError(
            f"hardware={h.name} needs {h.gpus} GPU{'s' * (h.gpus > 1)}, this machine has {found} ({hidden}). "
            f"Type {instead}, or dry_run=true to see the plan only"
        )


def _check_packages(cfg: Config) -> None:
    """Packages that only some settings need."""
    if cfg.model.attention == "flash_attention_2" and find_spec("flash_attn") is None:
        raise UserError(
            "model.attention=flash_attention_2 needs the package flash-attn, which is not installed: type model.attention=auto, "
            "which needs no package, or pip install flash-attn --no-build-isolation"
        )


def _check_deepspeed(cfg: Config, steps: list[Step]) -> None:
    """Values in hardware.deepspeed, whose types DeepSpeed alone knows. It takes seconds to import: not for the configs that are ours."""
    if not cfg.hardware.deepspeed:
        return
    logging.disable(logging.WARNING)  # it would say that it has found no accelerator
    from runner.engine import check_settings

    logging.disable(logging.NOTSET)
    for step in steps:
        for config in engine_configs(cfg, step.stage).values():
            check_settings(config)


def _check_wandb(cfg: Config) -> None:
    """wandb.mode=online needs a key and a network. The worker would only find out after everything is tokenised, and after 90 s."""
    if cfg.wandb.mode not in ("online", "auto"):
        return
    server = wandb_server()
    if cfg.wandb.mode == "auto":
        if has_wandb_key() and os.environ.get("WANDB_MODE") not in ("offline", "disabled") and not answers(server):
            print(f"{server} cannot be reached: W&B runs are kept offline (upload later with `wandb sync`)", file=sys.stderr)
            os.environ["WANDB_MODE"] = "offline"  # for the workers
        return
    if over_ssh(cfg.hardware) and not has_wandb_key(in_file=True):
        raise UserError(
            "wandb.mode=online, but there is no API key in ~/.netrc, and WANDB_API_KEY does not reach workers that "
            f"hardware={cfg.hardware.name} starts over ssh: type `wandb login` once. Without a key: wandb.mode=offline or disabled"
        )
    if not has_wandb_key():
        raise UserError(
            "wandb.mode=online, but there is no API key: set WANDB_API_KEY, or type `wandb login` once. "
            "Without one: wandb.mode=offline (upload later with `wandb sync`) or wandb.mode=disabled"
        )
    if not answers(server):
        raise UserError(f"wandb.mode=online, but {server} cannot be reached: type wandb.mode=offline (upload later with `wandb sync`)")


def _check_hub_token(cfg: Config) -> None:
    """Over ssh the workers do not inherit HF_TOKEN, which gated models need. Runs after we may have gone offline: it imports the hub."""
    if not over_ssh(cfg.hardware) or not os.environ.get("HF_TOKEN") or os.environ.get("HF_HUB_OFFLINE") == "1":
        return
    from huggingface_hub.constants import HF_TOKEN_PATH

    if not Path(HF_TOKEN_PATH).exists():
        raise UserError(
            f"HF_TOKEN does not reach workers that hardware={cfg.hardware.name} starts over ssh: type `hf auth login` once, which keeps "
            f"the token in {HF_TOKEN_PATH}; or name folders that all machines see; or unset HF_TOKEN, if no model is gated"
        )


# --- network ----------------------------------------------------------------------------------------------------------


def _go_offline_without_network(cfg: Config, steps: list[Step]) -> None:
    """Probe the hub once, quickly: its client would retry each look-up for a minute. Must run before the client is imported."""
    by_stage = {step.stage: step for step in steps}
    names = [s.path for s in sources_of(cfg.dataset).values() if s.adapter != "toy"]
    names += cfg.dataset.pretrain if "ppo" in by_stage and cfg.ppo.ptx_coef else []
    for stage, part in (("sft", cfg.model.actor), ("reward", cfg.model.reward)):
        if stage in by_stage:  # also of a step that is done: later ones read the tokenizer of what it started from
            source = by_stage[stage].pinned or part.path
            names += [source] if source else []
    needed = [name for name in names if not is_local(name)]
    if not needed:
        if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            return  # another job of this process may need the hub
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    elif "HF_HUB_OFFLINE" not in os.environ and not hub_answers():
        print(f"the Hugging Face hub cannot be reached: looking for {', '.join(needed)} in the local cache only", file=sys.stderr)
        os.environ["HF_HUB_OFFLINE"] = "1"


def hub_answers() -> bool:
    """Whether the Hugging Face hub, or its mirror, can be reached."""
    return answers(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))


def answers(address: str, seconds: float = 3.0) -> bool:
    """Whether a connection to a server, or to the proxy that leads there, can be opened."""
    url = urlsplit(address)
    proxy = None if proxy_bypass(url.hostname) else getproxies().get(url.scheme)
    if proxy:
        url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    answered = threading.Event()

    def probe() -> None:
        with suppress(OSError, TypeError):
            socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=seconds).close()
            answered.set()

    # In a thread, because DNS look-ups have no time limit
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()
