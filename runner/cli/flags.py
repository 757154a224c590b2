"""Words that start with a dash: Hydra's own options, at any position, and overrides with dashes by mistake."""

from dataclasses import fields

from hydra._internal.utils import get_args_parser

from runner.config.schema import Config
from runner.errors import UserError, did_you_mean

ALL = {name: action for action in get_args_parser()._actions for name in action.option_strings}
ALONE = [name for name, action in ALL.items() if action.nargs == 0]
# Options that take the next word, and the words that they accept; an empty tuple for any
WITH_A_WORD = {name: tuple(action.choices or ()) for name, action in ALL.items() if action.nargs != 0}
# Hydra does only one of these at a time
DEEDS = (("-r", "--run"), ("-m", "--multirun"), ("-c", "--cfg"), ("-i", "--info"), ("-sc", "--shell-completion"))
SHELL_WORDS = {f"{deed}={shell}" for deed in ("install", "uninstall", "query") for shell in ("bash", "zsh", "fish")}
COMPLETION = """-sc needs the shell: type eval "$(python run.py -sc install=bash)", or python run.py -sc install=fish | source"""


def flags_and_overrides(argv: list[str], known: list[str]) -> tuple[list[str], list[str]]:
    """Split argv into Hydra's options, each with its word, and the rest: Hydra accepts options only at the front or the end.

    Raises:
        UserError: an option that Hydra does not know, lacks its word, or is excluded by another one.
    """
    flags, overrides, rest = [], [], list(argv)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if not word.startswith("-"):
            overrides.append(word)
        elif flag in WITH_A_WORD:
            if not equals and rest and _fits(flag, rest[0]):
                value = rest.pop(0)
            flags.append(f"{flag}={_word_of(flag, value)}")
        elif word in ALONE:
            flags.append(word)
        else:
            raise UserError(_no_option(flag, value or (rest[0] if rest else ""), known))
    _refuse_together([flag.partition("=")[0] for flag in flags])
    return flags, overrides


def sweeps(argv: list[str]) -> bool:
    """Whether the command is a multirun."""
    return any(word in ("-m", "--multirun") or word.startswith(("sweep=", "hydra.mode=MULTIRUN")) for word in argv)


def completes(flags: list[str], overrides: list[str]) -> bool:
    """Whether the command installs, removes or answers tab completion, whose words (install=bash) are not our keys."""
    if not {"-sc", "--shell-completion"}.intersection(flags):
        return False
    if not SHELL_WORDS.intersection(overrides):
        raise UserError(COMPLETION)
    return True


def _fits(flag: str, word: str) -> bool:
    return word in WITH_A_WORD[flag] if WITH_A_WORD[flag] else not word.startswith("-")


def _word_of(flag: str, word: str) -> str:
    choices = WITH_A_WORD[flag]
    if not word and ALL[flag].nargs == "?":  # --info may stand alone
        return ALL[flag].const
    if not word or (choices and word not in choices):
        raise UserError(f"{flag} wants {' or '.join(choices) or 'a word behind it'}: type {flag} {choices[0] if choices else '...'}")
    return word


def _no_option(flag: str, after: str, known: list[str]) -> str:
    """What to type instead of --seed 3, --seed=3 or --dry_run."""
    key = flag.lstrip("-").replace("-", "_")
    if key not in known:
        near = did_you_mean(key, known) or did_you_mean(flag, [*ALONE, *WITH_A_WORD])
        return f"{flag} is not an option{near}: overrides are key=value, without dashes, and python run.py --help explains"
    if not after or "=" in after or after.startswith("-"):
        after = "true" if key in (f.name for f in fields(Config) if f.type is bool) else "..."
    return f"{flag}: overrides have no dashes. Type {key}={after}"


def _refuse_together(flags: list[str]) -> None:
    deeds = [flag for flag in flags if any(flag in names for names in DEEDS)]
    if len(deeds) > 1:
        raise UserError(f"{' and '.join(deeds)} exclude each other: type one of them")
    if "--resolve" in flags and not {"-c", "--cfg", "-h", "--help"}.intersection(flags):
        raise UserError("--resolve resolves what --cfg prints: type --cfg job --resolve")
