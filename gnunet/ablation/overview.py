"""A plan in words."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from gnunet.ablation.plan import Cell, Plan, Point, Records
from gnunet.ablation.study import Study


def show_plan(study: Study, plan: Plan, records: Records) -> None:
    """Print what tuning chose and how many cells are done for each arm at each point, and sums."""
    groups: dict[tuple[str, Point], list[Cell]] = {}
    for cell in [*plan.tuning_cells, *plan.cells]:
        groups.setdefault((cell.arm, cell.point), []).append(cell)
    axes = [axis for axis in study.axes if any(axis in dict(point) for _, point in groups)]
    table = Table()
    for column in ("arm", *axes, *([study.tuning.key] if study.tuning else [])):
        table.add_column(column, no_wrap=True)
    for column in ("cells", "done", "diverged"):
        table.add_column(column, justify="right", no_wrap=True)
    for (arm, point), cells in groups.items():
        chosen = [plan.chosen.get((arm, point), "to be tuned")] if study.tuning else []
        found = [records[cell.name] for cell in cells if cell.name in records]
        diverged = sum(record["outcome"] == "diverged" for record in found)
        numbers = (len(cells), len(found), diverged or "")
        table.add_row(arm, *(dict(point).get(axis, "") for axis in axes), *chosen, *map(str, numbers))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(sums(study, plan, records), markup=False)


def sums(study: Study, plan: Plan, records: Records) -> str:
    """How many cells there are, how many of them are one run with others, done, and to run."""
    cells = [*plan.tuning_cells, *plan.cells]
    names = {cell.name for cell in cells}
    arms, points = {cell.arm for cell in cells}, {(cell.arm, cell.point) for cell in cells}
    parts = [f"{_count(arms, 'arm')}, {len(points)} with their points, {_count(study.seeds, 'seed')}"]
    if study.tuning is not None:
        tries = _count(study.tuning.values, "value")
        parts.append(f"tuning of {tries} on {_count(study.tuning.seeds, 'seed')}: {len(plan.tuning_cells)} cells")
    if plan.waiting:
        parts.append(f"cells to report at {len(plan.waiting)} points wait for it")
    shared = f", {len(cells) - len(names)} of them shared" if len(names) < len(cells) else ""
    done = len(names & records.keys())
    return f"{'; '.join(parts)}\n{len(cells)} cells{shared}: {done} done, {len(names) - done} to run"


def _count(things: Sequence | set, name: str) -> str:
    return f"{len(things)} {name}" + ("" if len(things) == 1 else "s")
