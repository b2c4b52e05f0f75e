import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from gnunet.evaluation import distances
from gnunet.evaluation.distances import (
    RunningCovariance,
    evenly_spaced,
    frechet_distance,
    kernel_distance,
    kernel_sums,
    precision_recall,
)


def draw(count, features=12, *, seed=0, shift=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, features, generator=generator) * scale + shift


def mixed(count, features, seed):
    """Features with correlations and a spectrum that falls by orders of magnitude, as networks' do."""
    mixing = torch.linalg.qr(draw(features, features, seed=100))[0] * torch.logspace(1, -2, features)
    return draw(count, features, seed=seed) @ mixing + 0.1 * seed


def moments(x, block=10_000):
    result = RunningCovariance.empty(x.shape[1])
    for part in x.split(block):
        result.update(part)
    return result


def torchmetrics_fid(x, y):
    class Given(nn.Module):
        num_features = x.shape[1]

        def forward(self, features):
            return features

    metric = FrechetInceptionDistance(feature=Given(), normalize=True)
    metric.update(y.double(), real=True)
    metric.update(x.double(), real=False)
    return metric.compute().item()


class TestRunningCovariance:
    @pytest.mark.parametrize("block", [1, 8, 33, 100])
    def test_mean_and_covariance_agree_with_torch(self, block):
        x = mixed(100, 7, seed=1)
        found = moments(x, block)
        assert found.count == 100
        torch.testing.assert_close(found.mean, x.double().mean(dim=0), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(found.covariance, torch.cov(x.double().T), rtol=1e-12, atol=1e-12)

    def test_large_mean_does_not_cancel(self):
        x = draw(100, 7, shift=1e7).double()  # squares of 1e14 leave the sum of squares two digits
        torch.testing.assert_close(moments(x, 8).covariance, torch.cov(x.T), rtol=1e-7, atol=1e-7)


class TestFrechet:
    @pytest.mark.parametrize("counts", [(400, 300), (64, 64), (1000, 65)])
    def test_agrees_with_torchmetrics(self, counts):
        x, y = mixed(counts[0], 64, seed=1), mixed(counts[1], 64, seed=2)
        assert frechet_distance(moments(x), moments(y)) == pytest.approx(torchmetrics_fid(x, y), rel=1e-6)

    def test_of_known_gaussians(self):
        # sqrt(n - 1) times the unit vectors, with either sign, have the covariance 2 I and the mean 0.
        n = 8
        x = torch.cat([torch.eye(4), -torch.eye(4)]).double() * (n - 1) ** 0.5
        a, b = moments(x), moments(3 * x + 5)
        assert frechet_distance(a, b) == pytest.approx(4 * 25 + 4 * 2 * (3 - 1) ** 2, rel=1e-12)
        assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
        ones = moments(torch.ones(4, 3))
        assert frechet_distance(ones, moments(torch.zeros(5, 3))) == 3 and frechet_distance(ones, ones) == 0

    @pytest.mark.parametrize("counts", [(20, 30), (2, 200), (40, 500)])
    def test_fewer_images_than_features(self, counts):
        x, y = (mixed(count, 96, seed=i + 1).double() for i, count in enumerate(counts))
        centred = [(z - z.mean(dim=0)) / (len(z) - 1) ** 0.5 for z in (x, y)]
        # The trace of the root is the sum of singular values of the centred features' products.
        expected = (
            (x.mean(dim=0) - y.mean(dim=0)).square().sum()
            + sum(z.square().sum() for z in centred)
            - 2 * torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
        )
        assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected.item(), rel=1e-9)

    @pytest.mark.parametrize("count", [5, 60, 500])
    def test_of_a_set_to_itself(self, count):
        x = mixed(count, 60, seed=1)
        size = moments(x).covariance.trace().item()
        assert 0 <= frechet_distance(moments(x), moments(x)) < 1e-12 * size
        assert frechet_distance(moments(x), moments(x.flip(0))) < 1e-12 * size


def brute_force_mmd(x, y, *, paired):
    """The U-statistic written out; of pairs without the kernels of x[i] and y[i]."""

    def kernels(a, b):
        return (a.double() @ b.double().T / a.shape[1] + 1) ** 3

    def off_diagonal_mean(values):
        return (values.sum() - values.trace()) / (len(values) * (len(values) - 1))

    xy = off_diagonal_mean(kernels(x, y)) if paired else kernels(x, y).mean()
    return (off_diagonal_mean(kernels(x, x)) + off_diagonal_mean(kernels(y, y)) - 2 * xy).item()


