"""Training of the reward model, at OPT-1.3B and OPT-350M: pairs of uneven length, by the runner's own path. MFU on real tokens.

    python benchmarks/reward.py --out rows.jsonl
    python benchmarks/reward.py --tiny

Each answer has 128 to 1024 tokens. Random weights and tokens; what is counted as work stands in runner/flops.py.
"""

import numpy as np
from common import Clock, Tokenizer, configure, emit, free, inputs, options, peak_gb, rates, start, tokens

from runner import engine, flops
from runner.data.batches import pair_batch
from runner.deepspeed_config import engine_configs
from runner.losses import pairwise_loss
from runner.stages.build import load_reward
from runner.stages.pairs import counted
from runner.stages.reward import last_scores


def main() -> None:
    args = options(__doc__, lambda p: p.add_argument("--rounds", type=int, default=8, help="optimizer steps after two to warm up"))
    print(f"matmul {rates()['matmul'] / 1e12:.4g} TFLOP/s, measured", flush=True)  # first: it forgets the peak of memory
    for part in ("actor",) if args.tiny else ("actor", "reward"):
        measure(part, args)


def measure(part: str, args) -> None:
    """part: the shape of the actor (1.3B) or of the reward model (350M)."""
    pairs, longest = (4, 32) if args.tiny else (32, 1024)
    cfg = configure(args.tiny, f"hardware.micro_batch.reward={pairs}", f"reward.global_batch={pairs}", *args.words)
    device, config = start(), engine_configs(cfg, "reward")["reward"]
    with inputs(cfg, device) as step:
        path = step.parents["sft" if part == "actor" else "reward"]
        wrapper = load_reward(cfg, path, Tokenizer(), config, dropout=0.0, lora=None, fresh_head=True)
    options_of_adamw = {"weight_decay": 0.0, "betas": (0.9, 0.95), "eps": 1e-8}
    model = engine.trainable(wrapper, config, lr=1e-5, lora_lr=0.0, **options_of_adamw)
    model.train()
    made = tokens(np.random.default_rng(0).integers(longest // 8, longest, 2 * pairs), 0, cfg.model.actor.shape["vocab_size"])
    rows = [{"chosen_ids": a, "rejected_ids": b} for a, b in zip(made[::2], made[1::2], strict=True)]
    sizes, clock = flops.matrix_sizes(wrapper.hf), Clock()
    for _ in range(args.rounds + 2):
        clock.rounds.append({})
        with clock.phase("data"):
            batch = pair_batch(rows, Tokenizer.pad_token_id)
        with clock.phase("train"):
            engine.backward(model, pairwise_loss(*last_scores(model, batch), 0.0), pairs, last=True)
            engine.step(model)
    phases, facts = clock.median(skip=2), counted([batch], wrapper.packed, sizes)
    row = {"benchmark": "reward", "shape": "1.3B" if part == "actor" else "350M", "tokens": int(facts["tokens"]), "pairs": pairs, **phases}
    row |= {
        "tokens_per_s": facts["tokens"] / sum(phases.values()),
        "mfu": flops.mfu(facts["flops"], sum(phases.values()), cfg.hardware.tflops),
    }
    row |= {
        "of_matmul": facts["flops"] / phases["train"] / rates()["matmul"],
        "peak_gb": peak_gb(),
        "matmul_tflops": rates()["matmul"] / 1e12,
    }
    emit(row, args.out)
    del model, wrapper
    free()


if __name__ == "__main__":
    main()
