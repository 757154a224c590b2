"""Two fp16 engines, ZeRO 0 to 3, with and without an offloaded optimizer; the second one's loss is infinite, then it is not.

Prints 'both skipped' if the first keeps its weights as long as the second does. tests/test_engine.py runs it on the CPU.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import deepspeed
import torch

from runner import engine, ranks

KINDS = [(0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True)]  # ZeRO stage, offload
FP16 = {"enabled": True, "hysteresis": 1}


def check(stage: int, offload: bool, device: torch.device) -> None:
    """Spoil the second engine's steps alone; assert that both skip these, that both take the others, and that both scales fell."""
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "fp16": FP16}
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "zero_optimization": {"stage": stage}}
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    engines = []
    for _ in range(2):
        model = torch.nn.Linear(8, 1, bias=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        engines.append(deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0])
    for spoiled in (True, False, True, False):
        before, scales = [weights(e) for e in engines], [e.optimizer.loss_scale for e in engines]
        for one, scale in zip(engines, (1.0, torch.inf if spoiled else 1.0), strict=True):
            one.backward((one(torch.ones(1, 8, device=device, dtype=torch.float16)).float() * scale).sum() * 1e-3)
        engine.align_overflow(*engines)
        for one in engines:
            engine.step(one)
        moved = [not torch.equal(b, weights(e)) for b, e in zip(before, engines, strict=True)]
        fell = [e.optimizer.loss_scale < scale for e, scale in zip(engines, scales, strict=True)]
        assert moved == [not spoiled] * 2 and fell == [spoiled] * 2, (stage, offload, spoiled, moved, fell)


def weights(one) -> torch.Tensor:
    with deepspeed.zero.GatheredParameters(list(one.module.parameters())):
        return next(iter(one.module.parameters())).detach().clone()


if __name__ == "__main__":
    started = ranks.start("cuda")
    for kind in KINDS:
        check(*kind, started)
    print("both skipped")
