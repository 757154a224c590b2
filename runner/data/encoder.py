"""From the examples of a stage to token ids.

Prompts longer than the limit lose their beginning. Responses are never cut, because their end and EOS carry the meaning: longer ones are
dropped. Everything that is cut or dropped is counted.
"""

import json
import re
from collections.abc import Iterator
from itertools import islice

from runner.config.schema import Dataset, Model
from runner.data.dialogue import Example
from runner.data.examples import Counts, examples
from runner.data.sources import sources_of
from runner.errors import UserError
from runner.models.tokenizer import encode, encode_responses, gap, plain, render_prompt, special_in

# Lengths are counted in steps of so many tokens
ROUND = 32
# What chat templates write around turns: in a text, it shows that one has been applied already
MARKS = ("[INST]", "<<SYS>>", "<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|user|>", "### Instruction:", "### Response:")
FOREIGN = re.compile("|".join(map(re.escape, MARKS)))


class Encoder:
    """Turns batches of examples into rows of one stage."""

    def __init__(self, stage: str, tokenizer, model: Model, counts: Counts):
        self.stage, self.tokenizer, self.counts = stage, tokenizer, counts
        self.max_prompt, self.max_response = model.max_prompt_tokens, model.max_response_tokens
        self.seen: set[tuple[int, ...]] = set()

    def __call__(self, batch: list[tuple[str, Example, int]]) -> list[tuple[dict, int]]:
        """(row, prompt hash) for every example that is kept."""
        useful = [item for item in batch if not self._is_useless(item[1])]
        kept = [(*item, text) for item in useful if (text := self._rendered(item[1])) is not None]
        if not kept:
            return []
        for _, example, *_ in kept:
            self._count_marks(example)
            if example.rejected is None:  # of a pair, the earlier answers are no better than others
                self.counts.earlier += sum(turn["role"] == "assistant" for turn in example.prompt)
        names, used, numbers, texts = zip(*kept, strict=True)
        prompts = encode(self.tokenizer, list(texts))
        rows_of = {"sft": self._sft, "reward": self._reward, "ppo": self._ppo}[self.stage]
        made = zip(rows_of(used, [self._cut(ids) for ids in prompts]), prompts, names, numbers, strict=True)
        rows = [(row | {"source": name}, number, len(whole)) for row, whole, name, number in made if row is not None]
        self.counts.truncated += sum(length > self.max_prompt for *_, length in rows)
        return [(row, number) for row, number, _ in rows]

    def _is_useless(self, example: Example) -> bool:
        """Drop and count what says nothing, or twice the same, without the special tokens that are taken out of every text."""
        texts = (example.prompt[-1]["content"], example.chosen, example.rejected)
        prompt, chosen, rejected = (text and plain(self.tokenizer, text).strip() for text in texts)
        reasons = {
            "empty prompt": not prompt,
            "empty response": "" in (chosen, rejected),
            "identical pair": chosen is not None and chosen == rejected,
        }
        reason = next((name for name, true in reasons.items() if true), None)
        self.counts.dropped.update([reason] if reason else [])
        return bool(reason)

    def _count_marks(self, example: Example) -> None:
        """Count a row with a special token, or with another chat template's mark, by the first one."""
        text = "\n".join([*(turn["content"] for turn in example.prompt), example.chosen or "", example.rejected or ""])
        if token := special_in(self.tokenizer, text):
            self.counts.special[token] += 1
        elif mark := FOREIGN.search(text):
            self.counts.foreign[mark.group()] += 1

    def _rendered(self, example: Example) -> str | None:
        """The prompt as text; None, and counted, if the chat template refuses the dialogue."""
        try:
            return render_prompt(self.tokenizer, example.prompt)
        except UserError as refused:
            self.counts.dropped[str(refused)] += 1
            return None

    def _cut(self, ids: list[int]) -> list[int]:
        if len(ids) <= self.max_prompt:
            return ids
        start = [ids[0]] if ids[0] == self.tokenizer.bos_token_id else []
        return start + ids[len(ids) - self.max_prompt + len(start) :]

    def _is_too_long(self, length: int) -> bool:
        """Drop and count a row that needs a response of `length` tokens."""
        if length <= self.max_response:
            return False
        self.counts.dropped[f"response longer than {self.max_response} tokens"] += 1
        self.counts.needed[length + -length % ROUND] += 1
        return True

    def _sft(self, batch: list[Example], prompts: list[list[int]]):
        for prompt, response in zip(prompts, encode_responses(self.tokenizer, [e.chosen for e in batch]), strict=True):
            if self._is_too_long(len(response)):
                yield None
            else:
                yield {"input_ids": prompt + response, "prompt_length": len(prompt), "length": len(prompt) + len(response)}

    def _reward(self, batch: list[Example], prompts: list[list[int]]):
        chosen, rejected = (encode_responses(self.tokenizer, [getattr(e, name) for e in batch]) for name in ("chosen", "rejected"))
        for prompt, good, bad in zip(prompts, chosen, rejected, strict=True):
            longer = max(len(good), len(bad))
            if self._is_too_long(longer):
                yield None
            else:
                length = len(prompt) + longer
                yield {"chosen_ids": prompt + good, "rejected_ids": prompt + bad, "prompt_length": len(prompt), "length": length}

    def _ppo(self, batch: list[Example], prompts: list[list[int]]):
        for example, prompt in zip(batch, prompts, strict=True):
            if tuple(prompt) in self.seen:
                self.counts.dropped["duplicate prompt"] += 1
                yield None
            else:
                self.seen.add(tuple(prompt))
                yield {"input_ids": prompt, "turns": json.dumps(example.prompt, ensure_ascii=False), "length": len(prompt)}


def training_texts(dataset: Dataset, tokenizer, limit: int = 20_000) -> Iterator[str]:
    """Rendered demonstrations, to train a tokenizer on: not those to evaluate on."""
    sources = sources_of(dataset)
    trained = (example for name, example, _ in examples(dataset, "sft", Counts()) if sources[name].only != "eval")
    for example in islice(trained, limit):
        yield render_prompt(tokenizer, example.prompt) + gap(tokenizer) + example.chosen
