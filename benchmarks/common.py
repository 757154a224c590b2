"""What the benchmarks share: models of real shapes with random weights, made on the device without a disk; clocks; rows.

Models and engines are the runner's own (runner.stages). Every row is printed and written when it is known, so that a time limit
costs what is missing and nothing else.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from transformers import AutoConfig

from runner import engine, ranks
from runner.config.loading import load
from runner.config.schema import Config, ModelPart
from runner.stages import build
from runner.stages.build import Inputs

ROOT = Path(__file__).parent.parent
# Part of a GPU's name -> its preset
PRESETS = {"H200": "h200", "H100": "h100", "A100-SXM4-80": "a100_80g", "A100-SXM4-40": "a100_40g", "A6000": "a6000", "V100": "v100"}
# The four families at 1.3 B: as many layers of the same width
SHAPES = {
    "opt": ["model=opt1.3b"],
    "bloom": ["model=bloom1b7"],
    "llama": [
        "model=llama7b",
        *(
            f"model.{part}.shape.{key}={value}"
            for part in ("actor", "reward")
            for key, value in {
                "hidden_size": 2048,
                "intermediate_size": 5632,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "num_key_value_heads": 16,
            }.items()
        ),
    ],
    "gpt_neox": ["model=pythia1.4b"],
}
# Four queries share a key
SHAPES["llama_gqa"] = [*SHAPES["llama"], *(f"model.{part}.shape.num_key_value_heads=4" for part in ("actor", "reward"))]
TINY = {"opt": "tiny", "bloom": "tiny_bloom", "llama": "tiny_llama", "gpt_neox": "tiny_neox", "llama_gqa": "tiny_llama"}
# No token is this one: nothing ends
NEVER = -1


class Tokenizer:
    """As much of a tokenizer as building a model asks for."""

    pad_token_id, bos_token_id, eos_token_id = 1, 0, 2

    def __len__(self) -> int:
        return 3

    def get_vocab(self) -> dict[str, int]:
        """As large as any model's: every row of the embeddings is a token."""
        return {"the last": 10**6}


# --- the command line and the machine ---------------------------------------------------------------------------------


def options(doc: str, *more: Callable) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny models and batches: seconds on a CPU, to see that it works")
    parser.add_argument("--out", type=Path, help="JSON lines: each row is appended when it is known")
    for add in more:
        add(parser)
    parser.add_argument("words", nargs="*", help="overrides of the configuration, as model.actor.lora.dim=64")
    args = parser.parse_intermixed_args()
    if odd := [word for word in args.words if "=" not in word]:
        parser.error(f"{odd[0]}: an override has the form key=value")
    return args


@cache
def start() -> torch.device:
    """A process group of this process alone, on the GPU if there is one; where a test has already made one, that is the CPU's."""
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        engine.skip_cpu_op_builds()
    return torch.device("cpu") if torch.distributed.is_initialized() else ranks.start(accelerator)


def card() -> str:
    return torch.cuda.get_device_name() if start().type == "cuda" else "CPU"


def configure(tiny: bool, *words: str, family: str = "opt", model: str | None = None) -> Config:
    """The configuration of a real shape on this card, or of a tiny one; model: of a preset. Gradient checkpointing is off."""
    hardware = next((preset for name, preset in PRESETS.items() if name in card()), "cpu")
    shape = [f"model={model or TINY[family]}"] if tiny or model else SHAPES[family]
    fixed = [
        f"hardware={hardware}",
        "hardware.gradient_checkpointing.actor=false",
        "hardware.gradient_checkpointing.critic=false",
        "wandb.mode=disabled",
        # Nominal: so that the tiny runs on a CPU have all columns
        *(["hardware.tflops=0.1"] if hardware == "cpu" else []),
    ]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return load(compose("config", [*shape, *fixed, *words]))


@cache
def rates(size: int = 8192) -> dict[str, float]:
    """What this card does when asked for nothing else: copy (bytes read and written per second) and matmul (FLOP/s, bf16 or fp32)."""
    device = start()
    if device.type == "cpu":
        size //= 16
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    source = torch.empty(4 * size * size, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    copy = min(seconds(repeat, target.copy_, source) for _ in range(5))
    multiply = min(seconds(repeat, torch.mm, a, b) for _ in range(5))
    found = {"copy": 2 * source.nbytes * TIMES / copy, "matmul": 2 * size**3 * TIMES / multiply}
    del a, b, source, target
    free()
    return found


# Operations in one timing: a single one is shorter than the clock's error
TIMES = 10


def repeat(what: Callable, *args) -> None:
    for _ in range(TIMES):
        what(*args)


def seconds(what: Callable, *args, **kwargs) -> float:
    """Wall-clock time of a call, the GPU's work included."""
    synchronize()
    begun = time.perf_counter()
    what(*args, **kwargs)
    synchronize()
    return time.perf_counter() - begun


def timed(what: Callable, *args) -> tuple:
    """What a call returns, and its seconds."""
    found = []
    elapsed = seconds(lambda: found.append(what(*args)))
    return found[0], elapsed


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    """Give the memory of dropped models back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0


class Clock:
    """Seconds by phase, of several rounds."""

    def __init__(self):
        self.rounds: list[dict[str, float]] = []

    @contextmanager
    def phase(self, name: str):
        synchronize()
        begun = time.perf_counter()
        yield
        synchronize()
        self.rounds[-1][name] = self.rounds[-1].get(name, 0.0) + time.perf_counter() - begun

    def median(self, skip: int = 1) -> dict[str, float]:
        """Of the rounds after the first, which warms up."""
        kept = self.rounds[skip:]
        return {name: statistics.median(r[name] for r in kept) for name in kept[0]}


# --- models -----------------------------------------------------------------------------------------------------------


@contextmanager
def inputs(cfg: Config, device: torch.device):
    """Inputs of a stage: folders with a config and no weights, from which the runner makes random ones, here on the device itself."""
    real = build.load_causal, build.load_scalar

    def on_device(make):
        @wraps(make)
        def there(*args, **kwargs):
            with torch.device(device):
                return make(*args, **kwargs)

        return there

    build.load_causal, build.load_scalar = map(on_device, real)
    try:
        with tempfile.TemporaryDirectory() as folder:
            places = {
                name: shape(cfg, part, Path(folder) / name) for name, part in (("sft", cfg.model.actor), ("reward", cfg.model.reward))
            }
            yield Inputs(Path(folder), "ppo", "", places, "", places["sft"], "", None)
    finally:
        build.load_causal, build.load_scalar = real


def shape(cfg: Config, part: ModelPart, folder: Path) -> str:
    AutoConfig.for_model(cfg.model.family, **part.shape).save_pretrained(folder)
    return str(folder)


def tokens(lengths, seed: int, vocabulary: int) -> list[list[int]]:
    """Random token lists, free of special tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(len(Tokenizer()), vocabulary, n).tolist() for n in lengths]


# --- rows -------------------------------------------------------------------------------------------------------------


def emit(row: dict, out: Path | None) -> None:
    """Print a row without its details, and append it to the file with what makes it comparable."""
    print("  ".join(f"{name} {shown(value)}" for name, value in row.items() if not name.startswith("floor_")), flush=True)
    if out:
        facts = {"card": card(), "torch": torch.__version__, "time": time.strftime("%Y-%m-%d %H:%M"), "commit": commit()}
        with out.open("a") as file:
            file.write(json.dumps(row | facts) + "\n")


def shown(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def commit() -> str | None:
    from runner.metrics import _git_commit

    return (_git_commit() or "")[:9] or None
