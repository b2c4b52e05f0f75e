"""The training history of a run, from its logs."""

import statistics
from pathlib import Path
from typing import Any

from gnunet.checkpoint.jsonl import read_jsonl

CURVE = ("images", "loss", "grad_norm", "learning_rate")


def training_history(run: Path) -> dict[str, Any]:
    """`curve`, `validation` and `metrics` of a record, from a run's metrics.jsonl."""
    lines = read_jsonl(run / "metrics.jsonl")
    evaluations = [line for line in lines if "evaluation_num_images" in line]
    metrics = evaluations[-1] if evaluations else {}
    return {
        "curve": [{key: line[key] for key in CURVE} for line in lines if "loss" in line],
        "validation": [
            {
                "images": line["images"],
                "validation_loss": line["validation_loss"],
                "by_log_snr": line["validation_loss_by_log_snr"],
            }
            for line in lines
            if "validation_loss" in line
        ],
        "metrics": {key: metrics[key] for key in metrics if key != "images" and not key.startswith("evaluation_")},
    }


def times(run: Path) -> dict[str, Any]:
    """Median `images_per_second`, `wall_seconds` and `seconds_at` of a run's training steps, over all interruptions.

    None and empty where nothing was timed.
    """
    lines = read_jsonl(run / "timing.jsonl")
    speeds = [line["images_per_second"] for line in lines if line["images_per_second"]]
    if not speeds:
        return {"images_per_second": None, "wall_seconds": None, "seconds_at": []}
    usual = statistics.median(speeds)
    images, seconds, seconds_at = 0, 0.0, []
    for line in lines:
        # A line after a stop may have no steps.
        seconds += (line["images"] - images) / (line["images_per_second"] or usual)
        images = line["images"]
        seconds_at.append([images, round(seconds, 3)])
    return {"images_per_second": usual, "wall_seconds": round(seconds, 3), "seconds_at": seconds_at}
