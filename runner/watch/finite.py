"""The guard against NaN, which stages call after each optimizer step, before anything is logged or saved."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

from runner import ranks
from runner.config.rates import lower_rate
from runner.config.schema import Config
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
    if ranks.rank() != 0:
        return
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            plain = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()}
            texts = {name.removesuffix("ids") + "text": tokenizer.decode(ids) for name, ids in plain.items() if name.endswith("ids")}
            file.write(json.dumps(plain | texts, ensure_ascii=False) + "\n")
