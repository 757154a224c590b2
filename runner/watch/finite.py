"""The guard against NaN, which stages call after each optimizer step, before anything is logged or saved."""

import json
import math
from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path

from runner.config.schema import ENGINES, PARTS, Config, rate_key
from runner.errors import UserError


def check_finite(cfg: Config, folder: Path, stage: str, step: int, loss: float, norm: float, rows: Iterable[dict], tokenizer) -> None:
    """Raise UserError on a loss or gradient norm that is not finite. Call it after an optimizer step, before anything is saved.

    All ranks must pass the same loss and norm. rows: of the whole batch, read only if it is bad; see `numbered`.
    They are written to <folder>/bad_batch_step_<step>.jsonl, every list of ids with its text.
    """
    # In fp16 an infinite norm alone is an overflow: DeepSpeed skipped the update and lowers the loss scale
    if math.isfinite(loss) and (math.isfinite(norm) or cfg.hardware.precision == "fp16"):
        return
    path = folder / f"bad_batch_step_{step}.jsonl"
    _save_batch(path, rows, tokenizer)
    raise UserError(
        f"step {step} gave loss {loss:g} and gradient norm {norm:g}, and training stops here; its batch is in {path}. "
        f"Lower the learning rate ({lower_rate(cfg, stage)}) or lengthen {stage}.warmup; or look at the batch for a broken row"
    )


def numbered(rows, numbers) -> Iterable[dict]:
    """Rows of a data set with their numbers, without empty slots. Lazy: nothing is read until asked for."""
    return ({"row": int(n), **rows[int(n)]} for n in numbers if n >= 0)


def _save_batch(path: Path, rows: Iterable[dict], tokenizer) -> None:
    from runner import ranks  # not at the top: the launcher, which reads this file too, has no torch

    if ranks.rank() != 0:
        return
    with path.open("w") as file:
        for row in rows:
            plain = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()}
            texts = {name.removesuffix("ids") + "text": tokenizer.decode(ids) for name, ids in plain.items() if name.endswith("ids")}
            file.write(json.dumps(plain | texts, ensure_ascii=False) + "\n")


def lower_rate(cfg: Config, stage: str) -> str:
    """Overrides that halve the learning rate; the adapters' where only they train."""
    keys = []
    for engine in ENGINES[stage]:
        if getattr(cfg.model, PARTS[engine]).lora.dim:
            keys.append(f"model.{PARTS[engine]}.lora.lr")
        if engine == "critic" or not cfg.model.actor.adapters_only:  # a scalar head always trains in full
            keys.append(rate_key(stage, engine))
    return " ".join(f"{key}={attrgetter(key)(cfg) / 2:g}" for key in keys)
