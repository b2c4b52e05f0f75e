"""The record of a finished trial, one JSON file each, and the metrics in it.

All of a record but `times` is the same however often the trial was interrupted.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gnunet.checkpoint.jsonl import nan_to_null
from gnunet.config import Config
from gnunet.config.renamed_keys import with_new_names
from gnunet.errors import CheckpointError
from gnunet.evaluation.validation import summarize
from gnunet.files import atomic_write
from gnunet.safe_io import read_json

FORMAT = 1
LOSSES = {"validation_loss": "running", "validation_loss_precise": "precise", "validation_loss_batch": "batch"}
"""The validation losses, and the statistics of batch-dependent norms in each."""
NEAREST = ("nearest_distance_ratio", "nearest_near_share")
TIMES = ("images_per_second", "wall_seconds", "peak_memory_mib", "norm_share")
HIGHER_IS_BETTER = ("images_per_second", "precision_", "recall_")
"""Prefixes of the names of metrics that are better where they are higher."""


def record_path(folder: Path, name: str) -> Path:
    """The record of the trial with this name in a study's folder."""
    return folder / "records" / f"{name}.json"


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """The records in a study's folder by trial name; CheckpointError for a corrupted one or another format."""
    records = {}
    for path in sorted((folder / "records").glob("*.json")):
        try:
            record = read_json(path)
        except CheckpointError as error:
            raise CheckpointError(f"{error}: no record; remove it to run the trial again") from None
        if (found := record.get("format")) != FORMAT:
            raise CheckpointError(f"{path}: record format {found}; this version reads format {FORMAT}")
        records[path.stem] = {**record, "config": with_new_names(record.get("config", {}))}
    return records


def write_record(folder: Path, record: Mapping[str, Any]) -> Path:
    """Write a record atomically, a line for each key; non-finite numbers become null."""
    path = record_path(folder, record["cell"])
    lines = [f" {json.dumps(key)}: {json.dumps(nan_to_null(value), allow_nan=False)}" for key, value in record.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return path


def metric_names(config: Config) -> list[str]:
    """The metrics that `metric_value` finds in the records of trials with such a configuration."""
    evaluate = config.evaluate
    scores = [] if evaluate.every is None else [*dict.fromkeys(evaluate.metrics), *NEAREST]
    return [*LOSSES, *scores, "saved_mib", *TIMES]


def metric_value(record: Mapping[str, Any], name: str) -> float | None:
    """A metric of a complete trial by its name (see `metric_names`); None where it was not measured.

    The validation losses are means over the bins of log-SNR of the mean error in each.
    """
    if record["outcome"] != "complete":
        return None
    if name in LOSSES:
        errors, bank = errors_in(record, name), record["bank"]
        if errors is None or not np.isfinite(errors).all():
            return None
        return summarize(errors, np.array(bank["bins"]), len(bank["log_snr_edges"]) - 1).validation_loss
    if name in NEAREST:
        return (record["nearest"] or {}).get(name.removeprefix("nearest_"))
    if name in TIMES:
        return record["times"][name]
    return record[name] if name == "saved_mib" else record["metrics"].get(name)


def errors_in(record: Mapping[str, Any], loss: str) -> np.ndarray | None:
    """The per-example errors of a validation loss, float64 (n,), NaN where infinite; None where they were not measured.

    A network without batch-dependent norms has the same errors for all three losses.
    """
    found = record["errors"][LOSSES[loss]] or record["errors"]["running"]
    return None if found is None else np.array(found, np.float64)


def rank(record: Mapping[str, Any], name: str) -> float:
    """A metric as a value to minimize; infinite for a trial that diverged or did not measure it."""
    value = metric_value(record, name)
    if value is None:
        return math.inf
    return -value if name.startswith(HIGHER_IS_BETTER) else value
