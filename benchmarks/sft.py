"""Training of SFT at OPT-1.3B: 2048 tokens to a packed row, by the runner's own path. MFU on real tokens.

    python benchmarks/sft.py --out rows.jsonl
    python benchmarks/sft.py --tiny

Two kinds of rows: dialogues of uneven length (64 to 1024 tokens, two thirds of each the response) that fill 2048 tokens together, and
single rows of 2048. Random weights and tokens; what is counted as work stands in runner/flops.py.
"""

import numpy as np
from common import Clock, Tokenizer, configure, emit, free, inputs, options, peak_gb, rates, start, tokens

from runner import engine, flops
from runner.data.batches import loss_weights, sft_batch
from runner.deepspeed_config import engine_configs
from runner.device import send
from runner.losses import sft_loss
from runner.stages.build import load_actor


def main() -> None:
    args = options(__doc__, lambda p: p.add_argument("--rounds", type=int, default=8, help="optimizer steps after two to warm up"))
    print(f"matmul {rates()['matmul'] / 1e12:.4g} TFLOP/s, measured", flush=True)  # first: it forgets the peak of memory
    row_tokens, rows = (64, 2) if args.tiny else (2048, 16)
    for kind in ("dialogues", "whole"):
        lengths = dialogues(row_tokens * rows, row_tokens) if kind == "dialogues" else [row_tokens] * rows
        measure(kind, lengths, row_tokens * rows, args)


def dialogues(total: int, row: int) -> list[int]:
    """Lengths from row / 32 to row / 2 that sum to `total`."""
    rng, lengths = np.random.default_rng(0), []
    while (left := total - sum(lengths)) > 0:
        lengths.append(min(left, int(rng.integers(row // 32, row // 2))))
    return lengths


def measure(kind: str, lengths: list[int], total: int, args) -> None:
    micro = len(lengths)
    cfg = configure(args.tiny, f"hardware.micro_batch.sft={micro}", f"sft.global_batch={micro}", *args.words)
    device, config = start(), engine_configs(cfg, "sft")["actor"]
    with inputs(cfg, device) as step:
        wrapper = load_actor(cfg, step.base, Tokenizer(), config, dropout=0.0, lora=None)
    options_of_adamw = {"weight_decay": 0.0, "betas": (0.9, 0.95), "eps": 1e-8}
    actor = engine.trainable(wrapper, config, lr=1e-5, lora_lr=0.0, **options_of_adamw)
    actor.train()
    made = [
        {"input_ids": ids, "prompt_length": len(ids) // 3, "length": len(ids)}
        for ids in tokens(lengths, 0, cfg.model.actor.shape["vocab_size"])
    ]
    weight = float(loss_weights(np.array(lengths), np.array(lengths) // 3, 0.0).sum())
    sizes, clock = flops.matrix_sizes(wrapper.hf), Clock()
    for _ in range(args.rounds + 2):
        clock.rounds.append({})
        train(actor, made, weight, clock)
    phases, done = clock.median(skip=2), flops.training(sizes, lengths, weight)
    row = {"benchmark": "sft", "rows": kind, "tokens": total, "sequences": micro, **phases}
    row |= {"tokens_per_s": total / sum(phases.values()), "mfu": flops.mfu(done, sum(phases.values()), cfg.hardware.tflops)}
    row |= {"of_matmul": done / phases["train"] / rates()["matmul"], "peak_gb": peak_gb(), "matmul_tflops": rates()["matmul"] / 1e12}
    emit(row, args.out)
    del actor, wrapper
    free()


def train(actor, made: list[dict], weight: float, clock: Clock) -> None:
    """One optimizer step, in one micro batch."""
    with clock.phase("data"):
        batch = sft_batch(made, Tokenizer.pad_token_id, 0.0)
    with clock.phase("train"):
        logprobs, _ = actor(batch["ids"], batch["mask"], batch["index"], batch["targets"])
        engine.backward(actor, sft_loss(logprobs, send(batch["weights"], start())), weight, last=True)
        engine.step(actor)


if __name__ == "__main__":
    main()
