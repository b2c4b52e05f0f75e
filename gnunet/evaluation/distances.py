"""Moments of a set of features, and distances between two sets: Frechet and kernel distance, precision and recall.

All are computed in float64, with results that do not depend on the number of threads.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gnunet.processes import single_threaded

ROWS, COLUMNS = 256, 1024  # the tile in which all pairs are visited
DUPLICATE = 1e-12  # squared distances below this fraction of the squared norms are rounding errors


@dataclass(eq=False)
class RunningCovariance:
    """Mean and covariance of the rows seen so far, in constant memory.

    Blocks of rows are merged by Chan, Golub & LeVeque's update (1983): each block is centred on its own mean, so
    nothing cancels where the mean is large compared with the standard deviation. The result depends on the blocks and
    their order only, so processes that merge the same blocks in the same order agree bit for bit.
    """

    count: int  # rows seen
    mean: Tensor  # float64 (D,)
    scatter: Tensor  # float64 (D, D), the sum over rows of (row - mean) (row - mean)^T

    @classmethod
    def empty(cls, num_features: int, device: torch.device | str = "cpu") -> "RunningCovariance":
        options = {"dtype": torch.float64, "device": device}
        return cls(0, torch.zeros(num_features, **options), torch.zeros(num_features, num_features, **options))

    def update(self, features: Tensor) -> None:
        """Add the rows of `features`, floating point (n, D) with n at least 1, on the same device."""
        with single_threaded():
            rows = features.double()
            mean = rows.mean(dim=0)
            rows = rows - mean
            delta, total = mean - self.mean, self.count + len(rows)
            self.scatter.addmm_(rows.T, rows)
            self.scatter.addr_(delta, delta, alpha=self.count * len(rows) / total)
            self.mean += delta * (len(rows) / total)
            self.count = total

    @property
    def covariance(self) -> Tensor:
        """float64 (D, D), with the divisor count - 1, of at least two rows."""
        return self.scatter / (self.count - 1)


def frechet_distance(a: RunningCovariance, b: RunningCovariance) -> float:
    """Squared Frechet distance between two Gaussians, the formula of FID (Heusel et al., 2017).

    |mean_a - mean_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2)). With S = F F^T the last trace is the sum of the
    singular values of F_a^T F_b, which avoids the root of a non-symmetric matrix and is exact for rank-deficient
    covariances, that is for fewer images than features.

    The estimate is biased upwards by an amount that depends on the number of images: compare at equal numbers only.
    """
    with single_threaded():
        mean_term = (a.mean.cpu() - b.mean.cpu()).square().sum()
        cov_a, cov_b = a.covariance.cpu(), b.covariance.cpu()
        root_trace = torch.linalg.svdvals(_factor(cov_a).T @ _factor(cov_b)).sum()
        distance = mean_term + cov_a.trace() + cov_b.trace() - 2 * root_trace
    return max(distance.item(), 0.0)


def _factor(covariance: Tensor) -> Tensor:
    """F (D, rank) with F F^T = covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    # Without eigenvalues that are rounding errors: the root of 1e-16 is 1e-8, and there can be a thousand of them.
    significant = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    return vectors[:, significant] * values[significant].sqrt()


def kernel_distance(
    features: Tensor, reference: Tensor, *, reference_sums: Tensor | None = None
) -> tuple[float, float]:
    """KID: the unbiased squared MMD with the kernel (x . y / D + 1)^3 (Binkowski et al., 2018), and its standard error.

    This is the U-statistic over all pairs. It has the expectation of the usual mean over random subsets, a smaller
    variance and no seed; for two sets of one distribution that is 0, so it may be negative. Sets of equal size are
    treated as pairs (Gretton et al., 2012, lemma 6): image i is not compared with reference i, so that a set against
    itself or against altered copies stays unbiased.

    The standard error is the jackknife's, leaving out one image (or pair) at a time. It includes the sampling of both
    sets, so models compared on one reference differ more reliably than it suggests; by the Efron-Stein inequality it
    is biased upwards, most where the sets agree. (The standard deviation over random subsets that other programs print
    is not a standard error: it depends on the subset size instead of the number of images.)

    Args:
        features: floating point (n, D), n at least 3.
        reference: floating point (m, D), m at least 3, on the same device.
        reference_sums: `kernel_sums(reference)`, if known.
    """
    n, m = len(features), len(reference)
    with single_threaded():
        x = kernel_sums(features)
        y = kernel_sums(reference) if reference_sums is None else reference_sums
        xy, yx = _kernel_sums(features, reference, skip_diagonal=n == m)
        if n == m:
            h = x + y - xy - yx
            value = h.sum() / (n * (n - 1))
            without = (h.sum() - 2 * h) / ((n - 1) * (n - 2))
            return value.item(), _jackknife_variance(without).sqrt().item()
        sum_x, sum_y, sum_xy = x.sum(), y.sum(), xy.sum()
        value = sum_x / (n * (n - 1)) + sum_y / (m * (m - 1)) - 2 * sum_xy / (n * m)
        # Up to constants, which do not change the jackknife.
        without_x = (sum_x - 2 * x) / ((n - 1) * (n - 2)) - 2 * (sum_xy - xy) / ((n - 1) * m)
        without_y = (sum_y - 2 * y) / ((m - 1) * (m - 2)) - 2 * (sum_xy - yx) / (n * (m - 1))
        variance = _jackknife_variance(without_x) + _jackknife_variance(without_y)
        return value.item(), variance.sqrt().item()


