"""The metrics' names, and their values."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gnunet.errors import ConfigError
from gnunet.evaluation.distances import frechet_distance, kernel_distance, precision_recall
from gnunet.evaluation.extractors import EXTRACTORS
from gnunet.evaluation.features import FeatureStatistics
from gnunet.evaluation.reference import Reference

STATISTICS = {"fd": 2, "kid": 3, "precision": 4, "recall": 4}
"""What is computed of an extractor's features, and from how many images on."""
PUBLISHED = 50_000
"""Images in the Frechet distances that papers print."""


@dataclass(frozen=True)
class Metric:
    """A statistic of the features of an extractor."""

    name: str
    statistic: str
    """One of STATISTICS."""
    extractor: str
    """One of EXTRACTORS, or a name of the user's."""

    @property
    def higher_is_better(self) -> bool:
        return self.statistic in ("precision", "recall")

    @property
    def min_images(self) -> int:
        """Images that it needs on either side."""
        return STATISTICS[self.statistic]


def metric_table(extractors: Iterable[str] = EXTRACTORS) -> dict[str, Metric]:
    """Every metric by its name: STATISTIC_EXTRACTOR, except that only the standard Inception's are FID and KID."""
    metrics = {}
    for extractor in extractors:
        for statistic in STATISTICS:
            name = f"{statistic}_{extractor}"
            name = {"fd_inception": "fid", "kid_inception": "kid"}.get(name, name)
            metrics[name] = Metric(name, statistic, extractor)
    return metrics


def get_metrics(names: Sequence[str], extractors: Iterable[str] = EXTRACTORS) -> list[Metric]:
    """The metrics with these names.

    Args:
        names: as in `metric_table`.
        extractors: names of the extractors there are.

    Raises:
        ConfigError: an unknown name; says which one may be meant and which are valid.
    """
    table = metric_table(extractors)
    for name in names:
        if name not in table:
            close = difflib.get_close_matches(name, table, n=1)
            meant = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(f"no metric {name!r}; {meant}valid are {', '.join(table)}")
    return [table[name] for name in names]


def compute_metrics(
    metrics: Sequence[Metric], statistics: Mapping[str, FeatureStatistics], references: Mapping[str, Reference]
) -> dict[str, float]:
    """The values of metrics, and for kernel distances NAME_standard_error.

    Args:
        metrics: what to compute.
        statistics: of the images, by extractor.
        references: by extractor.

    Raises:
        ValueError: too few images: 2 for a Frechet distance, 3 for a kernel distance, 4 for precision and recall.
    """
    values: dict[str, float] = {}
    pairs: dict[str, tuple[float, float]] = {}
    for metric in metrics:
        ours, reference = statistics[metric.extractor], references[metric.extractor]
        if metric.statistic == "fd":
            values[metric.name] = frechet_distance(ours.moments, reference.statistics.moments)
        elif metric.statistic == "kid":
            distance = kernel_distance(ours.kept, reference.statistics.kept, reference_sums=reference.kernel_sums)
            values[metric.name] = distance.value
            values[f"{metric.name}_standard_error"] = distance.standard_error
        else:
            if metric.extractor not in pairs:
                pairs[metric.extractor] = precision_recall(ours.kept, reference.statistics.kept)
            values[metric.name] = pairs[metric.extractor][metric.statistic == "recall"]
    return values


def sample_size_warnings(
    metrics: Sequence[Metric], num_images: int, num_reference: int, num_features: Mapping[str, int]
) -> list[str]:
    """What a reader must know of Frechet distances at these numbers; empty where they are like published ones.

    Args:
        metrics: what was computed.
        num_images, num_reference: images on either side.
        num_features: by extractor.
    """
    notes = []
    for metric in metrics:
        features, fewer = num_features[metric.extractor], min(num_images, num_reference)
        if metric.statistic != "fd" or fewer >= max(PUBLISHED, features):
            continue
        note = (
            f"{metric.name} of {num_images} images against {num_reference} is biased upwards (it falls as n grows): "
            "compare at equal n only"
        )
        if fewer <= features:
            kid = "kid" if metric.name == "fid" else f"kid_{metric.extractor}"
            note += f"; with fewer images than the {features} features prefer {kid}"
        notes.append(note)
    return notes
