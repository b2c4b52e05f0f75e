"""Features of a set of images, shared by the processes of a launch, with the same bits for any number of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gnunet.data.dataset import channels_last
from gnunet.errors import DataError
from gnunet.evaluation.batching import rounds, single_threaded
from gnunet.evaluation.distances import spread
from gnunet.evaluation.extractors import Extractor
from gnunet.evaluation.running_covariance import Moments
from gnunet.processes import SINGLE_PROCESS, Processes

BATCH = 16  # images in one forward pass: fixed, since bits depend on it; few, so that they fit a CPU's cache
CHUNK = 128  # images that a process takes at a time, unless its source has batches of its own
KEPT = 10_000  # images whose features are kept for kernel distance, precision and recall

Images = Callable[[range], np.ndarray]
"""Gives the images with these indices, uint8 (len, H, W, C) with C 1 or 3."""


@dataclass(frozen=True)
class FeatureStatistics:
    """What is remembered of the features of a set of images; its size does not grow with theirs beyond KEPT."""

    moments: Moments
    """Mean and covariance over all images."""
    kept: Tensor
    """float32 (m, D), the features of m = min(num_images, KEPT) images, evenly spread over all."""

    @property
    def num_images(self) -> int:
        return self.moments.count


def extract(extractor: Extractor, images: np.ndarray) -> Tensor:
    """The features of images, float32 (N, D) on `statistics_device(extractor)`.

    Batches are cut from the front, BATCH images each, and run in one thread on a CPU, so that the bits depend on
    the images alone.

    Args:
        images: uint8 (N, H, W, C), C 1 (grey, repeated to RGB) or 3, N at least 1.

    Raises:
        TypeError, ValueError: images of another type or shape. ConfigError: see `Extractor`.
    """
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images have shape {images.shape}; valid is (N > 0, H, W, 1 or 3)")
    batches = channels_last(np.array(images)).split(BATCH)
    with single_threaded():
        features = torch.cat([extractor(batch) for batch in batches])
    return features.to(statistics_device(extractor))


def statistics_device(extractor: Extractor) -> torch.device:
    """Where statistics of its features are computed, in float64: on its own device where that has it."""
    return torch.device("cpu") if extractor.device.type == "mps" else extractor.device


def stream_features(
    images: Images,
    num_images: int,
    extractors: Sequence[Extractor],
    *,
    chunk: int = CHUNK,
    processes: Processes = SINGLE_PROCESS,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[range, list[Tensor]]]:
    """The features of images 0..num_images-1, in order, on every process.

    Chunks of images are dealt out to the processes in turn; after each round their features are gathered. So
    every process sees the same chunks in the same order in every launch, nobody waits longer than a round, and
    memory does not grow with the number of images.

    Args:
        images: the source. It is called for whole chunks, and again for image 0 on a process without a chunk
            in the last round.
        num_images: at least 1.
        extractors: run on the same images.
        chunk: images in a chunk; a sampler's batch size, so that none is computed twice. Never the launch's.
        processes: those that share the work; all of them call this.
        progress: called after each round with the number of images done so far.

    Yields:
        Indices of a chunk, and for each extractor float32 (len(indices), D).

    Raises:
        DataError: no images.
    """
    if num_images < 1:
        raise DataError("there are no images to evaluate")
    for chunks in rounds(num_images, chunk, processes.world_size):
        # A process without a chunk must know the number of features, as the others do.
        pixels = images(chunks[processes.rank] if processes.rank < len(chunks) else range(1))
        gathered = []
        for extractor in extractors:
            features = extract(extractor, pixels)
            padded = features.new_zeros(chunk, features.shape[1])
            padded[: len(features)] = features
            gathered.append(processes.gather(padded).view(processes.world_size, chunk, -1))
        for r, indices in enumerate(chunks):
            yield indices, [features[r, : len(indices)] for features in gathered]
        if progress is not None:
            progress(chunks[-1].stop)


def collect_statistics(
    images: Images,
    num_images: int,
    extractors: Sequence[Extractor],
    *,
    chunk: int = CHUNK,
    processes: Processes = SINGLE_PROCESS,
    progress: Callable[[int], None] | None = None,
) -> list[FeatureStatistics]:
    """Statistics of images 0..num_images-1 for each extractor, the same on every process and in every launch.

    Args and errors: see `stream_features`.
    """
    wanted = spread(num_images, KEPT)
    moments: list[Moments] = []
    kept: list[Tensor] = []
    for indices, blocks in stream_features(
        images, num_images, extractors, chunk=chunk, processes=processes, progress=progress
    ):
        if not moments:
            moments = [Moments.empty(block.shape[1], block.device) for block in blocks]
            kept = [block.new_empty(len(wanted), block.shape[1]) for block in blocks]
        low, high = np.searchsorted(wanted, [indices.start, indices.stop])
        places = torch.from_numpy(wanted[low:high] - indices.start)
        for moment, keep, block in zip(moments, kept, blocks, strict=True):
            moment.update(block)
            keep[low:high] = block[places.to(block.device)]
    return [FeatureStatistics(*pair) for pair in zip(moments, kept, strict=True)]
