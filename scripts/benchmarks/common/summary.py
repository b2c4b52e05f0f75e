"""What benchmark_op.py reports: shares of the copy bandwidth, ratios, their geometric means, targets; table, chart."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.record import rounded, target, verdict
from common.shapes import Case

OURS, COPY, RMS_NORM = "gnunet", "copy", "rms_norm"
MINIMUM_TENSORS = {"forward": 2, "backward": 3, "both": 5}
"""Tensors of x's size that each direction has to read or write: x and y; x, dy and dx."""
_LARGE = 64e6  # bytes of a tensor from which on the share of the copy bandwidth has a target
_SHARE_TARGETS = {"forward": 0.85, "backward": 0.75}
_COMPILE_TARGET, _EAGER_TARGET = 1.3, 3.0
_SHORT = {"channels_last": "nhwc", "contiguous": "nchw", "bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_MARKERS = {OURS: "o", COPY: "|", RMS_NORM: "|"}
_NAMES = {
    OURS: "gnunet (auto)", COPY: "copy of as many bytes", RMS_NORM: "F.rms_norm", "compile": "torch.compile",
    "eager_channels_last": "PyTorch NHWC", "eager_contiguous": "PyTorch NCHW", "gnunet_cuda": "gnunet (cuda)",
    "gnunet_triton": "gnunet (triton)", "liger": "Liger", "apex": "Apex",
}  # fmt: skip
_COLORS = {OURS: "C3", COPY: "0.5", RMS_NORM: "0.7"}


def minimum_bytes(case: Case, direction: str) -> int:
    """What a direction moves where every tensor is read or written once."""
    return MINIMUM_TENSORS[direction] * case.tensor_bytes


def fits_one_pass(case: Case, direction: str, cache_bytes: int) -> bool:
    """Whether the groups worked on together stay on chip, so that what a direction reads can be read once.

    They are taken to do so up to half of the last-level cache; in backward dy takes as much room as x.
    """
    return case.working_set * (1 if direction == "forward" else 2) <= cache_bytes / 2


def timing(seconds: list[float], ours: list[float] | None, floor_bytes: int, bandwidth: float) -> dict[str, Any]:
    """A contender's numbers in one direction.

    Args:
        seconds, ours: of a call, this contender's and the operator's, round by round.
        floor_bytes: what has to be moved.
        bandwidth: of a large copy, in bytes per second.

    Returns:
        `us`, the median; `us_quartiles`; `share`, of the copy bandwidth at the fewest bytes; `ratio`, the median of
        the rounds' ratios to the operator's time, where there is one.
    """
    median = statistics.median(seconds)
    result = {
        "us": rounded(median * 1e6),
        "us_quartiles": [rounded(q * 1e6) for q in statistics.quantiles(seconds, n=4)[::2]],
        "share": rounded(floor_bytes / median / bandwidth),
    }
    if ours:
        result["ratio"] = rounded(statistics.median(t / our for t, our in zip(seconds, ours, strict=True)))
    return result


def ratios(cases: Iterable[dict[str, Any]], peer: str, direction: str) -> dict[str, float]:
    """A peer's time over the operator's, by the cases' labels, where both were timed."""
    found = {case["label"]: case["results"].get(peer, {}).get(direction, {}).get("ratio") for case in cases}
    return {label: ratio for label, ratio in found.items() if ratio is not None}


def geometric_means(cases: list[dict[str, Any]], peers: Iterable[str]) -> dict[str, dict[str, float]]:
    """Of the ratios to each peer, in each direction."""
    means: dict[str, dict[str, float]] = {}
    for peer in peers:
        for direction in MINIMUM_TENSORS:
            found = list(ratios(cases, peer, direction).values())
            if found:
                means.setdefault(peer, {})[direction] = rounded(statistics.geometric_mean(found))
    return means


def targets(cases: list[dict[str, Any]], planned: int, peers: Sequence[str]) -> list[dict[str, Any]]:
    """What was aimed at on a GPU, with the number of cases that count and the one that decides.

    Args:
        cases: those that were checked, some of them timed.
        planned: how many are to be. Until all of them are timed, a target is missed or open.
        peers: what the operator is compared with.
    """
    wrong = [case["label"] for case in cases if not is_right(case)]
    timed = [case for case in cases if is_timed(case)]
    is_complete = len(timed) == planned
    found: list[dict[str, Any]] = []

    def add(what: str, value: float | None, least: float, **more: Any) -> None:
        one = target(what, value, least)
        found.append((one if is_complete or one["met"] is False else one | {"met": None}) | more)

    def add_least(what: str, values: dict[str, float], least: float) -> None:
        at = min(values, key=values.__getitem__, default=None)
        value = None if at is None else values[at]
        add(f"{what}, least", value, least, cases=len(values), at=at)

    def add_mean(what: str, values: dict[str, float], least: float) -> None:
        mean = rounded(statistics.geometric_mean(values.values())) if values else None
        add(f"{what}, geometric mean", mean, least, cases=len(values), at=None)

    right = target(f"cases of {planned} that are right", len(cases) - len(wrong), planned)
    right["met"] = False if wrong else True if len(cases) == planned else None
    found.append(right | {"at": wrong[0] if wrong else None, "is_timing": False})
    for direction, least in _SHARE_TARGETS.items():
        shares = {
            case["label"]: case["results"][OURS][direction]["share"]
            for case in timed
            if case["tensor_bytes"] >= _LARGE and case["fits_one_pass"][direction]
            if "share" in case["results"][OURS].get(direction, {})
        }
        add_least(f"{direction}: share of the copy bandwidth", shares, least)
    channels_last = [case for case in timed if case["layout"] == "channels_last"]
    for direction in MINIMUM_TENSORS:
        if "compile" in peers:
            compiled = ratios(timed, "compile", direction)
            add_least(f"{direction}: ratio to torch.compile", compiled, 1.0)
            add_mean(f"{direction}: ratio to torch.compile", compiled, _COMPILE_TARGET)
        if "eager_channels_last" in peers:
            eager = ratios(channels_last, "eager_channels_last", direction)
            add_mean(f"{direction}: ratio to eager channels_last", eager, _EAGER_TARGET)
    return found


def is_timed(case: dict[str, Any]) -> bool:
    """Whether there are times of the operator."""
    return any(direction in case["results"][OURS] for direction in MINIMUM_TENSORS)


def is_right(case: dict[str, Any]) -> bool:
    """Whether the operator's results are, and none of its measurements failed."""
    ours = case["results"][OURS]
    return ours["status"] == "right" and not any("failed" in ours.get(d, {}) for d in MINIMUM_TENSORS)


def short(label: str) -> str:
    """A label with the field's short names for layouts and types."""
    for long, brief in _SHORT.items():
        label = label.replace(long, brief)
    return label


def print_summary(record: dict[str, Any]) -> None:
    """A line for each case, what went wrong, the geometric means and the targets."""
    console = Console(width=160, highlight=False, markup=False)
    peers = list(record["geometric_means"])
    table = Table("case", box=None, pad_edge=False, header_style="none")
    columns = [f"{direction} {what}" for direction in ("fwd", "bwd") for what in ("us", "copy us", "rms us", "share")]
    for column in ("MB", *columns, *(f"vs {short(peer)}" for peer in peers), "error"):
        table.add_column(column, justify="right")
    for case in record["cases"]:
        ours = case["results"][OURS]
        numbers = []
        for direction in _SHARE_TARGETS:
            numbers += [case["results"].get(name, {}).get(direction, {}).get("us") for name in (OURS, COPY, RMS_NORM)]
            numbers.append(ours.get(direction, {}).get("share"))
        numbers += [ratios([case], peer, "both").get(case["label"]) for peer in peers]
        error = f"{max(ours['errors'].values()):.1e}" if "errors" in ours else "-"
        cells = ["-" if number is None else f"{number:.4g}" for number in (case["tensor_bytes"] / 1e6, *numbers)]
        table.add_row(short(case["label"]), *cells, error)
    console.print(table)
    console.print(
        "us: of the operator, of a copy of as many bytes, of F.rms_norm over as many; share: of a large copy's "
        "bandwidth\nvs: the peer's time over the operator's, forward and backward together; error: the largest\n"
    )
    for case in record["cases"]:
        for name, result in case["results"].items():
            broken = [f"{d} {result[d]['failed']}" for d in MINIMUM_TENSORS if "failed" in result.get(d, {})]
            if result["status"].startswith(("failed", "wrong")) or broken:
                console.print(f"{short(case['label'])}: {name}: {result['status']} {' '.join(broken)}")
    for peer, means in record["geometric_means"].items():
        console.print(f"{short(peer)}, mean ratio:", ", ".join(f"{key} {value:g}" for key, value in means.items()))
    for one in record["targets"]:
        where = f", at {short(one['at'])}" if one["at"] else ""
        over = f" over {one['cases']} cases" if "cases" in one else ""
        console.print(f"{verdict(one)}{over}{where}")
    if record["not_run"]:
        console.print(f"not timed: {len(record['not_run'])} cases: {', '.join(map(short, record['not_run']))}")


def draw_chart(record: dict[str, Any], path: Path) -> None:
    """Write a chart of each contender's share of the copy bandwidth: a row for each case, the largest tensor on top."""
    from matplotlib.figure import Figure  # an extra, which nothing else here needs

    cases = sorted(record["cases"], key=lambda case: (case["tensor_bytes"], case["label"]))
    names = {name for case in cases for name, result in case["results"].items() if "forward" in result}
    figure = Figure(figsize=(10, 1.8 + 0.19 * len(cases)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, direction in zip(panels, ("forward", "backward"), strict=True):
        for name in sorted(names, key=lambda name: (name == OURS, name)):  # the operator over the others
            shares = [case["results"].get(name, {}).get(direction, {}).get("share") for case in cases]
            points = [(100 * share, row) for row, share in enumerate(shares) if share is not None]
            panel.plot(
                [x for x, _ in points], [y for _, y in points], _MARKERS.get(name, "."), label=_NAMES.get(name, name),
                color=_COLORS.get(name), linestyle="none",
            )  # fmt: skip
        panel.set_xlim(left=0)
        panel.set_xlabel(f"{direction}: % of a copy's bandwidth, at minimum bytes", fontsize=9)
        panel.grid(color="0.9")
    labels = [f"{short(case['label'])}, {case['tensor_bytes'] / 1e6:.3g} MB" for case in cases]
    panels[0].set_yticks(range(len(cases)), labels, fontsize=7)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=(len(names) + 1) // 2, fontsize=8,
        frameon=False,
    )  # fmt: skip
    figure.suptitle(f"silu(group_norm(x)): {record['device']}, torch {record['torch']}, {record['date']}", fontsize=10)
    figure.savefig(path, dpi=150)
