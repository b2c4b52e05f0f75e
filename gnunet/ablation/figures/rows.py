"""The rows that figures list arms in."""

import math
from dataclasses import dataclass

from gnunet.ablation.analysis.results import Contrast, Results
from gnunet.ablation.analysis.statistics import Difference


@dataclass(frozen=True)
class Row:
    """A contrast with the base arm, or a heading over those that follow."""

    label: str
    contrast: Contrast | None = None
    difference: Difference | None = None


def contrast_rows(results: Results, metric: str) -> list[Row]:
    """Every contrast of a study with its difference, in groups with a heading.

    Contrasts at one point of the axes are a group, from the lowest difference to the highest. Where an arm is alone
    on its axes, its points are a group, in the axes' order.
    """
    by_axes: dict[tuple[str, ...], list[Contrast]] = {}
    for contrast in results.contrasts:
        by_axes.setdefault(tuple(axis for axis, _ in contrast.point), []).append(contrast)
    rows: list[Row] = []
    for _, contrasts in sorted(by_axes.items(), key=lambda item: len(item[0]) > 0):  # those without a heading first
        arms = list(dict.fromkeys(contrast.left.arm for contrast in contrasts))
        if len(arms) == 1 and contrasts[0].point:
            titles = ", ".join(results.study.axes[axis].label for axis, _ in contrasts[0].point)
            rows.append(Row(f"{arms[0]}: {titles}"))
            rows += [_row(results, ", ".join(value for _, value in c.point), c, metric) for c in contrasts]
            continue
        for point in dict.fromkeys(contrast.point for contrast in contrasts):
            if heading := results.place(point):
                rows.append(Row(heading))
            group = [_row(results, c.left.arm, c, metric) for c in contrasts if c.point == point]
            rows += sorted(group, key=_order)
    return rows


def _row(results: Results, label: str, contrast: Contrast, metric: str) -> Row:
    return Row(label, contrast, results.compare(contrast.left, contrast.right, metric))


def _order(row: Row) -> tuple[bool, float]:
    relative = row.difference.relative
    unknown = relative is None or math.isnan(relative)
    return unknown, 0.0 if unknown else relative
