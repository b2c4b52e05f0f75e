"""What an evaluation prints and writes."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from gnunet.errors import CheckpointError
from gnunet.evaluation.metrics import FeatureMetric
from gnunet.evaluation.neighbours import NEAR_QUANTILE, Neighbours
from gnunet.files import atomic_write
from gnunet.safe_io import read_json
from gnunet.scaling import as_size


def versions(device: torch.device) -> dict[str, str]:
    """What the last digits may depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"torch": torch.__version__, "device": name}


def summarize(metrics: Sequence[FeatureMetric], repeats: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Each metric's mean and standard deviation over the repeats, and its values."""
    summary: dict[str, dict[str, Any]] = {}
    for name in (metric.name for metric in metrics):
        values = [repeat[name] for repeat in repeats]
        summary[name] = {"mean": statistics.fmean(values), "values": values}
        if len(values) > 1:
            summary[name]["standard_deviation"] = statistics.stdev(values)
        if f"{name}_standard_error" in repeats[0]:
            summary[name]["standard_errors"] = [repeat[f"{name}_standard_error"] for repeat in repeats]
    return summary


def metrics_report(record: Mapping[str, Any]) -> list[Any]:
    """What was measured against what, a table with a line for each metric, and notes."""
    repeats, num_images, images, reference = (record[key] for key in ("repeats", "num_images", "images", "reference"))
    subject = record["name"]
    if "sampler" in images:
        seeds = "seed " + " to ".join(map(str, sorted({images["seeds"][0], images["seeds"][-1]})))
        settings = f"{images['sampler']}, {images['steps']} steps, guidance {images['guidance']:g}, {seeds}"
        subject = f"{subject} ({settings})"
    times = f"{repeats} times " if repeats > 1 else ""
    size = "{} x {}".format(*as_size(reference["resolution"]))
    table = Table()
    table.add_column("metric", no_wrap=True)
    for column in ["mean", "std", "min", "max"] if repeats > 1 else ["value", "standard error"]:
        table.add_column(column, justify="right", no_wrap=True)
    for name, entry in record["metrics"].items():
        if repeats > 1:
            numbers = [entry["mean"], entry["standard_deviation"], min(entry["values"]), max(entry["values"])]
        else:
            numbers = [entry["mean"], *entry.get("standard_errors", [None])]
        table.add_row(name, *(_format(number, ".6g") for number in numbers))
    return [
        f"{subject}: {times}n = {num_images}",
        f"against {reference['source']}: {reference['num_images']} images of {size}",
        table,
        *(f"note: {note}" for note in record["notes"]),
    ]


def neighbours_record(neighbours: Neighbours, extractor: str) -> dict[str, Any]:
    """What is written of the nearest training images."""
    values = {name: np.asarray(value).tolist() for name, value in vars(neighbours).items()}
    return {"extractor": extractor, "num_images": len(neighbours.rows), **values}


def neighbours_report(record: Mapping[str, Any]) -> list[str]:
    """The numbers of the nearest training images, and how to read them."""
    ratio, rate = record["distance_ratio"], record["near_duplicate_rate"]
    return [
        f"nearest training images of {record['num_images']} images, by {record['extractor']}:",
        f"  distance ratio       {ratio:.4g}  (copies 0; new images of the same kind about 1)",
        f"  near-duplicate rate  {rate:.4g}  (copies 1; new images of the same kind about {NEAR_QUANTILE})",
    ]


def validation_report(record: Mapping[str, Any]) -> list[Any]:
    """The validation set, and a table with a line for each bin of log-SNR and two columns for each kind of weights."""
    val_set, results = record["bank"], record["weights"].values()
    table = Table()
    table.add_column("log-SNR", justify="right")
    for name in record["weights"]:
        table.add_column(name, justify="right", no_wrap=True)
        table.add_column("standard error", justify="right", no_wrap=True)
    for b, (low, high) in enumerate(val_set["bins"]):
        numbers = [result[key][b] for result in results for key in ("by_log_snr", "by_log_snr_standard_errors")]
        table.add_row(f"{low:g} to {high:g}", *(_format(number, ".5f") for number in numbers))
    table.add_section()
    means = [result[key] for result in results for key in ("validation_loss", "standard_error")]
    table.add_row("mean", *(_format(number, ".5f") for number in means))
    return [
        f"{record['name']}: squared error of v by log-SNR; compare on the same validation set only",
        f"validation set {val_set['fingerprint'][:16]}: {val_set['num_examples']} examples of {val_set['source']}",
        table,
    ]


def _format(number: float | None, spec: str) -> str:
    return "" if number is None else format(number, spec)


def has_same_inputs(file: Path, record: Mapping[str, Any]) -> bool:
    """Whether a file is missing or has a record of the same evaluation, which `record` may replace."""
    if not file.exists():
        return True
    try:
        found = read_json(file)
    except CheckpointError:
        return False
    return _inputs(found) == _inputs(json.loads(json.dumps(record)))


def _inputs(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says about what was measured, without the results."""
    measured = {name: sorted(record[name]) for name in ("metrics", "weights") if isinstance(record.get(name), dict)}
    inputs = ("name", "source", "num_images", "repeats", "images", "reference", "extractors", "bank", "checkpoints")
    return {"nearest": "nearest" in record, **measured, **{name: record.get(name) for name in inputs}}


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    atomic_write(path, json.dumps(record, indent=1) + "\n")


def print_all(*parts: Any) -> None:
    """Print tables and lines of text."""
    console = Console(highlight=False, soft_wrap=True)
    for part in parts:
        console.print(part, markup=False)
