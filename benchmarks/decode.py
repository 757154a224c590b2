"""Decoding with runner/rollout/graph.py: four families at 1.3 B shape, batch 1 to 512, 256 prompt and 256 response tokens.

    python benchmarks/decode.py --out rows.jsonl
    python benchmarks/decode.py --family opt --batch 64 128
    python benchmarks/decode.py --tiny

Random weights, EOS disabled. ms/token is what a further step costs: the difference between a run to the full length and one to a
quarter of it, so that neither the capture of graphs nor the prefill is in it; `rollout_ms_per_token` has both. MBU is of the bytes that
must be read (weights once a step, cache once a row) against the data sheet and against the copy rate measured in this run.
"""

from functools import partial

import torch
from common import NEVER, SHAPES, Tokenizer, configure, emit, free, inputs, options, peak_gb, rates, start, timed, tokens

from runner import flops
from runner.engine import DTYPES
from runner.rollout import graph
from runner.rollout.families import network_of, side_by_side
from runner.rollout.sampling import uniforms
from runner.rollout.stats import Stats
from runner.stages import build

BATCHES = (64, 1, 16, 128, 256, 512)


def main() -> None:
    args = options(
        __doc__,
        lambda p: p.add_argument("--family", nargs="+", default=list(SHAPES), choices=list(SHAPES)),
        lambda p: p.add_argument("--batch", nargs="+", type=int, default=list(BATCHES)),
    )
    length, batches = (16, args.batch[:1] if args.batch != list(BATCHES) else [2]) if args.tiny else (256, args.batch)
    print(f"copy {rates()['copy'] / 1e12:.3g} TB/s, measured", flush=True)
    for family in args.family:
        cfg = configure(args.tiny, *args.words, family=family)
        device = start()
        with inputs(cfg, device) as step:
            options_of_the_part = build._options(cfg, cfg.model.actor, step.base, 0.0)
            model = build.load_causal(step.base, Tokenizer(), **options_of_the_part).to(device).eval().requires_grad_(False)
        side_by_side(model)
        for batch in batches:
            measure(family, model, batch, length, cfg, args.out)
        del model
        free()


def measure(family: str, model, batch: int, length: int, cfg, out) -> None:
    network = network_of(model)
    prompts = tokens([length] * batch, 0, cfg.model.actor.shape["vocab_size"])
    make = partial(graph.Decoder, network, (1.0, 0, 1.0), prompts, slots=batch, pad=Tokenizer.pad_token_id, eos=NEVER)

    def run(tokens_each: int) -> Stats:
        decoder = make(uniforms(0, list(range(batch)), tokens_each))
        decoder.run()
        return decoder.stats

    free()
    run(min(16, length))  # compiles kernels
    quarter, _ = timed(run, length // 4)
    free()  # a longer cache does not fit into what a shorter one leaves
    whole, elapsed = timed(run, length)
    steps, spent = whole.steps - quarter.steps, whole.decode_seconds - quarter.decode_seconds
    read = flops.decode_bytes(flops.matrix_sizes(model), steps, whole.cached - quarter.cached, DTYPES[cfg.hardware.precision].itemsize)
    row = {"benchmark": "decode", "family": family, "batch": batch, "ms_per_token": 1e3 * spent / steps}
    row |= {"rollout_ms_per_token": 1e3 * elapsed / length, "prefill_s": whole.prefill_seconds, "tokens_per_s": batch * steps / spent}
    if cfg.hardware.bandwidth_gb_s:
        row["mbu"] = flops.mbu(read, spent, cfg.hardware.bandwidth_gb_s)
    row |= {"of_copy": read / spent / rates()["copy"], "peak_gb": peak_gb(), "copy_tb_s": rates()["copy"] / 1e12}
    emit(row, out)


if __name__ == "__main__":
    with torch.no_grad():
        main()
