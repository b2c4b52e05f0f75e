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
from gnunet.processes import SINGLE_PROCESS, Processes, batches_by_rank, single_threaded

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

    Chunks of images are distributed round-robin across ranks, and their features are gathered after each round. So
    every rank sees the same chunks in the same order whatever the world size, and memory is constant.

    Args:
        images: the source. It is called for whole chunks, and for image 0 on ranks without a chunk in the last round.
        chunk: images per chunk, such as a sampler's batch size. Results depend on it.
        processes: the ranks that share the work; all of them must call this.
        progress: called after each round with the number of images done so far.

    Yields:
        Indices of a chunk, and for each extractor float32 (len(indices), D).
    """
    if num_images < 1:
        raise DataError("there are no images to evaluate")
    for chunks in batches_by_rank(num_images, chunk, processes.world_size):
        pixels = images(chunks[processes.rank] if processes.rank < len(chunks) else range(1))
        gathered = [processes.gather_padded(extract(extractor, pixels), chunk) for extractor in extractors]
        for rank, indices in enumerate(chunks):
            yield indices, [features[rank, : len(indices)] for features in gathered]
        progress(chunks[-1].stop)


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
