"""What a stage makes of its data, said before it trains: what was dropped, and how many steps there are to learn in."""

import math
import sys
from collections import Counter

from runner.batch_sizes import batches_per_epoch, steps_of
from runner.config.schema import Config, Ppo
from runner.errors import UserError
from runner.schedules import KL_STEP

# Say so if the KL coefficient cannot change by this share of itself
NOTICED = 0.5
# Warn of fewer PPO iterations than this
FEW_ITERATIONS = 5
# Warn when more than this share of the rows is too long, and say how long responses may be so that at most the other one is
MANY_DROPPED, FEW_DROPPED = 0.1, 0.05


def check_amounts(cfg: Config, stage: str, counts: dict) -> None:
    """Refuse PPO with too few prompts for one iteration, or whose actor would never train; warn if there is little to learn from.

    counts: of the tokenised data (runner/data/cache.py).
    """
    train, block = counts["train"], getattr(cfg, stage)
    _warn_of_dropped(cfg.model.max_response_tokens, stage, counts)
    _note_of_marks(stage, counts)
    if stage == "sft" and counts.get("earlier") and not cfg.dataset.every_answer:
        print(f"note: {counts['earlier']} answers before the last one of their dialogue are not trained on: dataset.every_answer=true does")
    if stage == cfg.stage and stage in ("sft", "reward"):
        _note_of_split(stage, counts)
    ppo = block if stage == "ppo" else None
    per_epoch = batches_per_epoch(train, ppo.rollout_batch if ppo else block.global_batch, drop_last=bool(ppo))
    if not per_epoch:
        fits = train - train % ppo.minibatches
        typed = f"ppo.rollout_batch={fits or train}" + (f" ppo.minibatches={train}" if not fits else "")
        raise UserError(
            f"there are {train} prompts for PPO, fewer than ppo.rollout_batch={ppo.rollout_batch}: lower it, for example {typed}, "
            "or provide more data"
        )
    if ppo:
        _warn_of_few(ppo, train, per_epoch)
    elif train < block.global_batch:
        print(f"note: {stage} has {train} rows, fewer than {stage}.global_batch={block.global_batch}: every step takes all of them")
    total, whole = (steps_of(per_epoch, block.epochs, most) for most in (block.max_steps, None))
    if block.max_steps and block.max_steps > whole:
        more = f"type {stage}.epochs={math.ceil(block.max_steps / per_epoch)} for as many"
        print(f"note: {stage}.max_steps={block.max_steps} is more than the {whole} steps of {stage}.epochs={block.epochs:g}: {more}")
    if ppo and ppo.critic_warmup >= total:
        raise UserError(
            f"ppo.critic_warmup={ppo.critic_warmup} trains only the critic in all of the {total} iterations, and the actor in none: "
            f"type ppo.critic_warmup={total // 10}, or run more iterations"
        )
    if ppo and ppo.kl_target is not None:
        _note_of_kl_target(ppo, total)
    if block.lr_schedule == "constant" and block.warmup:
        print(f"note: {stage}.warmup={block.warmup:g} has no effect: type {stage}.lr_schedule=constant_with_warmup, or {stage}.warmup=0")
    elif block.warmup > max(1, total):
        print(
            f"warning: {stage} has {total} step{'s' * (total > 1)}, in which a warmup of {block.warmup:g} steps ({stage}.warmup) only "
            f"reaches {total / block.warmup:.2g} of the learning rate. Type {stage}.warmup=0.03 for a share of the run",
            file=sys.stderr,
        )


def _warn_of_dropped(limit: int, stage: str, counts: dict) -> None:
    """Warn where the length limit costs much of the data: other programs would have cut the responses, which then never end."""
    needed = sorted((int(length), n) for length, n in counts.get("needed", {}).items())
    dropped = sum(n for _, n in needed)
    rows = counts["train"] + counts.get("eval", 0) + dropped
    if dropped <= MANY_DROPPED * rows:
        return
    left = {length: sum(n for longer, n in needed if longer > length) for length, _ in needed}
    length = next(length for length, n in left.items() if n <= FEW_DROPPED * rows)
    print(
        f"warning: {stage} drops {dropped} of {rows} rows, whose responses are longer than model.max_response_tokens={limit}. "
        f"With {length} it drops {left[length]}",
        file=sys.stderr,
    )


def _note_of_marks(stage: str, counts: dict) -> None:
    """Say what was taken out of texts, and what looks as if a chat template had been applied to them before."""
    special, foreign = (Counter(counts.get(name, {})) for name in ("special", "foreign"))
    if special:
        tokens = ", ".join(token for token, _ in special.most_common(3))
        print(
            f"note: special tokens ({tokens}) were taken out of the texts of {special.total()} rows of {stage}: they would end a response"
        )
    if foreign.total() > FEW_DROPPED * (counts["train"] + counts.get("eval", 0)):
        mark = foreign.most_common(1)[0][0]
        print(
            f"warning: {foreign.total()} rows of {stage} hold {mark}, as if another chat template had been applied to them: "
            "model.chat_template would be a second one. Give the dialogues as lists of messages, or their plain texts",
            file=sys.stderr,
        )


def _note_of_split(stage: str, counts: dict) -> None:
    """Where one stage is trained alone, say what the others get: rows that only they can use, and prompts that the split keeps for them."""
    elsewhere = Counter(counts.get("elsewhere", {}))
    kept = {other: n for other, n in sorted(elsewhere.items(), reverse=True) if n}  # SFT before PPO
    single = counts.get("owned", {}).get("sft", 0) - elsewhere["sft"] if stage == "reward" else 0
    if single:
        print(f"note: {single} rows have no `rejected`: only SFT can use them")
    if kept:
        alone = ", ".join(f"{share}: {int(share == stage)}" for share in ("sft", "reward", "ppo"))
        print(
            f"note: dataset.split keeps the prompts of {sum(kept.values())} comparisons for {' and '.join(kept)}. If nothing else is to be "
            f"trained on them, dataset.split='{{{alone}}}' gives {stage} all"
        )


def _note_of_kl_target(ppo: Ppo, iterations: int) -> None:
    """Say so if the controller of the KL coefficient is too slow for this run: it moves by a fifth per ppo.kl_horizon responses."""
    responses = iterations * ppo.rollout_batch
    most = math.exp(KL_STEP * responses / ppo.kl_horizon) - 1
    if most < NOTICED:
        print(
            f"note: ppo.kl_target moves ppo.kl_coef by {most:.2g} times its value at most in the {responses:,} responses of this run: "
            f"type a smaller ppo.kl_horizon than {ppo.kl_horizon:g}, for example {max(responses // 10, ppo.rollout_batch)}"
        )


def _warn_of_few(ppo: Ppo, train: int, per_epoch: int) -> None:
    iterations = steps_of(per_epoch, ppo.epochs, None)
    if iterations < FEW_ITERATIONS and (ppo.max_steps is None or ppo.max_steps > iterations):
        print(
            f"warning: {train} prompts make {iterations} iteration{'s' * (iterations > 1)} of PPO, too few to learn from. "
            f"Type ppo.epochs={math.ceil(FEW_ITERATIONS / per_epoch)} or more, a smaller ppo.rollout_batch, or provide more data",
            file=sys.stderr,
        )
