"""Metrics by name, and their values."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gnunet.errors import ConfigError
from gnunet.evaluation.distances import frechet_distance, kernel_distance, precision_recall
from gnunet.evaluation.extractors import EXTRACTORS
from gnunet.evaluation.features import FeatureStatistics
from gnunet.evaluation.reference import Reference

MIN_IMAGES = {"fd": 2, "kid": 3, "precision": 4, "recall": 4}
"""The statistics that a metric can be, and the number of images that each needs."""
STANDARD_NUM_SAMPLES = 50_000
"""The number of samples in published Frechet distances."""


@dataclass(frozen=True)
class FeatureMetric:
    """A statistic of an extractor's features, such as fd_dinov2."""

    name: str
    statistic: str
    """A key of MIN_IMAGES."""
    extractor: str
    """One of EXTRACTORS, or the name of a user's."""

    @property
    def higher_is_better(self) -> bool:
        return self.statistic in ("precision", "recall")

    @property
    def min_images(self) -> int:
        """Images needed on either side."""
        return MIN_IMAGES[self.statistic]


def metric_table(extractors: Iterable[str] = EXTRACTORS) -> dict[str, FeatureMetric]:
    """All metrics by name: STATISTIC_EXTRACTOR, except that those of the standard Inception are called fid and kid."""
    metrics = {}
    for extractor in extractors:
        for statistic in MIN_IMAGES:
            name = f"{statistic}_{extractor}"
            name = {"fd_inception": "fid", "kid_inception": "kid"}.get(name, name)
            metrics[name] = FeatureMetric(name, statistic, extractor)
    return metrics


def get_metrics(names: Sequence[str], extractors: Iterable[str] = EXTRACTORS) -> list[FeatureMetric]:
    """The metrics with these names, given the available extractors. Raises ConfigError for an unknown name."""
    table = metric_table(extractors)
    for name in names:
        if name not in table:
            close = difflib.get_close_matches(name, table, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(f"no metric {name!r}; {hint}valid: {', '.join(table)}")
    return [table[name] for name in names]


def compute_metrics(
    metrics: Sequence[FeatureMetric], statistics: Mapping[str, FeatureStatistics], references: Mapping[str, Reference]
) -> dict[str, float]:
    """The values of metrics by name, and NAME_standard_error for kernel distances.

    Args:
        metrics: what to compute.
        statistics: of the images, by extractor.
        references: by extractor.

    Raises:
        ValueError: fewer images than `FeatureMetric.min_images`.
    """
    values: dict[str, float] = {}
    pairs: dict[str, tuple[float, float]] = {}
    for metric in metrics:
        images, reference = statistics[metric.extractor], references[metric.extractor]
        if metric.statistic == "fd":
            values[metric.name] = frechet_distance(images.moments, reference.statistics.moments)
        elif metric.statistic == "kid":
            distance = kernel_distance(images.subset, reference.statistics.subset, reference_sums=reference.kernel_sums)
            values[metric.name] = distance.value
            values[f"{metric.name}_standard_error"] = distance.standard_error
        else:
            if metric.extractor not in pairs:
                pairs[metric.extractor] = precision_recall(images.subset, reference.statistics.subset)
            values[metric.name] = pairs[metric.extractor][metric.statistic == "recall"]
    return values


def sample_size_warnings(
    metrics: Sequence[FeatureMetric], num_images: int, num_reference: int, num_features: Mapping[str, int]
) -> list[str]:
    """Warnings about Frechet distances of fewer images than in published ones.

    Args:
        metrics: what was computed.
        num_images, num_reference: images on either side.
        num_features: by extractor.
    """
    warnings = []
    fewer = min(num_images, num_reference)
    for metric in metrics:
        features = num_features[metric.extractor]
        if metric.statistic != "fd" or fewer >= max(STANDARD_NUM_SAMPLES, features):
            continue
        warning = (
            f"{metric.name} of {num_images} images against {num_reference} is biased upwards (it falls as n grows): "
            "compare at equal n only"
        )
        if fewer <= features:
            kid = "kid" if metric.name == "fid" else f"kid_{metric.extractor}"
            warning += f"; with fewer images than the {features} features prefer {kid}"
        warnings.append(warning)
    return warnings