def kernel_sums(features: Tensor) -> Tensor:
    """Each row's sum of kernels with all other rows: (n, D) -> float64 (n,)."""
    with single_threaded():
        return _kernel_sums(features, features, skip_diagonal=True)[0]


def _kernel_sums(x: Tensor, y: Tensor, *, skip_diagonal: bool) -> tuple[Tensor, Tensor]:
    """Sums of the kernel matrix over its columns (n,) and over its rows (m,)."""
    row_sums = torch.empty(len(x), dtype=torch.float64, device=x.device)
    column_sums = torch.zeros(len(y), dtype=torch.float64, device=x.device)
    for rows, products in _inner_products(x, y):
        kernel = products.div_(x.shape[1]).add_(1)
        kernel = kernel * kernel * kernel
        if skip_diagonal:
            kernel.diagonal(rows.start).zero_()
        row_sums[rows] = kernel.sum(dim=1)
        column_sums += kernel.sum(dim=0)
    return row_sums, column_sums


def _jackknife_variance(estimates: Tensor) -> Tensor:
    """Variance of an estimate, from its values with each observation left out."""
    return (len(estimates) - 1) * (estimates - estimates.mean()).square().mean()


def precision_recall(features: Tensor, reference: Tensor, *, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., 2019).

    A set's manifold is the union of balls around its images, each reaching to the `neighbours`-th nearest other image
    of the set. Precision is the fraction of the images in the reference's manifold, recall the fraction of the
    reference in the images' manifold. Both depend on the number of images: an evenly spaced subset of the larger set
    is used, as large as the smaller set.

    Args:
        features: floating point (n, D), n more than `neighbours`.
        reference: floating point (m, D), m more than `neighbours`, on the same device.
    """
    count = min(len(features), len(reference))
    with single_threaded():
        x, y = features[evenly_spaced(len(features), count)], reference[evenly_spaced(len(reference), count)]
        radius_x, radius_y = _squared_radii(x, neighbours), _squared_radii(y, neighbours)
        in_y, in_x = [], torch.zeros(count, dtype=torch.bool, device=x.device)
        for rows, squared in squared_distances(x, y):
            in_y.append((squared <= radius_y).any(dim=1))
            in_x |= (squared <= radius_x[rows, None]).any(dim=0)
    return torch.cat(in_y).double().mean().item(), in_x.double().mean().item()


def _squared_radii(x: Tensor, neighbours: int) -> Tensor:
    """Squared distance from each row to its `neighbours`-th nearest other row."""
    radii = torch.empty(len(x), dtype=torch.float64, device=x.device)
    for rows, squared in squared_distances(x, x):
        squared.diagonal(rows.start).fill_(torch.inf)
        radii[rows] = squared.kthvalue(neighbours, dim=1).values
    return radii


def squared_distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """All squared distances in blocks of x's rows: the slice of rows, and float64 (rows, len(y))."""
    norms_x, norms_y = x.double().square().sum(dim=1), y.double().square().sum(dim=1)
    for rows, products in _inner_products(x, y):
        scale = norms_x[rows, None] + norms_y
        squared = scale - 2 * products
        yield rows, squared.masked_fill_(squared < DUPLICATE * scale, 0)


def _inner_products(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(x), ROWS):
        rows = slice(start, min(start + ROWS, len(x)))
        block = x[rows].double()
        yield rows, torch.cat([block @ columns.double().T for columns in y.split(COLUMNS)], dim=1)


def evenly_spaced(num_items: int, count: int) -> np.ndarray:
    """At most `count` of the indices 0..num_items-1, ascending: a fair subset of data sorted by class."""
    count = min(count, num_items)
    return np.arange(count) * num_items // max(count, 1)
