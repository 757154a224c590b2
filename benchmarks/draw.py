"""Tables and a plot of benchmark rows, for RESULTS.md. Pure text: no plotting library."""

from collections.abc import Sequence
from pathlib import Path

BEGIN, END = "<!-- speed: written by benchmarks/run_all.py -->", "<!-- speed: end -->"
PHASES = {"rollout": "#4c78a8", "scoring": "#72b7b2", "update": "#f58518", "other": "#9d9d9d"}
FAMILIES = {"opt": "#4c78a8", "bloom": "#f58518", "llama": "#54a24b", "gpt_neox": "#b279a2", "llama_gqa": "#9ecae9"}
WIDTH, HEIGHT, LEFT = 380, 220, 60  # of one panel and its margin, pixels

# benchmark -> (column, key of the row, format)
COLUMNS = {
    "ppo_step": [
        ("model", "model", "{}"),
        ("prompts", "prompts", "{}"),
        ("slots", "slots", "{}"),
        ("tokens", "tokens", "{}"),
        ("lengths", "lengths", "{}"),
        ("engine", "engine", "{}"),
        ("s per step", "seconds", "{:.2f}"),
        ("sequences/s", "seq_per_s", "{:.1f}"),
        ("rollout", "rollout", "{:.2f}"),
        ("scoring", "scoring", "{:.2f}"),
        ("update", "update", "{:.2f}"),
        ("other", "other", "{:.2f}"),
        ("decode, ms/token", "decode_ms_per_token", "{:.2f}"),
        ("floor, s", "floor", "{:.2f}"),
        ("times the floor", "times_floor", "{:.2f}"),
        ("MFU of the update", "mfu_update", "{:.0%}"),
        ("GB", "peak_gb", "{:.0f}"),
    ],
    "decode": [
        ("family", "family", "{}"),
        ("batch", "batch", "{}"),
        ("ms/token", "ms_per_token", "{:.2f}"),
        ("tokens/s", "tokens_per_s", "{:,.0f}"),
        ("MBU (data sheet)", "mbu", "{:.0%}"),
        ("of the copy rate", "of_copy", "{:.0%}"),
        ("whole rollout, ms/token", "rollout_ms_per_token", "{:.2f}"),
        ("GB", "peak_gb", "{:.0f}"),
    ],
    "sft": [
        ("rows", "rows", "{}"),
        ("tokens per step", "tokens", "{:,}"),
        ("sequences", "sequences", "{}"),
        ("s per step", "train", "{:.3f}"),
        ("tokens/s", "tokens_per_s", "{:,.0f}"),
        ("MFU (data sheet)", "mfu", "{:.0%}"),
        ("of the matmul rate", "of_matmul", "{:.0%}"),
        ("GB", "peak_gb", "{:.0f}"),
    ],
    "reward": [
        ("shape", "shape", "{}"),
        ("tokens per step", "tokens", "{:,}"),
        ("pairs", "pairs", "{}"),
        ("s per step", "train", "{:.3f}"),
        ("tokens/s", "tokens_per_s", "{:,.0f}"),
        ("MFU (data sheet)", "mfu", "{:.0%}"),
        ("of the matmul rate", "of_matmul", "{:.0%}"),
        ("GB", "peak_gb", "{:.0f}"),
    ],
}
TITLES = {"ppo_step": "One PPO iteration", "decode": "Decoding", "sft": "SFT", "reward": "Reward model"}
# What is measured without --tiny; a CPU measures tiny models alone
SHAPES = {"ppo_step": ", OPT-1.3B with OPT-350M", "decode": ", 1.3 B", "sft": ", OPT-1.3B", "reward": ""}


