"""Secrets: refused before anything is written, and redacted in what is shown.

A token typed as an override would end up in .hydra/overrides.yaml, in the step's config.yaml and in W&B; a token in the environment may
show up in a library's error message. Imports no torch: run.py needs it first.
"""

import os
import re
from collections.abc import Iterator, Mapping

from runner.errors import UserError

# Kind -> pattern, whose group is the secret itself. Ids, hashes, paths and numbers must pass: an old W&B key has 40 hex digits like a Git
# commit, so it is only recognised by the name before it
PATTERNS = {
    "a Hugging Face token": re.compile(r"\b(hf_[A-Za-z0-9]{20,})"),
    "a W&B key": re.compile(r"\b(wandb_v\d_\w{20,})"),
    "an API key": re.compile(r"(?<![A-Za-z0-9])(sk-(?=[\w-]*[A-Z])(?=[\w-]*\d)[\w-]{20,})"),
    "a GitHub token": re.compile(r"\b(gh[a-z]_[A-Za-z0-9]{30,}|github_pat_\w{20,})"),
    "an AWS key": re.compile(r"\b((?:AKIA|ASIA)[A-Z0-9]{16})\b"),
    "a password in a URL": re.compile(r"://([^/\s:@'\"]*:[^/\s@'\"]+)@"),
    "a private key": re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----)"),
    "a secret": re.compile(
        r"(?:\b|_)(?:[A-Z0-9_]*(?:TOKEN|API_?KEY|ACCESS_KEY|SECRET_KEY|SECRET|PASSWORD|PASSWD)|(?:api_?key|\w+_api_?key|"
        r"(?:hf|auth|access|api)_token|password|passwd))['\"]?[=:]\s*['\"]?(?!\$|(?:true|false|null|none|\d+)\b)([^\s'\",;&|{}]+)"
    ),
}
SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)
ADVICE = (
    "It would be written into the run folder and to W&B. Put it into the environment (export WANDB_API_KEY=..., export HF_TOKEN=...) "
    "or log in once (`hf auth login`, `wandb login`), and leave it out here"
)


def kind_of_secret(text: str) -> str | None:
    """What kind of secret the text contains; None if there is none."""
    for kind, pattern in PATTERNS.items():
        if pattern.search(text):
            return kind
    # A plain word ("disabled") is more likely a setting with KEY in its name
    return next((f"the value of {name}" for name, value in _of_environment().items() if value in text and not value.isalpha()), None)


def redact(text: str) -> str:
    """The text with '***' for every secret: values from the environment, and anything that looks like one."""
    for value in sorted(_of_environment().values(), key=len, reverse=True):
        text = text.replace(value, "***")
    for pattern in PATTERNS.values():
        text = pattern.sub(lambda found: found[0].replace(found[1], "***"), text)
    return text


def refuse_in_overrides(argv: list[str]) -> None:
    """Raise UserError for a secret on the command line, without repeating it."""
    for argument in argv:
        if kind := kind_of_secret(argument):
            raise UserError(f"{redact(argument).partition('=')[0]} on the command line holds {kind}. {ADVICE}")


def refuse_in_config(config: Mapping) -> None:
    """Raise UserError for a secret in any value of a composed configuration, presets included, without repeating it."""
    for key, text in _leaves(config):
        if kind := kind_of_secret(f"{key.rpartition('.')[2]}={text}"):
            raise UserError(f"{redact(key)} in the configuration holds {kind}. {ADVICE}")


def _leaves(node: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every string in nested mappings and lists; the texts of a list have the key of the list."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _leaves(value, prefix)
    elif isinstance(node, str):
        yield prefix, node


def _of_environment() -> dict[str, str]:
    """Name -> value of the environment's secrets. Short values, numbers and paths of key files are not secrets."""
    named = {name: value for name, value in os.environ.items() if SECRET_NAME.search(name) and len(value) >= 8}
    return {name: value for name, value in named.items() if not value.isdigit() and not os.path.exists(os.path.expanduser(value))}
