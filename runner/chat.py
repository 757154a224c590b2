"""Talk to an exported actor: `python -m runner.chat runs/store/ppo-<hash>/model`, or to a model of the hub by its id.

The tokenizer's chat template turns the dialogue into text, as in training; when it outgrows the model's context, the oldest turns are
forgotten. /clear starts over, /quit or Ctrl-D ends, Ctrl-C cuts an answer short.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from runner.errors import UserError
from runner.exported import as_trained, find, load_actor

if TYPE_CHECKING:  # it imports torch, which takes its time
    from runner.rollout.stops import Stops

CHAT = "python -m runner.chat"


def fit(turns: list[dict[str, str]], tokenizer, room: float) -> tuple[list[dict[str, str]], list[int]]:
    """The dialogue as turns and token ids, without its oldest turns if they do not fit into `room` tokens."""
    from runner.models.tokenizer import encode_prompts

    kept = turns
    while len(ids := encode_prompts(tokenizer, [kept])[0]) > room and len(kept) > 1:
        kept = kept[2:]
    if len(ids) > room:
        raise UserError(f"the message has {len(ids)} tokens; more than {room} leave no room for an answer: shorten it")
    if len(kept) < len(turns):
        print(f"(the context is full: the oldest {len(turns) - len(kept)} turns are forgotten)")
    return kept, ids


def answer(ids: list[int], tokenizer, model, longest: int, temperature: float | None, stops: "Stops | None" = None) -> str:
    """Generate an answer and print it as it comes. temperature: None decodes greedily."""
    import torch
    from transformers import GenerationConfig, TextStreamer

    from runner.models.token_bytes import token_bytes

    class Screen(TextStreamer):
        begun = False

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            text = text if self.begun else text.lstrip()  # some templates have a space or a line break before the answer
            self.begun = self.begun or bool(text)
            # A model may well have learnt to write terminal escapes
            print("".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text), end="", flush=True)

    prompt = torch.tensor([ids], device=model.device)
    # Our own config: generate would otherwise mix in the checkpoint's, and top_k=50
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    how |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "max_new_tokens": longest}
    screen = Screen(tokenizer, skip_prompt=True, skip_special_tokens=True)
    print("Assistant: ", end="", flush=True)

    state = torch.zeros(1, dtype=torch.long)

    def ends(rows, *_, **__) -> torch.Tensor:
        """As in PPO, with the token that completes a stop string. Called once per token."""
        nonlocal state
        if stops:
            state = stops.next(state, rows[:, -1].cpu())
        return stopped().to(rows.device)

    def stopped() -> torch.Tensor:
        return stops.reached(state) if stops else torch.tensor([False])

    given = {"attention_mask": prompt * 0 + 1, "generation_config": GenerationConfig(**how), "stopping_criteria": [ends]}
    rows = model.generate(prompt, streamer=screen, **given)
    print()
    said = rows[0, len(ids) :].tolist()
    if len(said) == longest and said[-1] != tokenizer.eos_token_id and not stopped():
        print(f"(cut off at {longest} tokens; --max-new-tokens allows more)")
    if not stopped():
        return tokenizer.decode(said, skip_special_tokens=True).strip()
    # Shown, but no part of the dialogue: no prompt in training holds a stop string
    written = b"".join(token_bytes(tokenizer, said))
    end = min(at for string in stops.strings if (at := written.find(string.encode())) >= 0)
    return written[:end].decode(errors="replace").strip()


def hear() -> str:
    """The next message; echoed if it comes through a pipe, where nobody sees it typed."""
    message = input("\nHuman: ").strip()
    if not sys.stdin.isatty():
        print(message)
    return message


def talk(tokenizer, model, longest: int | None, temperature: float | None, familiar: float = math.inf, strings: Sequence[str] = ()) -> None:
    """Read messages and answer them until the end of the input. familiar, strings: see as_trained."""
    from runner.rollout.stops import Stops

    stops = Stops.of(tokenizer, strings, model.config.vocab_size) if strings else None
    longest = longest or model.generation_config.max_new_tokens or 256
    context = getattr(model.config, "max_position_embeddings", None) or math.inf  # ALiBi has no limit
    if longest >= context:
        raise UserError(f"answers of {longest} tokens leave no room in the context of {context}: lower --max-new-tokens")
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")
    turns: list[dict[str, str]] = []
    while (message := hear()) != "/quit":
        try:
            if message == "/clear":
                turns = []
            elif message.startswith("/"):
                print("(there are /clear and /quit)")
            elif message:
                kept, ids = fit([*turns, {"role": "user", "content": message}], tokenizer, context - longest)
                if len(ids) > familiar:
                    print(f"(the dialogue has {len(ids)} tokens; in training the model saw at most {familiar})")
                turns = [*kept, {"role": "assistant", "content": answer(ids, tokenizer, model, longest, temperature, stops)}]
        except UserError as error:
            print(f"({error})")
        except KeyboardInterrupt:
            print(" (cut short, and forgotten)")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m runner.chat", description="Talk to an exported actor. /clear starts over, /quit ends.")
    parser.add_argument("path", help="folder of an SFT, DPO or PPO model, of its step, or of a run (the newest), or a Hugging Face id")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer; default: what the model was trained with")
    parser.add_argument("--temperature", type=float, default=0.7, metavar="T", help="default 0.7; PPO trains at 1")
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    args = parser.parse_args()
    if not 0 < args.temperature < float("inf") or (args.max_new_tokens is not None and args.max_new_tokens < 1):
        parser.error("--temperature must be above 0 (for the likeliest token: --greedy), and --max-new-tokens at least 1")
    if sys.stdin.isatty():
        import readline  # noqa: F401  arrow keys and history in input()
    try:
        path = find(args.path, CHAT)
        talk(*load_actor(path, CHAT), args.max_new_tokens, None if args.greedy else args.temperature, *as_trained(path))
    except UserError as error:
        sys.exit(f"error: {error}")
    except (EOFError, KeyboardInterrupt):
        print()


if __name__ == "__main__":
    main()
