"""Metrics of a set of images against reference images, from names to numbers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gnunet.data.decoded_images import DecodedImages
from gnunet.errors import ConfigError, DataError, did_you_mean
from gnunet.evaluation.distances import frechet_distance, kernel_distance, precision_recall
from gnunet.evaluation.extractors import EXTRACTORS, Extractor, load_extractor
from gnunet.evaluation.features import FeatureStatistics, Images, collect_statistics
from gnunet.evaluation.reference import reference_statistics
from gnunet.processes import SINGLE_PROCESS, Processes

MIN_IMAGES = {"fd": 2, "kid": 3, "precision": 4, "recall": 4}
"""The statistics that a metric can be, and the number of images that each needs on either side."""
STANDARD_NUM_SAMPLES = 50_000  # the number of samples in published Frechet distances


@dataclass(frozen=True)
class FeatureMetric:
    """A statistic of an extractor's features, such as fd_dinov2."""

    statistic: str  # a key of MIN_IMAGES
    extractor: str  # one of EXTRACTORS, or the name of a user's

    @property
    def name(self) -> str:
        """STATISTIC_EXTRACTOR, except that those of the standard Inception are called fid and kid."""
        name = f"{self.statistic}_{self.extractor}"
        return {"fd_inception": "fid", "kid_inception": "kid"}.get(name, name)

    @property
    def higher_is_better(self) -> bool:
        return self.statistic in ("precision", "recall")


def get_metrics(names: Sequence[str], extractors: Iterable[str] = EXTRACTORS) -> list[FeatureMetric]:
    """The metrics with these names, given the available extractors. Raises ConfigError for an unknown name."""
    metrics = [FeatureMetric(statistic, extractor) for extractor in extractors for statistic in MIN_IMAGES]
    table = {metric.name: metric for metric in metrics}
    for name in names:
        if name not in table:
            raise ConfigError(f"no metric {name!r}{did_you_mean(name, list(table))}; valid: {', '.join(table)}")
    return [table[name] for name in names]


def load_extractors(
    metrics: Sequence[FeatureMetric],
    *,
    sources: Mapping[str, str],
    weights: Mapping[str, str],
    device: torch.device | str = "cpu",
) -> dict[str, Extractor]:
    """The extractors that metrics need, by name; `sources` and `weights` by extractor, as for `load_extractor`."""
    return {
        name: load_extractor(name, source=sources.get(name), weights=weights.get(name), device=device)
        for name in dict.fromkeys(metric.extractor for metric in metrics)
    }


class Scorer:
    """Measures sets of images by metrics and their extractors against the rows of a table.

    The arguments after the extractors are those of `reference_statistics`.
    """

    def __init__(
        self,
        metrics: Sequence[FeatureMetric],
        extractors: Mapping[str, Extractor],
        table: DecodedImages,
        rows: np.ndarray,
        cache_dir: Path,
        *,
        processes: Processes = SINGLE_PROCESS,
        progress: Callable[[int], None] = lambda done: None,
    ):
        check_reference(metrics, len(rows))
        self.metrics, self.extractors, self.processes = metrics, extractors, processes
        self.references = {
            name: reference_statistics(table, rows, extractor, cache_dir, processes=processes, progress=progress)
            for name, extractor in extractors.items()
        }

    def score(self, images: Images, num_images: int, **options: Any) -> dict[str, float]:
        """The metrics of images 0..num_images-1 by name, and NAME_standard_error for kernel distances, on every rank.

        `options` are chunk and progress, as for `stream_features`. Raises DataError if metrics need more images, and
        ConfigError if an extractor has another number of features for them than for the reference.
        """
        if valid := too_few_images(self.metrics, num_images):
            raise DataError(f"given {num_images} images; valid: {valid}")
        extractors = list(self.extractors.values())
        found = collect_statistics(images, num_images, extractors, processes=self.processes, **options)
        statistics = dict(zip(self.extractors, found, strict=True))
        values: dict[str, float] = {}
        pairs: dict[str, tuple[float, float]] = {}
        for metric in self.metrics:
            ours, reference = statistics[metric.extractor], self.references[metric.extractor]
            if (given := ours.subset.shape[1]) != (valid := reference.subset.shape[1]):
                raise ConfigError(f"extractor {metric.extractor}: {given} features of an image; valid: {valid}")
            if metric.statistic == "fd":
                values[metric.name] = frechet_distance(ours.moments, reference.moments)
            elif metric.statistic == "kid":
                found = kernel_distance(ours.subset, reference.subset, reference_sums=reference.kernel_sums)
                values[metric.name], values[f"{metric.name}_standard_error"] = found
            else:
                if metric.extractor not in pairs:
                    pairs[metric.extractor] = precision_recall(ours.subset, reference.subset)
                values[metric.name] = pairs[metric.extractor][metric.statistic == "recall"]
        return values


def too_few_images(metrics: Sequence[FeatureMetric], num_images: int) -> str | None:
    """The number of images that would be valid, if metrics need more than `num_images`; else None."""
    most = max(metrics, key=lambda metric: MIN_IMAGES[metric.statistic])
    needed = MIN_IMAGES[most.statistic]
    return f"at least {needed}, which {most.name} needs" if num_images < needed else None


def check_reference(metrics: Sequence[FeatureMetric], num_images: int) -> None:
    """Raise DataError if metrics need more reference images."""
    if valid := too_few_images(metrics, num_images):
        raise DataError(f"given {num_images} reference images; valid: {valid}")


def sample_size_warnings(
    metrics: Sequence[FeatureMetric], num_images: int, references: Mapping[str, FeatureStatistics]
) -> list[str]:
    """Warnings about Frechet distances of fewer images than in published ones; `references` are by extractor."""
    warnings = []
    for metric in metrics:
        reference = references[metric.extractor].moments
        fewer, features = min(num_images, reference.count), len(reference.mean)
        if metric.statistic != "fd" or fewer >= max(STANDARD_NUM_SAMPLES, features):
            continue
        warning = (
            f"{metric.name} of {num_images} images against {reference.count} is biased upwards (it falls as n grows): "
            "compare at equal n only"
        )
        if fewer <= features:
            kid = "kid" if metric.name == "fid" else f"kid_{metric.extractor}"
            warning += f"; with fewer images than the {features} features prefer {kid}"
        warnings.append(warning)
    return warnings
