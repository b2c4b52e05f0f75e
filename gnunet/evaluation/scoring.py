"""Metrics of a set of images against reference images, from names to numbers."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from gnunet.data.decoded_images import DecodedImages
from gnunet.errors import DataError
from gnunet.evaluation.extractors import Extractor, load_extractor
from gnunet.evaluation.features import CHUNK, Images, collect_statistics
from gnunet.evaluation.metrics import FeatureMetric, compute_metrics
from gnunet.evaluation.reference import reference_statistics
from gnunet.processes import SINGLE_PROCESS, Processes


def load_extractors(
    metrics: Sequence[FeatureMetric],
    *,
    sources: Mapping[str, str],
    weights: Mapping[str, str],
    device: torch.device | str = "cpu",
) -> dict[str, Extractor]:
    """The extractors that metrics need, by name.

    Args:
        metrics: what will be computed.
        sources: user-defined extractors by name (see `load_user_extractor`).
        weights: weights files by extractor, where they are not in the default location.
        device: where they will run.

    Raises:
        ConfigError: a package or file is missing; says what to install or put where.
    """
    return {
        name: load_extractor(name, source=sources.get(name), weights=weights.get(name), device=device)
        for name in dict.fromkeys(metric.extractor for metric in metrics)
    }


class Scorer:
    """Measures sets of images against the rows of a table.

    Args:
        metrics: what to compute.
        extractors: the ones that the metrics need, by name.
        table, rows, cache_dir, processes, progress: as for `reference_statistics`.

    Raises:
        DataError: too few rows.
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
        progress: Callable[[int], None] | None = None,
    ):
        check_reference(metrics, len(rows))
        self.metrics, self.extractors = metrics, extractors
        self.references = {
            name: reference_statistics(table, rows, extractor, cache_dir, processes=processes, progress=progress)
            for name, extractor in extractors.items()
        }

    @property
    def num_features(self) -> dict[str, int]:
        """Features of each extractor."""
        return {name: len(reference.statistics.moments.mean) for name, reference in self.references.items()}

    def score(
        self,
        images: Images,
        num_images: int,
        *,
        chunk: int = CHUNK,
        processes: Processes = SINGLE_PROCESS,
        progress: Callable[[int], None] | None = None,
    ) -> dict[str, float]:
        """The metrics of images 0..num_images-1 (see `compute_metrics`), the same on every rank.

        Arguments and errors as for `stream_features`.
        """
        statistics = collect_statistics(
            images, num_images, list(self.extractors.values()), chunk=chunk, processes=processes, progress=progress
        )
        return compute_metrics(self.metrics, dict(zip(self.extractors, statistics, strict=True)), self.references)


def check_reference(metrics: Sequence[FeatureMetric], num_images: int) -> None:
    """Raise DataError if metrics need more reference images."""
    for metric in metrics:
        if num_images < metric.min_images:
            raise DataError(f"{metric.name} needs at least {metric.min_images} reference images; given {num_images}")
