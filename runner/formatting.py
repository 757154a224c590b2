"""Numbers, times and paths as words: for reports, tables and messages. Imports nothing but the standard library."""

import math
import textwrap
from pathlib import Path


def num(value: float | None, sign: str = "", more: int = 0) -> str:
    """A number as people write it; "-" if it is missing. sign="+" shows the plus of a change; more: further digits."""
    if not isinstance(value, int | float):
        return "-"
    if not math.isfinite(value) or isinstance(value, int):
        return f"{value:{sign},}"
    size = abs(value)
    if size >= 1e6:  # what a diverged training leaves: 5.2e21
        mantissa, exponent = f"{value:{sign}.{1 + more}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    if size >= 1000:
        digits = 0
    elif size >= 10:
        digits = 1
    elif 0.0005 <= size < 0.01:
        digits = 3
    else:
        digits = 2
    digits += more
    return f"{round(value, digits) + 0.0:{sign},.{digits}f}"


def pct(value: float | None, sign: str = "", digits: int = 1, more: int = 0) -> str:
    return f"{100 * value:{sign}.{digits + more}f} %" if isinstance(value, int | float) else "-"


def with_error(text: str, error: float | None) -> str:
    """A number and its standard error, if that is known: of one prompt it is 0."""
    return f"{text} ± {num(error)}" if error else text


# Three ways to say a time, on purpose: one that was measured, one that is foreseen, one that counts down


def duration(seconds: float | None) -> str:
    """A time that was measured, to the second: 2.1 s, 59 s, 1 min 05 s, 2 h 04 min."""
    if not isinstance(seconds, int | float):
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def spell(seconds: float | None) -> str:
    """A time that is foreseen, with the two digits that a forecast is good for: 0.014 s, 59 s, 1.5 min, 58 min, 1 h 0 min."""
    if seconds is None:
        return "-"
    if seconds < 59.5:
        return f"{seconds:.2g} s" if seconds >= 0.0001 else "0 s"
    minutes = round(seconds / 60)
    if minutes < 10:
        return f"{seconds / 60:.1f} min"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def clock(seconds: float) -> str:
    """The time left, brief and always with seconds, so that one sees it run: 4:05, 1:04:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def short(path: str | Path) -> str:
    """The path as it can be typed from the working directory."""
    path, here = str(path), Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_absolute() and Path(path).is_relative_to(here) else path


def print_columns(rows: list[tuple[str, ...]], width: int | None = None) -> None:
    """Print a table with aligned columns; the end of a row that is wider than `width` goes to the next line."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(map(str.ljust, row, widths)).rstrip()
        lines = textwrap.wrap(line, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False) if width else [line]
        print(*lines, sep="\n")