def brute_force_jackknife(x, y, *, paired):
    def without(z, i):
        return torch.cat([z[:i], z[i + 1 :]])

    def variance(values):
        return (len(values) - 1) * np.var(values)

    if paired:
        values = [brute_force_mmd(without(x, i), without(y, i), paired=True) for i in range(len(x))]
        return variance(values) ** 0.5
    values = [[brute_force_mmd(without(a, i), b, paired=False) for i in range(len(a))] for a, b in ((x, y), (y, x))]
    return sum(map(variance, values)) ** 0.5


class TestKernel:
    @pytest.mark.parametrize("counts", [(9, 14), (14, 9), (12, 12), (3, 40), (3, 3)])
    def test_agrees_with_brute_force(self, counts, monkeypatch):
        monkeypatch.setattr(distances, "ROWS", 4)
        monkeypatch.setattr(distances, "COLUMNS", 5)
        x, y = draw(counts[0], seed=1), draw(counts[1], seed=2, shift=0.5)
        found, paired = kernel_distance(x, y), counts[0] == counts[1]
        assert found[0] == pytest.approx(brute_force_mmd(x, y, paired=paired), rel=1e-12)
        assert found[1] == pytest.approx(brute_force_jackknife(x, y, paired=paired), rel=1e-9)
        assert kernel_distance(x, y, reference_sums=kernel_sums(y)) == found

    @pytest.mark.parametrize("counts", [(30, 50), (40, 40)])
    def test_unbiased_for_one_distribution_and_its_error_covers(self, counts):
        found = [kernel_distance(draw(counts[0], seed=s), draw(counts[1], seed=s + 10_000)) for s in range(300)]
        values, errors = np.transpose(found)
        spread_of_mean = values.std(ddof=1) / len(values) ** 0.5
        assert abs(values.mean()) < 3 * spread_of_mean
        assert (values < 0).any()
        # The jackknife errs upwards: at most by about sqrt(2) in the degenerate case of one distribution.
        mean_error = np.mean(errors**2) ** 0.5
        assert values.std() < mean_error < 2 * values.std()

    @pytest.mark.parametrize("counts", [(60, 100), (80, 80)])
    def test_standard_error_of_different_distributions(self, counts):
        found = [
            kernel_distance(draw(counts[0], seed=s, shift=0.8), draw(counts[1], seed=s + 10_000)) for s in range(300)
        ]
        true = kernel_distance(draw(4000, seed=77, shift=0.8), draw(4001, seed=78))[0]
        values, errors = np.transpose(found)
        assert abs(values.mean() - true) < 4 * values.std() / 300**0.5 + 0.01 * true
        assert 0.85 * values.std() < errors.mean() < 1.25 * values.std()

    def test_of_a_set_to_itself_is_zero(self):
        value, error = kernel_distance(draw(100, 30), draw(100, 30))
        assert abs(value) < 1e-15 and error < 1e-15


def brute_force_precision(x, y, k):
    radius = [sorted(torch.dist(a, b).item() for b in y)[k] for a in y]  # the nearest is the row itself
    return np.mean([any(torch.dist(a, b).item() <= r for b, r in zip(y, radius, strict=True)) for a in x])


class TestPrecisionRecall:
    @pytest.mark.parametrize("k", [1, 3])
    def test_agrees_with_brute_force(self, k, monkeypatch):
        monkeypatch.setattr(distances, "ROWS", 7)
        x, y = draw(30, 3, seed=1).double(), draw(30, 3, seed=2, scale=0.6).double()
        precision, recall = precision_recall(x, y, neighbours=k)
        assert precision == brute_force_precision(x, y, k)
        assert recall == brute_force_precision(y, x, k)
        assert 0 < precision < recall < 1

    def test_of_known_sets(self):
        line = torch.arange(10.0)[:, None]
        assert precision_recall(line, line) == (1, 1)
        assert precision_recall(line, line + 1000) == (0, 0)
        first = torch.cat([line[:5], line[:5] + 0.1])
        assert precision_recall(first, line) == (1, 0.6)  # the ball around 4.1 ends at 5.2
        same = torch.ones(5, 3) * 0.1  # radii of zero, distances of rounding
        assert precision_recall(same, same.clone()) == (1, 1)

    def test_compares_equal_numbers(self):
        x, y = draw(40, 2, seed=1), draw(20, 2, seed=2)
        assert precision_recall(x, y) == precision_recall(x[::2], y)


@pytest.mark.parametrize("function", [kernel_distance, precision_recall])
def test_distances_do_not_depend_on_the_number_of_threads(function, with_threads):
    x, y = draw(300, 700, seed=1), draw(400, 700, seed=2)
    found = with_threads(lambda: (function(x, y), frechet_distance(moments(x), moments(y))))
    assert found == found[:1] * 3


def test_evenly_spaced():
    assert evenly_spaced(5, 9).tolist() == [0, 1, 2, 3, 4]
    assert evenly_spaced(10, 4).tolist() == [0, 2, 5, 7]
    assert evenly_spaced(0, 4).tolist() == []
