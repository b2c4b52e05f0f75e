"""The training images nearest to samples: whether a model has memorized its training set."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from gnunet.data.decoded_images import DecodedImages
from gnunet.diffusion.images import GAP, GAP_COLOUR
from gnunet.errors import DataError
from gnunet.evaluation.distances import evenly_spaced, squared_distances
from gnunet.evaluation.extractors import Extractor
from gnunet.evaluation.features import extract, stream_features
from gnunet.processes import single_threaded

PROBES = 512  # training images whose own neighbours define what is near
NEAR_QUANTILE = 0.05  # fraction of training images that have a neighbour at most as far as the threshold
TILE, TEXT = 96, 14  # pixels: a picture's side, the height of the line below it


@dataclass(frozen=True)
class Neighbours:
    """The nearest training images of n samples, by Euclidean distance between features."""

    distance_ratio: float
    """Mean distance from samples to their nearest training image, divided by the mean distance from training images to
    their nearest other: about 1 for new images of the same kind, 0 for copies, large for images unlike any.
    Infinite or NaN if all training images are the same."""
    near_duplicate_rate: float
    """Fraction of the samples that are at most `threshold` from a training image: about NEAR_QUANTILE for new images, 1
    for copies. Unlike a mean, it reveals a few copies among poor images."""
    threshold: float  # the NEAR_QUANTILE quantile of training images' distances to their nearest other
    rows: np.ndarray  # int64 (n, k), positions among the training rows, nearest first
    distances: np.ndarray  # float64 (n, k)


def nearest_images(
    samples: np.ndarray, table: DecodedImages, rows: np.ndarray, extractor: Extractor, *, k: int = 4, **options: Any
) -> Neighbours:
    """Find the training images nearest to samples, exactly, in memory that does not grow with their number.

    Distances among training images are those of at most PROBES of them, evenly spaced. If the data set itself contains
    near duplicates, these distances are small and copies are harder to detect.

    Args:
        samples: uint8 (n, H, W, C), the same on every rank, n at least 1.
        rows: int (m,), the rows of the table that were trained on, m more than k.
        options: processes and progress, as for `stream_features`.
    """
    if len(samples) == 0 or len(rows) <= k:
        raise DataError(
            f"cannot find the {k} nearest of {len(rows)} training images to {len(samples)} samples; valid: at least "
            f"1 sample and {k + 1} training images"
        )
    probes = evenly_spaced(len(rows), PROBES)
    queries = torch.cat([extract(extractor, samples), extract(extractor, table.pictures(rows[probes]))])
    device = queries.device
    self_row = torch.from_numpy(np.concatenate([np.full(len(samples), -1), probes])).to(device)
    nearest = torch.full((len(queries), k), torch.inf, dtype=torch.float64, device=device)
    nearest_rows = torch.full((len(queries), k), -1, dtype=torch.int64, device=device)
    for indices, [features] in stream_features(
        lambda chunk: table.pictures(rows[chunk]), len(rows), [extractor], **options
    ):
        with single_threaded():
            squared = torch.cat([block for _, block in squared_distances(queries, features)])
            candidates = torch.arange(indices.start, indices.stop, device=device)
            squared.masked_fill_(self_row[:, None] == candidates, torch.inf)  # exclude self-matches
            # A stable sort, so that ties go to the first row.
            nearest, order = torch.cat([nearest, squared], dim=1).sort(dim=1, stable=True)
            all_rows = torch.cat([nearest_rows, candidates.expand(len(queries), -1)], dim=1)
            nearest, nearest_rows = nearest[:, :k], all_rows.gather(1, order)[:, :k]
    distances = nearest.sqrt().cpu().numpy()
    of_samples, of_probes = distances[: len(samples)], distances[len(samples) :, 0]
    threshold = np.quantile(of_probes, NEAR_QUANTILE)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = of_samples[:, 0].mean() / of_probes.mean()
    return Neighbours(
        distance_ratio=float(ratio),
        near_duplicate_rate=float((of_samples[:, 0] <= threshold).mean()),
        threshold=float(threshold),
        rows=nearest_rows[: len(samples)].cpu().numpy(),
        distances=of_samples,
    )


def draw_neighbours(
    samples: np.ndarray, nearest: np.ndarray, neighbours: Neighbours, limit: int | None = None
) -> Image.Image:
    """Draw samples next to their nearest training images: at most `limit` lines of a sample each, sorted by distance.

    Below each sample is its index, below each training image its distance, in red if it is near.

    Args:
        samples: uint8 (n, H, W, C), as given to `nearest_images`.
        nearest: uint8 (n, k, H', W', C), the images at `neighbours.rows`.
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
    """A picture that fits TILE x TILE pixels; small images keep hard pixels."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")
    larger = max(picture.size) > TILE
    method = Image.Resampling.LANCZOS if larger else Image.Resampling.NEAREST
    return ImageOps.pad(picture, (TILE, TILE), method, (GAP_COLOUR,) * 3)
