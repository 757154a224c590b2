"""The benchmarks run on a CPU with tiny models, and what they write becomes the tables and the plot of RESULTS.md."""

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
FACTS = {"card": "H200", "torch": "2.11", "commit": "abc", "time": "2026-11-24 12:00"}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def rows_of(name: str, folder: Path, monkeypatch, *words: str) -> list[dict]:
    """Rows that a benchmark writes with --tiny."""
    module = __import__(name)
    monkeypatch.setattr(sys, "argv", [name, "--tiny", "--out", str(folder / "rows.jsonl"), *words])
    module.main()
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_a_step_of_ppo_is_measured_by_phases_with_both_engines(alone, tmp_path, monkeypatch):
    import ppo_step

    rollouts, iterate = [], ppo_step.iterate

    def kept(*args):
        rollouts.append(iterate(*args))
        return rollouts[-1]

    monkeypatch.setattr(ppo_step, "iterate", kept)
    rows = rows_of("ppo_step", tmp_path, monkeypatch, "--rounds", "1")
    for rollout, _ in rollouts:  # all tokens can be sampled, and the trainer agrees
        assert rollout.responses.max() > 1000 and rollout.mismatch.max() < 0.01 and not rollout.recomputed.all()
    both = [("graph", "fixed"), ("graph", "varied")]
    assert [(r["engine"], r["lengths"]) for r in rows] == [*both, *both, ("hf", "fixed")]
    assert [(r["prompts"], r["slots"]) for r in rows] == [(4, 4)] * 2 + [(6, 4)] * 2 + [(4, 4)]
    for row in rows:
        assert sum(row[phase] for phase in ("rollout", "scoring", "update", "other")) == pytest.approx(row["seconds"])
        assert row["floor"] == pytest.approx(sum(value for name, value in row.items() if name.startswith("floor_")))
        assert row["times_floor"] == pytest.approx(row["seconds"] / row["floor"])
    assert rows[1]["floor"] < rows[0]["floor"] == pytest.approx(rows[4]["floor"], rel=0.5)


def test_varied_responses_have_16_to_256_tokens_and_a_mean_of_100():
    from ppo_step import varied

    lengths = varied(10_000, 256)
    assert (min(lengths), max(lengths)) == (16, 256) and 85 < sum(lengths) / len(lengths) < 101


def test_decoding_is_measured_without_its_prefill(alone, tmp_path, monkeypatch):
    (row,) = rows_of("decode", tmp_path, monkeypatch, "--family", "llama", "--batch", "2")
    assert (row["family"], row["batch"]) == ("llama", 2) and 0 < row["of_copy"] < 1
    assert row["tokens_per_s"] == pytest.approx(2e3 / row["ms_per_token"])


@pytest.mark.parametrize(("name", "kinds"), [("sft", ["dialogues", "whole"]), ("reward", ["1.3B"])])
def test_training_is_measured_on_real_tokens(name, kinds, alone, tmp_path, monkeypatch):
    rows = rows_of(name, tmp_path, monkeypatch, "--rounds", "1")
    assert [row.get("rows") or row["shape"] for row in rows] == kinds
    assert all(row["tokens_per_s"] == pytest.approx(row["tokens"] / (row["data"] + row["train"])) and row["mfu"] > 0 for row in rows)


PPO = FACTS | {
    "benchmark": "ppo_step",
    "model": "opt1.3b",
    "prompts": 64,
    "slots": 64,
    "tokens": "256+256",
    "lengths": "fixed",
    "engine": "graph",
    "seconds": 1.8,
    "floor": 1.1,
}
PPO |= {"rollout": 0.9, "scoring": 0.3, "update": 0.5, "other": 0.1, "seq_per_s": 35.6, "times_floor": 1.64, "copy_tb_s": 4.27}
DECODE = FACTS | {
    "benchmark": "decode",
    "family": "opt",
    "batch": 64,
    "ms_per_token": 2.9,
    "of_copy": 0.6,
    "mbu": 0.55,
    "tokens_per_s": 22_000.0,
}


