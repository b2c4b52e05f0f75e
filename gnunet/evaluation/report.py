"""What an evaluation prints and writes."""

import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from gnunet.environment import device_name
from gnunet.errors import ConfigError
from gnunet.evaluation.metrics import FeatureMetric
from gnunet.evaluation.neighbours import Neighbours
from gnunet.evaluation.validation import ValidationResult
from gnunet.files import atomic_write


def versions(device: torch.device) -> dict[str, str]:
    """What the last digits may depend on."""
    return {"torch": torch.__version__, "device": device_name(device)}


def summarize(metrics: Sequence[FeatureMetric], repeats: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Each metric's mean over the repeats, their standard deviation, and the values one by one."""
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
    """What made the images and what they are compared with, and a table with a line for each metric."""
    repeats, num_images = record["repeats"], record["num_images"]
    table = Table()
    table.add_column("metric", no_wrap=True)
    for column in ["mean", "spread", "lowest", "highest"] if repeats > 1 else ["value", "standard error"]:
        table.add_column(column, justify="right", no_wrap=True)
    for name, entry in record["metrics"].items():
        if repeats > 1:
            cells = [entry["mean"], entry["standard_deviation"], min(entry["values"]), max(entry["values"])]
        else:
            cells = [entry["mean"], *entry.get("standard_errors", [None])]
        numbers = ["" if cell is None else f"{cell:.6g}" for cell in cells]
        table.add_row(name, *numbers)
    reference = record["reference"]
    side, number, source = reference["resolution"], reference["num_images"], reference["source"]
    times = f"{repeats} times " if repeats > 1 else ""
    return [f"{_made(record)}: {times}n = {num_images}\nagainst {source}: {number} images of {side} x {side}", table]


def _made(record: Mapping[str, Any]) -> str:
    images = record["images"]
    if "sampler" not in images:
        return record["name"]
    first, last = images["seeds"][0], images["seeds"][-1]
    seeds = f"seed {first}" if first == last else f"seeds {first} to {last}"
    return f"{record['name']} ({images['sampler']}, {images['steps']} steps, guidance {images['guidance']:g}, {seeds})"


def neighbours_record(neighbours: Neighbours, extractor: str) -> dict[str, Any]:
    """What is written of the nearest training images."""
    return {
        "extractor": extractor,
        "num_images": len(neighbours.rows),
        "distance_ratio": neighbours.distance_ratio,
        "near_duplicate_rate": neighbours.near_duplicate_rate,
        "threshold": neighbours.threshold,
        "rows": neighbours.rows.tolist(),
        "distances": neighbours.distances.tolist(),
    }


def neighbours_lines(record: Mapping[str, Any]) -> list[str]:
    """The numbers of the nearest training images, with how to read them."""
    return [
        f"nearest training images of {record['num_images']} images, by {record['extractor']}:",
        f"  distance ratio {record['distance_ratio']:.4g}  (copies 0; fresh images of the same kind about 1)",
        f"  near share     {record['near_duplicate_rate']:.4g}  (copies 1; fresh images of the same kind about 0.05)",
    ]


def validation_record(result: ValidationResult) -> dict[str, Any]:
    """What is written of a validation loss."""
    return {
        "validation_loss": result.mean,
        "standard_error": result.standard_error,
        "by_log_snr": result.bins,
        "by_log_snr_standard_errors": result.bin_standard_errors,
    }


def validation_report(record: Mapping[str, Any]) -> list[Any]:
    """The validation set, and a table with a line for each bin of log-SNR and a column for each kind of weights."""
    val_set = record["bank"]
    table = Table()
    table.add_column("log-SNR", justify="right")
    for name in record["weights"]:
        table.add_column(name, justify="right", no_wrap=True)
        table.add_column("standard error", justify="right", no_wrap=True)
    results = list(record["weights"].values())
    for b, (low, high) in enumerate(val_set["bins"]):
        cells = [(result["by_log_snr"][b], result["by_log_snr_standard_errors"][b]) for result in results]
        table.add_row(f"{low:g} to {high:g}", *(_number(value) for pair in cells for value in pair))
    table.add_section()
    means = [(result["validation_loss"], result["standard_error"]) for result in results]
    table.add_row("mean", *(_number(value) for pair in means for value in pair))
    return [
        f"{record['name']}: squared error of v by log-SNR, to be compared on the same validation set only\n"
        f"validation set {val_set['fingerprint'][:16]}: {val_set['num_examples']} examples of {val_set['source']}",
        table,
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"


def open_folder(given: Path | None, name: str) -> Path:
    """The folder that results go to; ConfigError where it cannot be made."""
    out = given or Path("evaluations") / name
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be made: {error.strerror}") from None
    return out


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    atomic_write(path, json.dumps(record, indent=1) + "\n")


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write a PNG, whole or not at all."""
    png = io.BytesIO()
    picture.save(png, format="PNG")
    atomic_write(path, png.getvalue())


def show(*parts: Any) -> None:
    """Print tables and lines of text."""
    console = Console(highlight=False, soft_wrap=True)
    for part in parts:
        console.print(part, markup=False)
