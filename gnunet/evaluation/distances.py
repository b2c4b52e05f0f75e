"""How far apart two sets of features are: Frechet and kernel distance, precision and recall.

All are computed in float64 with the same bits for any number of threads.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gnunet.evaluation.batching import single_threaded
from gnunet.evaluation.running_covariance import Moments

ROWS, COLUMNS = 256, 1024  # the tile in which all pairs are visited
DUPLICATE = 1e-12  # squared distances below this share of the squared norms are rounding


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet distance between Gaussians with these moments (Heusel et al., 2017): FID's formula.

    |mean_a - mean_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2)). With S = F F^T the last trace is the sum of
    the singular values of F_a^T F_b, which needs no root of a matrix that is not symmetric and is right for
    covariances of deficient rank, as fewer images than features have.

    Its expectation falls as the images grow in number, so only distances at equal numbers can be compared.

    Raises:
        ValueError: fewer than two rows, or features that differ in number.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(f"{len(a.mean)} features against {len(b.mean)}; valid are equal numbers")
    with single_threaded():
        shift = (a.mean.cpu() - b.mean.cpu()).square().sum()
        spread_a, spread_b = a.covariance.cpu(), b.covariance.cpu()
        overlap = torch.linalg.svdvals(_factor(spread_a).T @ _factor(spread_b)).sum()
        distance = shift + spread_a.trace() + spread_b.trace() - 2 * overlap
    return max(distance.item(), 0.0)


def _factor(covariance: Tensor) -> Tensor:
    """F (D, rank) with F F^T = covariance.

    Eigenvalues that are rounding are left out: the root of 1e-16 is 1e-8, and there can be a thousand of them.
    """
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    return vectors[:, kept] * values[kept].sqrt()


@dataclass(frozen=True)
class KernelDistance:
    """An estimate of the squared maximum mean discrepancy, with its standard error."""

    value: float
    """Unbiased: its expectation is 0 for two sets of one distribution, so it may be negative."""
    standard_error: float
    """By the jackknife over the images of both sets; see `kernel_distance`."""


def kernel_distance(features: Tensor, reference: Tensor, *, reference_sums: Tensor | None = None) -> KernelDistance:
    """KID: the unbiased squared MMD with the kernel (x . y / D + 1)^3 (Binkowski et al., 2018).

    It is the U-statistic over all pairs, whose expectation is that of the usual mean over random subsets; it has
    a smaller variance and no seed. Two sets of equal size are taken as pairs, as in Gretton et al. (2012), lemma
    6: image i is not compared with reference i. Nothing is lost where the sets are independent, and a set
    against itself, or against altered copies in the same order, stays unbiased.

    The standard error is the jackknife's: each image (or pair) is left out once. It holds the chance in the
    choice of both sets' images, so models compared on one reference differ more reliably than it suggests; by
    the Efron-Stein inequality it errs upwards, most where the sets agree. The spread over random subsets that
    other programs print is no standard error: it depends on the subsets' size, not on the number of images.

    Args:
        features: float (n, D), n at least 3.
        reference: float (m, D), m at least 3, on the same device.
        reference_sums: `kernel_sums(reference)`, where they are known already.

    Raises:
        ValueError: too few images, or features that differ in number.
    """
    n, m = len(features), len(reference)
    if min(n, m) < 3 or features.shape[1:] != reference.shape[1:]:
        raise ValueError(
            f"a kernel distance between {tuple(features.shape)} and {tuple(reference.shape)} features; valid are "
            "at least 3 images on either side and equal numbers of features"
        )
    with single_threaded():
        x = kernel_sums(features)
        y = kernel_sums(reference) if reference_sums is None else reference_sums
        across, down = _kernel_sums(features, reference, skip_diagonal=n == m)
        if n == m:
            single = x + y - across - down
            value = single.sum() / (n * (n - 1))
            return KernelDistance(
                value.item(), _jackknife((single.sum() - 2 * single) / ((n - 1) * (n - 2))).sqrt().item()
            )
        within_x, within_y, between = x.sum(), y.sum(), across.sum()
        value = within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * between / (n * m)
        # What is the same whichever image is left out does not change the jackknife.
        without_x = (within_x - 2 * x) / ((n - 1) * (n - 2)) - 2 * (between - across) / ((n - 1) * m)
        without_y = (within_y - 2 * y) / ((m - 1) * (m - 2)) - 2 * (between - down) / (n * (m - 1))
        return KernelDistance(value.item(), (_jackknife(without_x) + _jackknife(without_y)).sqrt().item())


def kernel_sums(features: Tensor) -> Tensor:
    """Each row's sum of kernels with all other rows: (n, D) -> float64 (n,)."""
    with single_threaded():
        return _kernel_sums(features, features, skip_diagonal=True)[0]


