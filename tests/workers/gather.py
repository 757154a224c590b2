"""One of two ranks that gather a rollout: `python gather.py <folder> <rank>`, started by tests/test_rollout.py. It imports torch alone."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from runner.rollout.record import Rollout

PAD = 0
PROMPTS, ANSWERS = [3, 1, 2, 5, 4, 1], [2, 4, 1, 1, 3, 6]


def numbered(rows: list[int]) -> Rollout:
    """Rows whose lengths are those of PROMPTS and ANSWERS, and whose every cell holds the number of the row, from 1."""
    widths, lengths = torch.tensor(PROMPTS)[rows], torch.tensor(ANSWERS)[rows]
    number = torch.tensor(rows).unsqueeze(1) + 1
    left = torch.arange(int(widths.max())) >= (widths.max() - widths).unsqueeze(1)
    right = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    rollout = Rollout(number * left, widths, number * right, lengths, ended=torch.tensor(rows) % 3 == 0)
    rollout.logprobs, rollout.scores = -0.5 * number * right, number.squeeze(1) * 0.25
    rollout.sampled_logprobs = -0.75 * number * right
    return rollout


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    everything = numbered([rank, rank + 2, rank + 4]).gather(PAD, torch.device("cpu"))
    torch.save({name: value for name, value in vars(everything).items() if value is not None}, folder / f"gathered_{rank}.pt")
    dist.destroy_process_group()
