"""Two fp16 engines, ZeRO 0, 2 and 3; the second one's loss is infinite. Prints 'both skipped' if the first keeps its weights."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import deepspeed
import torch

from runner import engine, ranks


def main() -> None:
    device = ranks.start("cuda")
    for stage in (0, 2, 3):
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "fp16": {"enabled": True},
            "zero_allow_untested_optimizer": True,
        }
        config["zero_optimization"] = {"stage": stage}
        engines = []
        for _ in range(2):
            model = torch.nn.Linear(8, 1, bias=False)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            engines.append(deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0])
        for spoiled in (True, False):
            before = [weights(e) for e in engines]
            for one, scale in zip(engines, (1.0, torch.inf if spoiled else 1.0), strict=True):
                one.backward((one(torch.ones(1, 8, device=device, dtype=torch.float16)).float() * scale).sum() * 1e-3)
            engine.align_overflow(*engines)
            for one in engines:
                engine.step(one)
            moved = [not torch.equal(b, weights(e)) for b, e in zip(before, engines, strict=True)]
            assert moved == ([False, False] if spoiled else [True, True]), (stage, spoiled, moved)
    print("both skipped")


def weights(one) -> torch.Tensor:
    with deepspeed.zero.GatheredParameters(list(one.module.parameters())):
        return next(iter(one.module.parameters())).detach().clone()


if __name__ == "__main__":
    main()
