"""The rooms of the house: the folders of runner/, and each file beside them. Imports between them go one way."""

import ast
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import runner

HOUSE = Path(runner.__file__).parent


def imported(file: Path) -> list[str]:
    """Modules of this house that a file imports, within functions and for type checkers too, as `runner.room.module`."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "runner":
            # `from runner import ranks` names rooms; `from runner.watch import stop` stands in one
            found += [f"runner.{alias.name}" for alias in node.names] if node.module == "runner" else [node.module]
    return found


def test_imports_between_rooms_go_one_way():
    needs = defaultdict(set)
    for file in HOUSE.rglob("*.py"):
        room = file.relative_to(HOUSE).parts[0].removesuffix(".py")
        needs[room] |= {module.split(".")[1] for module in imported(file)} - {room}
    assert "metrics" in needs["durable"] and "plan" in needs["reporting"]  # it does see them
    TopologicalSorter(needs).prepare()  # raises CycleError, which names the circle
