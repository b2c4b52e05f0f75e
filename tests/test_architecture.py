"""The house has floors: a room imports what is below it, and no file imports itself by way of others."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import gnunet

FLOORS = [  # from the top; rooms of a floor do not import one another
    ["__main__"],
    ["commands"],
    ["ablation"],
    ["training"],
    ["checkpoint"],
    ["distributed"],
    ["config"],
    ["evaluation"],
    ["models", "diffusion", "data"],
    ["norms", "fusion", "random_streams", "safe_io", "scaling"],
    ["ops", "errors", "files", "habits", "environment", "processes"],
]
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}
ROOT = Path(gnunet.__file__).parent


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str, path: Path, known: set[str]) -> Iterator[str]:
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{source}.{alias.name}"
                if name in known or source in known:
                    yield name if name in known else source


def graph() -> dict[str, set[str]]:
    found = modules()
    return {module: set(imports(module, path, set(found))) - {module} for module, path in found.items()}


def room_of(module: str) -> str:
    return (module.split(".") + [""])[1]


def test_no_import_runs_upward():
    for module, imported in graph().items():
        room = room_of(module)
        for other in imported:
            if room and room_of(other) not in ("", room):
                assert FLOOR_OF[room] < FLOOR_OF[room_of(other)], f"{module} imports {other}"


def test_no_circle():
    # A package's own file gathers what is below it and is what others outside import.
    packages = {module for module, path in modules().items() if path.name == "__init__.py"}
    below = {m: {n for n in others if not (n in packages and m.startswith(f"{n}."))} for m, others in graph().items()}
    assert list(TopologicalSorter(below).static_order())


def test_reports_import_nothing_that_trains():
    imported, reached = graph(), set()
    queue = [m for m in imported if m.startswith(("gnunet.ablation.analysis", "gnunet.ablation.figures"))]
    while queue:
        module = queue.pop()
        if module not in reached:
            reached.add(module)
            queue += imported[module] - {"gnunet"}  # which imports on attribute access
    runs_trials = {f"gnunet.ablation.{name}" for name in ("trial", "measure", "runner")}
    assert "gnunet.ablation.plan" in reached
    assert not [m for m in reached if m in runs_trials or room_of(m) in ("training", "distributed")]
