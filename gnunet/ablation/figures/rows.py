"""The rows that figures list variants in."""

import math
from dataclasses import dataclass

from gnunet.ablation.analysis.results import Contrast, Results
from gnunet.ablation.analysis.statistics import Difference


@dataclass(frozen=True)
class Row:
    """A contrast with the baseline, or a heading over those that follow."""

    label: str
    contrast: Contrast | None = None
    difference: Difference | None = None


def contrast_rows(results: Results, metric: str) -> list[Row]:
    """Every contrast of a study with its difference, in groups with a heading.

    Contrasts at one setting of the axes are a group, from the lowest difference to the highest. Where a
    variant is alone on its axes, its settings are a group, in the axes' order.
    """
    by_axes: dict[tuple[str, ...], list[Contrast]] = {}
    for contrast in results.contrasts:
        by_axes.setdefault(tuple(axis for axis, _ in contrast.setting), []).append(contrast)
    rows: list[Row] = []
    for _, contrasts in sorted(by_axes.items(), key=lambda item: len(item[0]) > 0):  # those without a heading first
        variants = list(dict.fromkeys(contrast.left.variant for contrast in contrasts))
        if len(variants) == 1 and contrasts[0].setting:
            titles = ", ".join(results.study.axes[axis].label for axis, _ in contrasts[0].setting)
            rows.append(Row(f"{variants[0]}: {titles}"))
            rows += [_row(results, ", ".join(value for _, value in c.setting), c, metric) for c in contrasts]
            continue
        for setting in dict.fromkeys(contrast.setting for contrast in contrasts):
            if heading := results.place(setting):
                rows.append(Row(heading))
            group = [_row(results, c.left.variant, c, metric) for c in contrasts if c.setting == setting]
            rows += sorted(group, key=_order)
    return rows


def _row(results: Results, label: str, contrast: Contrast, metric: str) -> Row:
    return Row(label, contrast, results.compare(contrast.left, contrast.right, metric))


def _order(row: Row) -> tuple[bool, float]:
    relative = row.difference.relative
    unknown = relative is None or math.isnan(relative)
    return unknown, 0.0 if unknown else relative
