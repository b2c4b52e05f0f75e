"""The training images nearest to samples: whether a model has learnt its small data set by heart."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from gnunet.diffusion.images import GAP, GAP_COLOUR
from gnunet.errors import DataError
from gnunet.evaluation.batching import single_threaded
from gnunet.evaluation.distances import spread, squared_distances
from gnunet.evaluation.extractors import Extractor
from gnunet.evaluation.features import extract, stream_features
from gnunet.processes import SINGLE_PROCESS, Processes

PROBES = 512  # training images whose own neighbours say what is near
NEAR = 0.05  # the share of training images that have a neighbour as near as the threshold
TILE, TEXT = 96, 14  # pixels of a picture's side, and of the line under it


@dataclass(frozen=True)
class Neighbours:
    """The nearest training images of n samples, by Euclidean distance between features."""

    rows: np.ndarray
    """int64 (n, k), places in the training rows, the nearest first."""
    distances: np.ndarray
    """float64 (n, k)."""
    distance_ratio: float
    """Mean distance of the samples to their nearest training image, over the mean distance of training images to
    their nearest other: about 1 for fresh images of the same kind, 0 for copies, large for images unlike any.
    Infinite or NaN where the training images are all the same."""
    near_share: float
    """Share of the samples that are as near to a training image as the nearest NEAR of the training images are to
    another: about NEAR for fresh images, 1 for copies. Unlike a mean, it shows some copies among poor images."""
    threshold: float
    """The distance that counts as near."""


def nearest_images(
    samples: np.ndarray,
    images: np.ndarray,
    rows: np.ndarray,
    extractor: Extractor,
    *,
    k: int = 4,
    processes: Processes = SINGLE_PROCESS,
    progress: Callable[[int], None] | None = None,
) -> Neighbours:
    """Find the training images nearest to samples, exactly, in memory that does not grow with their number.

    The distances within the training images are those of at most PROBES of them, evenly spread. Where the data
    set itself has near duplicates, these are small and the numbers see copies less sharply.

    Args:
        samples: uint8 (n, H, W, C), the same on every process, n at least 1.
        images: uint8 (N, H', W', C), a table's images.
        rows: int (m,), the rows of `images` that were trained on, m more than k.
        extractor: gives the features.
        k: neighbours of each sample.
        processes, progress: see `stream_features`.

    Raises:
        DataError: not more training images than k, or no sample.
    """
    if len(samples) == 0 or len(rows) <= k:
        raise DataError(
            f"the {k} nearest of {len(rows)} training images to {len(samples)} samples cannot be found; valid are "
            f"at least 1 sample and {k + 1} training images"
        )
    probes = spread(len(rows), PROBES)
    queries = torch.cat([extract(extractor, samples), extract(extractor, images[rows[probes]])])
    own = torch.from_numpy(np.concatenate([np.full(len(samples), -1), probes])).to(queries.device)
    best = torch.full((len(queries), k), torch.inf, dtype=torch.float64, device=queries.device)
    places = torch.full((len(queries), k), -1, dtype=torch.int64, device=queries.device)
    for indices, [features] in stream_features(
        lambda chunk: images[rows[chunk.start : chunk.stop]], len(rows), [extractor],
        processes=processes, progress=progress,
    ):  # fmt: skip
        with single_threaded():
            squared = torch.cat([block for _, block in squared_distances(queries, features)])
            candidates = torch.arange(indices.start, indices.stop, device=queries.device)
            squared.masked_fill_(own[:, None] == candidates, torch.inf)  # nobody is his own neighbour
            # A stable sort, so that of equal distances the first row comes first.
            best, order = torch.cat([best, squared], dim=1).sort(dim=1, stable=True)
            places = torch.cat([places, candidates.expand(len(queries), -1)], dim=1).gather(1, order)[:, :k]
            best = best[:, :k]
    distances = best.sqrt().cpu().numpy()
    theirs, among = distances[: len(samples)], distances[len(samples) :, 0]
    threshold = np.quantile(among, NEAR)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = theirs[:, 0].mean() / among.mean()
    return Neighbours(
        rows=places[: len(samples)].cpu().numpy(),
        distances=theirs,
        distance_ratio=float(ratio),
        near_share=float((theirs[:, 0] <= threshold).mean()),
        threshold=float(threshold),
    )


def draw_neighbours(
    samples: np.ndarray, nearest: np.ndarray, neighbours: Neighbours, limit: int | None = None
) -> Image.Image:
    """Samples beside their nearest training images: one row each, the nearest pair on top.

    Under each sample is its index, under each training image its distance, in red where it is near.

    Args:
        samples: uint8 (n, H, W, C), as they were given to `nearest_images`.
        nearest: uint8 (n, k, H', W', C), its images at `neighbours.rows`.
        neighbours: what it returned.
        limit: at most so many rows are drawn; None draws all.
    """
    side = TILE
    drawn = np.argsort(neighbours.distances[:, 0], kind="stable")[:limit]
    width = side + 3 * GAP + nearest.shape[1] * (side + GAP)
    canvas = Image.new("RGB", (width, len(drawn) * (side + TEXT + GAP)), (GAP_COLOUR,) * 3)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    for line, i in enumerate(drawn):
        top = line * (side + TEXT + GAP)
        canvas.paste(_tile(samples[i]), (0, top))
        draw.text((0, top + side), f"sample {i}", fill="black", font=font)
        for j, distance in enumerate(neighbours.distances[i]):
            left = side + 3 * GAP + j * (side + GAP)
            canvas.paste(_tile(nearest[i, j]), (left, top))
            colour = "red" if distance <= neighbours.threshold else "black"
            draw.text((left, top + side), f"{distance:.4g}", fill=colour, font=font)
    return canvas


def _tile(image: np.ndarray) -> Image.Image:
    """A picture of TILE pixels: pixels are repeated, or averaged where there are more."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")
    larger = max(picture.size) > TILE
    return picture.resize((TILE, TILE), Image.Resampling.LANCZOS if larger else Image.Resampling.NEAREST)
