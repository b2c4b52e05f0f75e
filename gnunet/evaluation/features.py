"""Features of a set of images, extracted by all ranks together, bit-identical for any number of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gnunet.errors import DataError
from gnunet.evaluation.distances import RunningCovariance, evenly_spaced
from gnunet.evaluation.extractors import Extractor
from gnunet.processes import SINGLE_PROCESS, Processes, single_threaded

FORWARD_BATCH = 16  # images per forward pass: fixed, because results depend on it; small enough for a CPU's cache
CHUNK = 128  # images that a rank takes at a time, unless their source has batches
MAX_SUBSET = 10_000  # images whose features are kept for kernel distance, precision and recall

Images = Callable[[range], np.ndarray]  # returns the images with these indices, uint8 (len, H, W, C) with C 1 or 3


@dataclass(frozen=True)
class FeatureStatistics:
    """What the metrics need of the features of a set of images, in memory bounded by MAX_SUBSET."""

    moments: RunningCovariance  # mean and covariance over all images
    subset: Tensor  # float32 (m, D), the features of m = min(num_images, MAX_SUBSET) images, evenly spaced
    kernel_sums: Tensor | None = None  # float64 (m,), `kernel_sums` of the subset, of reference images


def extract(extractor: Extractor, images: np.ndarray) -> Tensor:
    """The features of uint8 (N > 0, H, W, 1 or 3), float32 (N, D) on `extractor.statistics_device`."""
    batches = torch.from_numpy(np.array(images)).movedim(-1, 1).split(FORWARD_BATCH)
    with single_threaded():
        features = torch.cat([extractor(batch) for batch in batches])
    return features.to(extractor.statistics_device)


def stream_features(
    images: Images,
    num_images: int,
    extractors: Sequence[Extractor],
    *,
    chunk: int = CHUNK,
    processes: Processes = SINGLE_PROCESS,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[tuple[range, list[Tensor]]]:
    """The features of images 0..num_images-1, in order, on every rank.

    Every rank sees the same chunks in the same order whatever the world size, and memory is constant.

    Args:
        images: the source, called for whole chunks.
        chunk: images per chunk, such as a sampler's batch size. Results depend on it.
        processes, progress: as in `Processes.map_batches`.

    Yields:
        Indices of a chunk, and for each extractor float32 (len(indices), D).
    """
    if num_images < 1:
        raise DataError("there are no images to evaluate")

    def features(indices: range) -> list[Tensor]:
        pixels = images(indices)
        return [extract(extractor, pixels) for extractor in extractors]

    return processes.map_batches(features, num_images, chunk, progress)


def collect_statistics(
    images: Images, num_images: int, extractors: Sequence[Extractor], **options: Any
) -> list[FeatureStatistics]:
    """Statistics of images 0..num_images-1 for each extractor, on every rank; arguments as for `stream_features`."""
    selected = evenly_spaced(num_images, MAX_SUBSET)
    statistics: list[FeatureStatistics] = []
    for indices, blocks in stream_features(images, num_images, extractors, **options):
        if not statistics:
            for block in blocks:
                moments = RunningCovariance.empty(block.shape[1], block.device)
                statistics.append(FeatureStatistics(moments, block.new_empty(len(selected), block.shape[1])))
        low, high = np.searchsorted(selected, [indices.start, indices.stop])
        rows = torch.from_numpy(selected[low:high] - indices.start)
        for statistic, block in zip(statistics, blocks, strict=True):
            statistic.moments.update(block)
            statistic.subset[low:high] = block[rows.to(block.device)]
    return statistics