def _kernel_sums(x: Tensor, y: Tensor, *, skip_diagonal: bool) -> tuple[Tensor, Tensor]:
    across = torch.empty(len(x), dtype=torch.float64, device=x.device)
    down = torch.zeros(len(y), dtype=torch.float64, device=x.device)
    for rows, products in _inner_products(x, y):
        kernel = products.div_(x.shape[1]).add_(1)
        kernel = kernel * kernel * kernel
        if skip_diagonal:
            kernel.diagonal(rows.start).zero_()
        across[rows] = kernel.sum(dim=1)
        down += kernel.sum(dim=0)
    return across, down


def _jackknife(estimates: Tensor) -> Tensor:
    """Variance of an estimate from its values with each observation left out."""
    return (len(estimates) - 1) * (estimates - estimates.mean()).square().mean()


def precision_recall(features: Tensor, reference: Tensor, *, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., 2019).

    A set's manifold is the union of balls around its images, each reaching to the `neighbours`-th nearest other
    image of the set. Precision is the share of the images in the reference's manifold, recall the share of the
    reference in the images' manifold. Both depend on the number of images; of the larger set, as many as the
    smaller one has are taken, evenly spread.

    Args:
        features: float (n, D).
        reference: float (m, D), on the same device.

    Raises:
        ValueError: too few images, or features that differ in number.
    """
    count = min(len(features), len(reference))
    if count <= neighbours or features.shape[1:] != reference.shape[1:]:
        raise ValueError(
            f"precision and recall between {tuple(features.shape)} and {tuple(reference.shape)} features; valid "
            f"are more than {neighbours} images on either side and equal numbers of features"
        )
    with single_threaded():
        x, y = features[spread(len(features), count)], reference[spread(len(reference), count)]
        radius_x, radius_y = _radii(x, neighbours), _radii(y, neighbours)
        in_y, in_x = [], torch.zeros(count, dtype=torch.bool, device=x.device)
        for rows, squared in squared_distances(x, y):
            in_y.append((squared <= radius_y).any(dim=1))
            in_x |= (squared <= radius_x[rows, None]).any(dim=0)
    return torch.cat(in_y).double().mean().item(), in_x.double().mean().item()


def _radii(x: Tensor, neighbours: int) -> Tensor:
    """Squared distance from each row to its `neighbours`-th nearest other row."""
    radii = torch.empty(len(x), dtype=torch.float64, device=x.device)
    for rows, squared in squared_distances(x, x):
        squared.diagonal(rows.start).fill_(torch.inf)
        radii[rows] = squared.kthvalue(neighbours, dim=1).values
    return radii


def squared_distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """All squared distances, as float64 (at most ROWS, len(y)) with the slice of x's rows that they belong to."""
    norms_x, norms_y = x.double().square().sum(dim=1), y.double().square().sum(dim=1)
    for rows, products in _inner_products(x, y):
        scale = norms_x[rows, None] + norms_y
        squared = scale - 2 * products
        yield rows, squared.masked_fill_(squared < DUPLICATE * scale, 0)


def _inner_products(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """All inner products, as float64 (at most ROWS, len(y)) with the slice of x's rows that they belong to."""
    for start in range(0, len(x), ROWS):
        rows = slice(start, min(start + ROWS, len(x)))
        block = x[rows].double()
        yield rows, torch.cat([block @ columns.double().T for columns in y.split(COLUMNS)], dim=1)


def spread(num_items: int, count: int) -> np.ndarray:
    """At most `count` of the indices 0..num_items-1, ascending and evenly spread: data are often sorted by class."""
    count = min(count, num_items)
    return np.arange(count) * num_items // max(count, 1)
