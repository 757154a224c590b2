"""Reports as data: a list of Section, laid out by one function for a terminal or a log, and by another for a Markdown file.

A Section holds plain strings. Any of them may contain text that a model wrote: it is never read as rich markup or as Markdown, its control
characters are replaced, and a console without Unicode gets "?" instead of an exception. Nothing here imports torch.
"""

import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

SPARKS = "▁▂▃▄▅▆▇█"
ASCII = str.maketrans(SPARKS + "·", "_.-:=+*#.") | {ord("±"): "+-"}  # for consoles without Unicode
ONE = r"(?:[-+]?(?:[\d.,]+(?:e\d+)?|inf)|nan|-)(?: %| s)?"
NUMBER = re.compile(rf"(?:{ONE}(?: (?:->|±) {ONE})*)?")  # not a star inside a star: a response of dots would be searched for years
STYLES = {"trained": "green", "reused": "cyan", "given": "magenta", "missing": "red", "failed": "bold red"}
CELL_LIMIT = 700  # characters of one cell or intro in a terminal; summary.md has the whole text
DRAWING = 20  # columns of a bar or a curve
UNBROKEN = 24  # columns: cells up to this width stay on one line
STUMP = 12  # columns: the least that a longer cell needs
WIDEST = 120  # columns: longer lines are hard to read


@dataclass(frozen=True)
class Section:
    """One titled part of a report: an intro, a table, sentences under it, then (label, path or command) pairs that never wrap."""

    title: str
    intro: str = ""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()
    literal: Sequence[tuple[str, str]] = ()


# --- drawings ---------------------------------------------------------------------------------------------------------


def sparkline(values: Sequence[float]) -> str:
    """A curve in one line of text; long ones are averaged into `DRAWING` buckets."""
    if len(values) < 2:
        return ""
    buckets = min(len(values), DRAWING)
    edges = [round(i * len(values) / buckets) for i in range(buckets + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    return "".join(SPARKS[min(7, int(8 * (m - low) / span)) if span else 3] for m in means)


def bar(share: float | None) -> str:
    return ("█" * round(DRAWING * share)).ljust(DRAWING, "·") if isinstance(share, int | float) and math.isfinite(share) else ""


# --- layout -----------------------------------------------------------------------------------------------------------


def print_sections(parts: Sequence[Section], console: Console) -> None:
    """A terminal gets colours; a log file gets the same text without them and without trailing spaces."""
    with console.capture() as captured:
        for part in parts:
            print_section(part, console)
    console.file.write(re.sub(" +$", "", captured.get(), flags=re.MULTILINE))
    console.file.flush()


def print_section(part: Section, console: Console) -> None:
    """Paths and commands stay on one line at any width, so that they can be copied."""
    width = min(console.width, WIDEST)

    def text(words: str, style: str = "", limit: int = CELL_LIMIT) -> Text:
        return Text(speakable(clip(clean(words), limit), console.encoding), style=style)

    def indented(what: Text | Table, below: int = 0) -> None:
        console.print(Padding(what, (0, 0, below, 2)), width=width)

    console.print("\n", text(part.title, "bold cyan"), sep="", width=width)
    if part.intro:
        indented(text(part.intro, "italic"), below=1)
    if part.rows:
        gap = next((gap for gap in (2, 1) if table_width(part, gap) <= width - 2), None)
        for table in [rich_table(part, text, gap)] if gap else records(part, text):
            indented(table)
        if part.literal:
            console.print()
    for note in part.notes:
        for line in lines_of(note, width - 2):
            indented(text(line))
    pad = max((len(label) for label, _ in part.literal), default=0)
    for label, words in part.literal:
        console.print(Text.assemble("  ", (label.ljust(pad), "dim"), "  ", text(words, limit=10_000)), soft_wrap=True)


def lines_of(note: str, width: int) -> list[str]:
    """Wrap a sentence without separating a number from its unit."""
    glued = re.sub(r"(\d) (s|min|h|%)(?!\w)", "\\1\N{NO-BREAK SPACE}\\2", clean(note))
    lines = textwrap.wrap(glued, width, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def rich_table(part: Section, text: Callable[..., Text], gap: int) -> Table:
    table = Table(box=None, header_style="underline", pad_edge=False, padding=(0, gap, 0, 0))
    for column, (name, right) in enumerate(zip(part.header, right_aligned(part), strict=True)):
        brief = longest(part, column) <= UNBROKEN
        table.add_column(text(name), justify="right" if right else "left", no_wrap=brief, overflow="fold")
    for row in part.rows:
        table.add_row(*(text(cell, STYLES.get(cell, "")) for cell in row))
    return table


def longest(part: Section, column: int) -> int:
    return max(cell_len(row[column]) for row in part.rows)


def table_width(part: Section, gap: int) -> int:
    """Columns that the table needs: short cells in full, longer ones a stump to wrap in."""
    total = 0
    for column, name in enumerate(part.header):
        cell = longest(part, column)
        total += gap + max(cell_len(name), cell if cell <= UNBROKEN else STUMP)
    return total


def records(part: Section, text: Callable[..., Text]) -> list[Text]:
    """The rows as sentences, for a table that does not fit."""
    rows = [[f"{name} {cell}".strip() for name, cell in zip(part.header, row, strict=True) if cell] for row in part.rows]
    return [text(", ".join(row)) for row in rows]


def right_aligned(part: Section) -> list[bool]:
    """Which columns hold numbers; the first one names the row."""
    return [column > 0 and all(NUMBER.fullmatch(row[column]) for row in part.rows) for column in range(len(part.header))]


def markdown(parts: Sequence[Section]) -> str:
    blocks = []
    for number, part in enumerate(parts):
        blocks.append(f"{'##' if number else '#'} {escape(part.title)}")
        blocks += [escape(part.intro)] if part.intro else []
        if part.rows:
            rule = ["---:" if right else "---" for right in right_aligned(part)]
            cells = [[escape(cell) for cell in row] for row in (part.header, *part.rows)]
            blocks.append("\n".join(f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:])))
        items = [f"- {escape(note)}" for note in part.notes]
        items += [f"- {escape(label)}: `{clean(words)}`" for label, words in part.literal]
        blocks += ["\n".join(items)] if items else []
    return "\n\n".join(blocks) + "\n"


def escape(words: str) -> str:
    """Text that Markdown shows as it is, on one line, so that it also fits a table cell."""
    # _ between two letters means nothing, nor does > within a line
    return re.sub(r"([\\`*{}\[\]<#|~&$]|(?<![^\W_])_|_(?![^\W_])|^>)", r"\\\1", clean(words)).replace("\n", "<br>")


def clean(words: str) -> str:
    """Without control characters: a model may well have learnt to write terminal escapes."""

    def shown(c: str) -> str:
        if c.isprintable() or c == "\n":
            return c
        return " " if c.isspace() else "�"

    return "".join(map(shown, words.strip("\n")))


def clip(words: str, limit: int) -> str:
    """Keep both ends of a long text: a prompt ends with the question, an answer starts with the point."""
    half = limit // 2
    return words if len(words) <= limit else f"{words[:half]} [... {len(words) - 2 * half:,} characters ...] {words[-half:]}"


def speakable(words: str, encoding: str) -> str:
    return words if encoding.lower().startswith("utf") else words.translate(ASCII).encode(encoding, "replace").decode(encoding)