def tables(rows: Sequence[dict]) -> str:
    """A Markdown table for each benchmark that has rows, with the machine and the rates that were measured beside them."""
    parts = []
    for name, columns in COLUMNS.items():
        mine = sorted((r for r in rows if r["benchmark"] == name), key=order)
        if not mine:
            continue
        machines = sorted({f"{r['card']}, torch {r['torch']}, commit {r['commit']}, {r['time'][:10]}" for r in mine})
        rates = [f"{what} {mine[0][key]:.4g} {unit}" for what, key, unit in RATES if key in mine[0]]
        lines = [
            f"| {' | '.join(cells)} |" for cells in ([c[0] for c in columns], ["---"] * len(columns), *(cells_of(r, columns) for r in mine))
        ]
        title = TITLES[name] + (SHAPES[name] if mine[0]["card"] != "CPU" else ", tiny")
        parts.append(f"### {title}\n\n{'; '.join(machines)}. Measured in the same run: {', '.join(rates)}.\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


RATES = (("copy", "copy_tb_s", "TB/s"), ("matmul", "matmul_tflops", "TFLOP/s"))


def order(row: dict) -> tuple:
    """Families and batch sizes in order, whatever was measured first."""
    return (
        [*FAMILIES].index(row.get("family", "opt")),
        row.get("model", ""),
        row.get("engine", ""),
        row.get("prompts", 0),
        row.get("batch", 0),
        row.get("lengths", ""),
    )


def cells_of(row: dict, columns) -> list[str]:
    return [style.format(row[key]).replace("%", " %") if key in row else "-" for _, key, style in columns]


def insert(path: Path, text: str) -> None:
    """Put the text between the markers of a file; at its end, with markers, if it has none."""
    old = path.read_text() if path.exists() else ""
    before, found, rest = old.partition(BEGIN)
    after = rest.partition(END)[2] if found else "\n"
    path.write_text(f"{before if found else before.rstrip() + chr(10) * 2}{BEGIN}\n\n{text}\n\n{END}{after}")


# --- the plot ---------------------------------------------------------------------------------------------------------


def plot(rows: Sequence[dict]) -> str:
    """Two panels: utilisation of the copy rate over the batch size, and the phases of PPO steps beside their floors."""
    parts = [panel(0, "decoding: share of the copy rate, by batch", lines(rows)), panel(1, "PPO iteration, seconds by phase", bars(rows))]
    size = f'width="{2 * (WIDTH + LEFT) + 20}" height="{HEIGHT + 90}"'
    font = 'font-family="sans-serif" font-size="11"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'


def panel(column: int, title: str, inside: str) -> str:
    """A titled frame whose origin is its upper left corner."""
    frame = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#bbb"/>'
    head = f'<text x="0" y="-10" font-weight="bold">{title}</text>'
    return f'<g transform="translate({column * (WIDTH + LEFT) + LEFT - 15},30)">{frame}{head}{inside}</g>'


def lines(rows: Sequence[dict]) -> str:
    found = sorted((r for r in rows if r["benchmark"] == "decode"), key=order)
    batches = sorted({r["batch"] for r in found})
    across = {batch: WIDTH * (n + 0.5) / len(batches) for n, batch in enumerate(batches)}
    parts = [grid(f"{share:.0%}", HEIGHT * (1 - share)) for share in (0.2, 0.4, 0.6, 0.8)]
    parts += [label(x, HEIGHT + 15, str(batch)) for batch, x in across.items()]
    for n, (family, colour) in enumerate(FAMILIES.items()):
        points = [(across[r["batch"]], HEIGHT * (1 - min(1, r["of_copy"]))) for r in found if r["family"] == family]
        drawn = " ".join(f"{x:.0f},{y:.0f}" for x, y in points)
        parts += [f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>', key(n, family, colour)]
    return "".join(parts)


def bars(rows: Sequence[dict]) -> str:
    found = sorted((r for r in rows if r["benchmark"] == "ppo_step"), key=order)
    most, parts = 1.05 * max((r["seconds"] for r in found), default=1.0), []
    width = WIDTH / max(1, len(found))
    for n, row in enumerate(found):
        y = HEIGHT
        for phase, colour in PHASES.items():
            height = HEIGHT * row[phase] / most
            y -= height
            parts.append(f'<rect x="{width * (n + 0.2):.1f}" y="{y:.1f}" width="{width * 0.6:.1f}" height="{height:.1f}" fill="{colour}"/>')
        floor = HEIGHT * (1 - row["floor"] / most)
        parts.append(
            f'<path d="M{width * (n + 0.1):.1f} {floor:.1f}h{width * 0.8:.1f}" stroke="black" stroke-width="2" stroke-dasharray="3"/>'
        )
        words = (f"{row['prompts']} {row['engine']}", row["lengths"], f"{row['seconds']:.2f} s")
        parts += [label(width * (n + 0.5), HEIGHT + 15 + 12 * m, word) for m, word in enumerate(words)]
    return "".join([*parts, *(key(n, phase, colour) for n, (phase, colour) in enumerate([*PHASES.items(), ("floor", "black")]))])


def grid(text: str, y: float) -> str:
    return f'<path d="M0 {y:.0f}h{WIDTH}" stroke="#eee"/><text x="-5" y="{y + 4:.0f}" text-anchor="end">{text}</text>'


def label(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="middle">{text}</text>'


def key(n: int, text: str, colour: str) -> str:
    x = 75 * n
    return f'<rect x="{x}" y="{HEIGHT + 48}" width="9" height="9" fill="{colour}"/><text x="{x + 13}" y="{HEIGHT + 57}">{text}</text>'
