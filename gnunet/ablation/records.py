"""The record of a finished trial, one JSON file each, and the metrics in it.

All of a record but `times` is the same however often the trial was interrupted. What trials with one validation set
share of it is in a file of its own, the bank (see `gnunet.ablation.bank`).
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gnunet.checkpoint.jsonl import nan_to_null
from gnunet.config import Config
from gnunet.config.renamed_keys import with_new_names
from gnunet.errors import CheckpointError
from gnunet.files import atomic_write
from gnunet.safe_io import read_json

FORMAT = 1
STATISTICS = ("running", "precise", "batch")
"""The statistics that batch-dependent norms are validated with; others have no more than the first."""
LOSSES = {
    f"{loss}_{statistics}".removesuffix("_running"): (loss, statistics)
    for loss in ("training_loss", "validation_loss", "error_rate")
    for statistics in STATISTICS
}
"""Means over the validation set, by what is averaged and by statistics: errors, weighted as in training or uniform in
log-SNR, and what a classifier gets wrong."""
Outcome = Literal["complete", "collapsed", "diverged"]
NEAREST = ("nearest_distance_ratio", "nearest_near_share")
TIMES = ("images_per_second", "wall_seconds", "peak_memory_mib", "norm_share")
HIGHER_IS_BETTER = ("images_per_second", "precision_", "recall_", "nearest_distance_ratio", "stability_edge")
"""Prefixes of the names of metrics that are better where they are higher."""


def record_path(folder: Path, name: str) -> Path:
    """The record of the trial with this name in a study's folder."""
    return folder / "records" / f"{name}.json"


def bank_path(folder: Path, name: str) -> Path:
    """The bank with this name in a study's folder."""
    return folder / "banks" / f"{name}.json"


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """The records in a study's folder by trial name; see `read_record`."""
    banks: dict[str, dict[str, Any]] = {}
    return {path.stem: read_record(folder, path.stem, banks) for path in sorted((folder / "records").glob("*.json"))}


def read_record(folder: Path, name: str, banks: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """The record of a trial, with the contents of its bank in `bank`; `banks` has those that are read, by name.

    Raises:
        CheckpointError: it is corrupted or of another format, or its bank is missing or corrupted.
    """
    path, banks = record_path(folder, name), {} if banks is None else banks
    record = _read(path, "record")
    if (found := record.get("format")) != FORMAT:
        raise CheckpointError(f"{path}: record format {found}; this version reads format {FORMAT}")
    if (bank := record["bank"].get("name")) is not None:  # None: until 0.1.0, when records had bins themselves
        if bank not in banks:
            banks[bank] = _read(bank_path(folder, bank), "bank")
        record["bank"] |= banks[bank]
    return {**record, "config": with_new_names(record.get("config", {}))}


def _read(path: Path, what: str) -> dict[str, Any]:
    try:
        return read_json(path)
    except CheckpointError as error:
        hint = "remove it" if what == "record" else "remove the records that name it"
        raise CheckpointError(f"{error}: no {what}; {hint} to run the trial again") from None


def write_record(folder: Path, record: Mapping[str, Any]) -> Path:
    """Write a record to a study's folder; returns its path."""
    path = record_path(folder, record["cell"])
    _write(path, record)
    return path


def save_bank(folder: Path, name: str, bank: Mapping[str, Any]) -> None:
    """Write a bank to a study's folder; several processes may do so at a time."""
    path = bank_path(folder, name)
    own = path.with_name(f".{path.name}.{os.getpid()}")
    _write(own, bank)
    os.replace(own, path)


def _write(path: Path, values: Mapping[str, Any]) -> None:
    """Write values atomically, a line for each key; non-finite numbers become null."""
    lines = [f" {json.dumps(key)}: {json.dumps(nan_to_null(value), allow_nan=False)}" for key, value in values.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, "{\n" + ",\n".join(lines) + "\n}\n")


def metric_names(config: Config, task: str = "diffusion") -> list[str]:
    """The metrics that `metric_value` finds in the records of a task's trials with such a configuration."""
    other = "training_loss" if task == "classification" else "error_rate"
    losses = [name for name, (loss, _) in LOSSES.items() if loss != other]
    evaluate = config.evaluate
    has_samples = task == "diffusion" and evaluate.every is not None
    scores = [*dict.fromkeys(evaluate.metrics), *NEAREST] if has_samples else []
    return [*losses, *scores, "saved_mib", *TIMES]


def outcome_of(record: Mapping[str, Any]) -> Outcome:
    """How a trial ended: collapsed where its loss, weighted as in training, is no less than that of the `scalar`
    predictor, which knows no more of the images than their mean and variance; or a classifier's error rate no less than
    that of the most frequent class."""
    bank, is_classifier = record["bank"], "chance" in record["bank"]
    value = metric_value(record, "error_rate" if is_classifier else "training_loss")
    if value is None:
        return record["outcome"]
    trivial = (
        bank["chance"] if is_classifier else example_weights(record, "training_loss") @ bank["predictors"]["scalar"]
    )
    return "collapsed" if value >= trivial else "complete"


def metric_value(record: Mapping[str, Any], name: str) -> float | None:
    """A metric of a complete trial by its name (see `metric_names`); None where it was not measured."""
    if record["outcome"] != "complete":
        return None
    if name in LOSSES:
        errors, weights = errors_in(record, name), example_weights(record, name)
        if errors is None or weights is None or not np.isfinite(errors).all():
            return None
        return float(weights @ errors)
    if name in NEAREST:
        return (record["nearest"] or {}).get(name.removeprefix("nearest_"))
    if name in TIMES:
        return record["times"][name]
    return record[name] if name == "saved_mib" else record["metrics"].get(name)


def example_weights(record: Mapping[str, Any], loss: str) -> np.ndarray | None:
    """The weights of the examples in a loss, which is their product with the errors, float64 (n,); None where a record
    of an earlier version has none.

    The validation loss is the mean over the bins of log-SNR of the mean error in each.
    """
    bank = record["bank"]
    if LOSSES[loss][0] != "training_loss":
        _, of_example, sizes = np.unique(bank["bins"], return_inverse=True, return_counts=True)
        return 1 / (len(sizes) * sizes[of_example])
    if "density" not in bank:
        return None
    density = np.array(bank["density"])
    return density / density.sum() * np.array(bank["factor"])


def errors_in(record: Mapping[str, Any], loss: str) -> np.ndarray | None:
    """The per-example errors of a loss, float64 (n,), NaN where infinite; None where they were not measured.

    A network without batch-dependent norms has the same errors by all statistics.
    """
    kind, statistics = LOSSES[loss]
    errors = record.get("wrong", {}) if kind == "error_rate" else record["errors"]
    found = errors.get(statistics) or errors.get("running")
    return None if found is None else np.array(found, np.float64)


def rank(record: Mapping[str, Any], name: str) -> float:
    """A metric as a value to minimize; infinite for a trial that diverged, collapsed or did not measure it."""
    value = metric_value(record, name) if outcome_of(record) == "complete" else None
    if value is None:
        return math.inf
    return -value if name.startswith(HIGHER_IS_BETTER) else value
