"""What the report says of a metric: its name in words, with the unit, and which way is good."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gnunet.ablation.records import HIGHER_IS_BETTER, LOSSES, TIMES

COSTS = (*TIMES, "saved_mib")
_NAMES = {
    "validation_loss": ("validation loss", "squared error of v"),
    "validation_loss_precise": ("validation loss, precise statistics", "squared error of v"),
    "validation_loss_batch": ("validation loss, batch statistics", "squared error of v"),
    "images_per_second": ("training speed", "images/s"),
    "wall_seconds": ("training time", "s"),
    "norm_share": ("norms' share of a step's time", ""),
    "peak_memory_mib": ("peak memory", "MiB"),
    "saved_mib": ("kept for backward", "MiB"),
    "nearest_distance_ratio": ("nearest training image, distance ratio", ""),
    "nearest_near_share": ("nearest training image, near share", ""),
    "fid": ("FID", ""),
    "kid": ("KID", ""),
}
"""Names in words, and units."""
_FAMILIES = {"fd": "Fréchet distance", "kid": "KID", "precision": "precision", "recall": "recall"}


@dataclass(frozen=True)
class MetricInfo:
    """A metric by the name that a study file gives it."""

    title: str
    """In words."""
    unit: str
    """Empty where there is none."""
    worst: float | None
    """What a diverged trial has of it: infinity, or minus infinity where high is good; None where divergence says
    nothing of it, as of costs."""

    @property
    def label(self) -> str:
        """For an axis: the title, with the unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    @property
    def heading(self) -> str:
        """The title, with a capital."""
        return self.title[0].upper() + self.title[1:]


def metric_info(name: str) -> MetricInfo:
    """The metric of a name: a validation loss, a cost, `nearest_...`, or the name of a metric of samples."""
    family, _, extractor = name.partition("_")
    in_family = f"{_FAMILIES[family]}, {extractor}" if family in _FAMILIES else name
    title, unit = _NAMES.get(name, (in_family, ""))
    if name in COSTS:
        return MetricInfo(title, unit, None)
    high = name.startswith(HIGHER_IS_BETTER) or name == "nearest_distance_ratio"
    return MetricInfo(title, unit, -math.inf if high else math.inf)


def errors_in(record: Mapping[str, Any], loss: str) -> np.ndarray | None:
    """The error of each example of the bank that a validation loss is made of, float64 (n,); None where it is null.

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
