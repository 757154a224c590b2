"""Stopping in good order: whoever asks (a signal, the time limit, the launcher), every rank hears of it at the same optimizer step."""


class Stopped(Exception):
    """The stage was asked to stop and has saved its state. args[0] says who asked."""


def asked() -> str | None:
    """Why the run should stop now, or None: the same answer on every rank. Collective; cheap enough for every optimizer step."""
    return None


def saving_took(seconds: float) -> None:
    """How long a checkpoint took: the time limit must leave as much."""
