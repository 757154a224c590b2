"""How the actor answers held-out prompts before, during and after PPO, always with the same random numbers."""

import json

import numpy as np
import torch

from runner import ranks
from runner.config.schema import Config
from runner.data import toy
from runner.metrics import RunLog
from runner.models.tokenizer import decode_response
from runner.rollout.collect import Models, RolloutSettings, collect
from runner.rollout.record import Rollout
from runner.stages import invariants

# Held-out prompts have random numbers of their own, far from those of training
EVAL_EPISODE = 2**40


class HeldOut:
    """Samples and scores responses to held-out prompts. The random numbers never change, so any difference comes from the actor.

    The prompts have one fixed order: a smaller evaluation is the start of a larger one, for any number of ranks.
    """

    def __init__(self, cfg: Config, held, tokenizer, models: Models, settings: RolloutSettings, log: RunLog):
        self.cfg, self.held, self.tokenizer, self.models, self.settings, self.log = cfg, held, tokenizer, models, settings, log
        self.order = np.random.default_rng(0).permutation(len(held))
        self.judged = any(source.adapter == "toy" for source in cfg.dataset.sources.values())

    def sample(self, done: int, count: int, with_values: bool = False) -> Rollout:
        """Scored responses to the first `count` prompts (all, if there are fewer), in order. Collective."""
        rows = self.order[:count]
        # Every rank needs the same number of prompts: pad with repeated ones, whose answers are dropped
        asked = np.resize(rows, -(-len(rows) // ranks.world()) * ranks.world())
        prompts, episodes = self.held.select(asked)["input_ids"], [EVAL_EPISODE + int(row) for row in asked]
        with self.log.phase("eval"):
            rollout = collect(self.models, self.settings, list(prompts), self.cfg.seed, episodes, with_values=with_values)
        rollout = rollout.first(len(rows))
        invariants.check(self.log, f"the evaluation after {done} iterations", invariants.of_rollout(self.cfg, self.settings, rollout))
        return rollout

    def evaluate(self, done: int, state, rollout: Rollout) -> tuple[dict, list[dict]]:
        """Means over the responses, which are also logged, and one row per prompt. state: has the scale of the scores."""
        scores = (rollout.scores - state.score_mean) / state.score_std
        responses = [
            decode_response(self.tokenizer, ids[:n]) for ids, n in zip(rollout.responses.tolist(), rollout.lengths.tolist(), strict=True)
        ]
        judged = [toy.judge(r) for r in responses] if self.judged else [None] * len(responses)
        facts = {
            "score": float(scores.mean()),
            "score_se": standard_error(scores),
            "kl": float(((rollout.logprobs - rollout.ref_logprobs) * rollout.mask).sum(1).mean()),
            "length": float(rollout.lengths.float().mean()),
            "truncated_rate": 1 - float(rollout.finished.float().mean()),
            "judge": float(np.mean(judged)) if self.judged else None,
            "judge_se": standard_error(torch.tensor(judged)) if self.judged else None,
        }
        judge = f"  judge {facts['judge']:+.3f}" if self.judged else ""
        headline = f"held-out score {facts['score']:+z.2f}  kl {facts['kl']:z.2f}  length {facts['length']:.0f}{judge}"
        metrics = {f"eval/{k}": v for k, v in facts.items() if v is not None}
        self.log.record(done, metrics | {"episode": done * self.cfg.ppo.rollout_batch}, headline)
        asked = [prompt_of(turns) for turns in self.held.select(self.order[: len(rollout)])["turns"]]
        rows = zip(asked, responses, scores.tolist(), judged, strict=True)
        return facts, [prompt | {"response": r, "score": s, "judge": j} for prompt, r, s, j in rows]

    def ask_again(self, done: int, state) -> tuple[dict, list[dict]]:
        """`evaluate` on the prompts that the SFT actor was asked, even if a resumed run has other ppo.eval_prompts. Collective."""
        return self.evaluate(done, state, self.sample(done, len(state.sft_rows)))


def standard_error(values: torch.Tensor) -> float:
    """Of the mean of (N,) values; 0 for a single one."""
    return float(values.std()) / len(values) ** 0.5 if len(values) > 1 else 0.0


def prompt_of(turns: str) -> dict[str, str]:
    """The last turn of a dialogue, and the earlier ones as JSON: text that W&B can show, and that whoever rescores a sample can read."""
    *earlier, last = json.loads(turns)
    return {"prompt": last["content"], "earlier": json.dumps(earlier, ensure_ascii=False)}


def paired(before: list[dict], after: list[dict]) -> list[dict]:
    """SFT's and PPO's response to every held-out prompt that both were asked: resume=force may have brought other data."""
    return [
        {
            "prompt": new["prompt"],
            "earlier": new["earlier"],
            "sft": old["response"],
            "ppo": new["response"],
            "sft_score": old["score"],
            "ppo_score": new["score"],
            "sft_judge": old["judge"],
            "ppo_judge": new["judge"],
        }
        for old, new in zip(before, after, strict=False)
        if (old["prompt"], old["earlier"]) == (new["prompt"], new["earlier"])
    ]
