"""Titles and units of metrics, which direction is good, and the errors behind the validation losses."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gnunet.ablation.records import HIGHER_IS_BETTER, LOSSES, TIMES

COSTS = (*TIMES, "saved_mib")
_TITLES = {
    "validation_loss": ("validation loss", "squared error of v"),
    "validation_loss_precise": ("validation loss, precise statistics", "squared error of v"),
    "validation_loss_batch": ("validation loss, batch statistics", "squared error of v"),
    "images_per_second": ("training speed", "images/s"),
    "wall_seconds": ("training time", "s"),
    "norm_share": ("norms' share of a step's time", ""),
    "peak_memory_mib": ("peak memory", "MiB"),
    "saved_mib": ("saved for backward", "MiB"),
    "nearest_distance_ratio": ("nearest training image, distance ratio", ""),
    "nearest_near_share": ("share of near-duplicates of training images", ""),
    "fid": ("FID", ""),
    "kid": ("KID", ""),
}
"""Titles and units."""
_FAMILIES = {"fd": "Fréchet distance", "kid": "KID", "precision": "precision", "recall": "recall"}


@dataclass(frozen=True)
class MetricInfo:
    """How a metric is shown."""

    title: str
    unit: str
    """Empty where there is none."""
    worst: float | None
    """The value of a diverged trial: infinity, or minus infinity where higher is better; None for costs, of which
    divergence says nothing."""

    @property
    def label(self) -> str:
        """The title with the unit, for an axis."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    @property
    def heading(self) -> str:
        """The title with a capital."""
        return self.title[0].upper() + self.title[1:]


def metric_info(name: str) -> MetricInfo:
    """The metric of this name in study files: a validation loss, a cost, `nearest_...`, or a metric of samples."""
    family, _, extractor = name.partition("_")
    default = (f"{_FAMILIES[family]}, {extractor}" if family in _FAMILIES else name, "")
    if name in COSTS:
        worst = None
    elif name.startswith(HIGHER_IS_BETTER) or name == "nearest_distance_ratio":
        worst = -math.inf
    else:
        worst = math.inf
    return MetricInfo(*_TITLES.get(name, default), worst)


def errors_in(record: Mapping[str, Any], loss: str) -> np.ndarray | None:
    """The per-example errors of a validation loss, float64 (n,); None where they were not measured.

    A network without batch-dependent norms has the same errors for all three losses.
    """
    errors = record["errors"] or {}
    found = errors.get(LOSSES[loss])
    if found is None and not record["batch_dependent"]:
        found = errors.get("running")
    return None if found is None else np.array(found, dtype=np.float64)


def sample_metrics(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """The metrics of samples that any record has, in the order of the records."""
    names = dict.fromkeys(name for record in records for name in record["metrics"] or {})
    return [name for name in names if not name.endswith("_standard_error")]
