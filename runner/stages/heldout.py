"""How an actor answers held-out prompts, before, during and after PPO: always with the same random numbers."""

import json

import numpy as np

from runner import ranks
from runner.config import Config
from runner.data import toy
from runner.data.batches import subset
from runner.metrics import RunLog
from runner.rollout.collect import Models, Reader, collect
from runner.stages import invariants
from runner.tokenizer import decode_response

# Held-out prompts have random numbers of their own, far from those of training
EVAL_EPISODE = 2**40


class Evaluator:
    """Samples and scores responses to held-out prompts. The random numbers never change: differences are the actor's."""

    def __init__(self, cfg: Config, held, tokenizer, models: Models, reader: Reader, log: RunLog):
        self.cfg, self.tokenizer, self.models, self.reader, self.log = cfg, tokenizer, models, reader, log
        count = min(cfg.ppo.eval_prompts, len(held))
        # Every rank answers equally many; with fewer prompts than ranks, some are asked twice
        count = max(count // ranks.world(), 1) * ranks.world()
        picked = np.resize(subset(len(held), count), count)
        chosen = held.select(picked)
        self.prompts = chosen["input_ids"]
        self.turns = [json.loads(text) for text in chosen["turns"]]
        self.judged = any(source.adapter == "toy" for source in cfg.dataset.sources.values())

    def __call__(self, done: int, state, calibrate: bool = False) -> tuple[dict, list[dict]]:
        """Returns mean facts, and one row per prompt. calibrate: scores and values are measured by these responses. Collective."""
        with self.log.phase("eval"):
            episodes = [EVAL_EPISODE + n for n in range(len(self.prompts))]
            rollout = collect(self.models, self.reader, list(self.prompts), self.cfg.seed, episodes, with_values=calibrate)
        invariants.check(self.log, f"the evaluation after {done} iterations", invariants.of_rollout(self.cfg, self.reader, rollout))
        if calibrate:
            state.calibrate(rollout, self.cfg.ppo.normalize_scores)
        scores = (rollout.scores - state.score_mean) / state.score_std
        responses = [
            decode_response(self.tokenizer, ids[:n]) for ids, n in zip(rollout.responses.tolist(), rollout.lengths.tolist(), strict=True)
        ]
        judged = [toy.judge(r) for r in responses] if self.judged else [None] * len(responses)
        facts = {
            "score": float(scores.mean()),
            "score_se": float(scores.std()) / len(scores) ** 0.5 if len(scores) > 1 else 0.0,
            "kl": float(((rollout.logprobs - rollout.ref_logprobs) * rollout.mask).sum(1).mean()),
            "length": float(rollout.lengths.float().mean()),
            "truncated_rate": 1 - float(rollout.finished.float().mean()),
            "judge": float(np.mean(judged)) if self.judged else None,
        }
        judge = f"  judge {facts['judge']:+.3f}" if self.judged else ""
        headline = f"held-out score {facts['score']:+z.2f}  kl {facts['kl']:z.2f}  length {facts['length']:.0f}{judge}"
        metrics = {f"eval/{k}": v for k, v in facts.items() if v is not None}
        self.log.record(done, metrics | {"episode": done * self.cfg.ppo.rollout_batch}, headline)
        asked = [t[-1]["content"] for t in self.turns]
        rows = zip(asked, responses, scores.tolist(), judged, strict=True)
        return facts, [{"prompt": p, "response": r, "score": s, "judge": j} for p, r, s, j in rows]


def paired(before: list[dict], after: list[dict]) -> list[dict]:
    """SFT's response beside PPO's, for every held-out prompt."""
    return [
        {
            "prompt": old["prompt"],
            "sft": old["response"],
            "ppo": new["response"],
            "sft_score": old["score"],
            "ppo_score": new["score"],
            "sft_judge": old["judge"],
            "ppo_judge": new["judge"],
        }
        for old, new in zip(before, after, strict=True)
    ]
