"""`python -m runner.store`: what lies in a store, and what can be deleted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.durable.lock import lock
from runner.durable.manifest import write_manifest
from runner.store import show_store, state, stored

SAFETENSORS = (2).to_bytes(8, "little") + b"{}"


def make(store: Path, name: str, parents: dict[str, str] | None = None, done: bool = True, used: int = 1_700_000_000) -> Path:
    """A step of the run `mine` with a checkpoint of 2 MB."""
    folder = store / name
    (folder / "checkpoints" / "step_5").mkdir(parents=True)
    (folder / "model").mkdir()
    (folder / "logs").mkdir()
    (folder / "checkpoints" / "step_5" / "actor.rank_0.safetensors").write_bytes(bytes(2_000_000))
    write_manifest(folder / "checkpoints" / "step_5", {"step": 5})
    (folder / "facts.json").write_text(json.dumps({"name": "mine", "key": name, "facts": {}}))
    (folder / "step.json").write_text(json.dumps({"parents": parents or {}, "base": f"{store}/base/opt-1"}))
    (folder / "config.yaml").write_text("name: mine\nmodel:\n  name: tiny\n  family: opt\ndataset:\n  name: toy\n")
    if done:
        (folder / "model" / "model.safetensors").write_bytes(SAFETENSORS)
        for file in ("result.json", "model/config.json", "DONE"):
            (folder / file).write_text("{}")
    for path in (path for path in folder.rglob("*") if path.is_file()):
        os.utime(path, (used, used))
    return folder


def test_every_step_has_a_line_that_says_what_it_is_and_what_needs_it(tmp_path, capsys):
    make(tmp_path, "sft-0a", used=1_800_000_000)
    make(tmp_path, "ppo-1b", {"sft": "/before/it/moved/sft-0a/model", "reward": "facebook/opt-350m"})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows").write_bytes(bytes(3_000_000))
    show_store(tmp_path)
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["step", "ppo-1b", "sft-0a"]  # the last one used stands last
    assert lines[2].split()[1:7] == ["done", "mine", "tiny", "toy", "2.00", "MB"]
    assert lines[2].endswith("ppo-1b") and "2027-01-1" in lines[2] and not lines[1].endswith("b")
    assert "data/  3.00 MB  tokenised data" in text
    assert f"4.00 MB of checkpoints of finished steps, which nothing reads any more:\n  rm -rf {tmp_path}/ppo-1b/checkpoints " in text
    assert "- 0.00 MB more of finished steps that no other was trained on, beside their checkpoints" in text  # nothing is counted twice


def test_a_row_that_is_wider_than_the_terminal_goes_on_in_the_next_line(tmp_path, capsys, monkeypatch):
    make(tmp_path, "reward-0123456789")
    for number in range(2):
        make(tmp_path, f"ppo-012345678{number}", {"reward": "/reward-0123456789/model"}, used=1_600_000_000)
    monkeypatch.setenv("COLUMNS", "500")
    show_store(tmp_path)
    (whole,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("reward-")]
    assert len(whole) > 80 and whole.endswith("ppo-0123456780, ppo-0123456781")
    monkeypatch.setenv("COLUMNS", "80")
    show_store(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("reward-"))
    assert lines[at + 1].startswith("    ") and lines[at].split() + lines[at + 1].split() == whole.split()
    assert max(map(len, lines[: at + 2])) <= 80


def test_how_far_a_step_has_come(tmp_path, capsys):
    folder = make(tmp_path, "sft-0a", done=False)
    assert state(folder) == "interrupted at step 5"
    (folder / "logs" / "rank_0.alive").write_text('{"total": 20}')
    assert state(folder) == "interrupted at step 5 of 20"
    with lock(tmp_path / "locks" / "sft-0a", "it"):
        assert state(folder) == "being worked on at step 5 of 20"
    (folder / "logs" / "error_rank1.json").write_text("{}")  # as a worker leaves it, until the step is started again
    assert state(folder) == "failed at step 5 of 20"
    show_store(tmp_path)
    assert "rm -rf" not in capsys.readouterr().out  # it will resume from there
    (tmp_path / "sft-2c").mkdir()
    assert state(tmp_path / "sft-2c") == "interrupted, no checkpoint yet"
    damaged = make(tmp_path, "sft-1b")
    (damaged / "model" / "model.safetensors").unlink()
    assert {step.folder.name: step.done for step in stored(tmp_path)} == {"sft-0a": False, "sft-1b": False, "sft-2c": False}
    assert state(damaged) == "damaged"


def test_a_file_with_two_names_is_counted_once(tmp_path):
    """resume=force links the checkpoint that it continues from."""
    first, second = make(tmp_path, "sft-0a"), make(tmp_path, "sft-1b")
    name = "checkpoints/step_5/actor.rank_0.safetensors"
    (second / name).unlink()
    os.link(first / name, second / name)
    assert 2_000_000 < sum(step.bytes for step in stored(tmp_path)) < 2_010_000


def test_it_needs_no_torch(tmp_path):
    for number in range(3):
        make(tmp_path, f"sft-{number}")
    code = f"import sys; from runner import store; sys.argv[1:] = ['{tmp_path}']; store.main(); assert 'torch' not in sys.modules"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0 and "sft-2" in found.stdout, found.stderr


def test_a_folder_that_does_not_exist_is_named(monkeypatch, tmp_path):
    from runner import store

    monkeypatch.setattr(sys, "argv", ["store", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match=r"there is no store .*nothing .*type python -m runner.store FOLDER"):
        store.main()
    (tmp_path / "nothing").mkdir()
    with pytest.raises(SystemExit, match=r"nothing holds no steps: type python -m runner.store FOLDER"):
        store.main()