def test_rows_become_tables_that_name_the_machine():
    from draw import tables

    text = tables([PPO, DECODE | {"batch": 512}, DECODE])
    assert "| 64 | 256+256 | fixed | graph | 1.80 | 35.6 | 0.90 | 0.30 | 0.50 | 0.10 | - | 1.10 | 1.64 |" in text
    assert text.index("| opt | 64 | 2.90 | 22,000 | 55 % | 60 % |") < text.index("| opt | 512 |")
    assert "H200, torch 2.11, commit abc, 2026-11-24. Measured in the same run: copy 4.27 TB/s." in text


def test_the_plot_is_whole_whatever_was_measured():
    from draw import plot

    for rows in ([], [PPO], [DECODE], [PPO, DECODE, DECODE | {"family": "bloom", "batch": 128}]):
        ElementTree.fromstring(plot(rows))
    assert plot([PPO]).count("<rect") > plot([]).count("<rect")


def test_results_are_written_between_their_markers_again_and_again(tmp_path):
    from draw import insert

    path = tmp_path / "RESULTS.md"
    path.write_text("# Results\n\nbefore\n")
    insert(path, "first")
    path.write_text(path.read_text() + "after\n")
    insert(path, "second")
    text = path.read_text()
    assert "before" in text and "after" in text and "second" in text and "first" not in text


def test_a_benchmark_that_fails_leaves_its_old_rows(tmp_path, monkeypatch):
    import run_all

    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(DECODE) + "\n" + json.dumps(PPO) + "\n")
    monkeypatch.setattr(run_all, "HERE", tmp_path)  # no script is there
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--only", "decode", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit, match="decode did not end well"):
        run_all.main()
    assert path.read_text().count('"decode"') == 1 and (tmp_path / "speed.svg").exists()


def test_new_rows_take_the_place_of_old_ones(tmp_path, monkeypatch):
    import run_all

    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(DECODE) + "\n" + json.dumps(PPO) + "\n")
    script = 'import sys, pathlib; pathlib.Path(sys.argv[2]).write_text(\'{"benchmark": "decode", "batch": 7}\')'
    (tmp_path / "decode.py").write_text(script)
    monkeypatch.setattr(run_all, "HERE", tmp_path)
    assert run_all.run("decode", path, run_all.argparse.Namespace(tiny=False, limit=20))
    assert [(r["benchmark"], r.get("batch")) for r in map(json.loads, path.read_text().splitlines())] == [("ppo_step", None), ("decode", 7)]


def test_shapes_counts_finished_lines_only(tmp_path):
    import shapes

    (tmp_path / "sft-1").mkdir()
    (tmp_path / "sft-1" / "metrics.jsonl").write_text(
        '{"step": 1, "perf/tokens_per_sec": 5}\n{"step": 1, "eval/loss": 2}\n{"step": 2, "perf/tok'
    )
    assert [row["step"] for row in shapes.logged(tmp_path, "sft")] == [1]


def test_shapes_keeps_what_was_measured_until_the_limit(tmp_path, capsys):
    """A command that logs two steps and then hangs."""
    import time

    import shapes

    row = {"perf/tokens_per_sec": 10.0, "time/step": 2.0, "time/train": 1.5}
    script = f"""
import json, pathlib, time
folder = pathlib.Path({str(tmp_path)!r}) / "sft-1"
folder.mkdir()
(folder / "metrics.jsonl").write_text(2 * {json.dumps(row) + chr(10)!r})
print("hanging", flush=True)
time.sleep(60)
"""
    started = time.monotonic()
    found = list(shapes.follow("tiny", [sys.executable, "-c", script], ["sft", "ppo"], tmp_path, started + 2))
    assert [(r["stage"], r["step"], r["phases"]) for r in found] == [("sft", 2.0, {"train": 1.5})]
    assert time.monotonic() - started < 10 and "ran into --limit without ppo" in capsys.readouterr().out
