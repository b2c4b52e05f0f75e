import pytest
import torch

from gnunet.evaluation.distances import RunningCovariance


def moments_of(rows, *, block):
    moments = RunningCovariance.empty(rows.shape[1])
    for part in rows.split(block):
        moments.update(part)
    return moments


def rows(count=100, features=7, offset=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator)
    return torch.randn(count, features, generator=generator) @ mixing + offset


@pytest.mark.parametrize("block", [1, 8, 33, 100])
def test_mean_and_covariance_agree_with_torch(block):
    x = rows()
    moments = moments_of(x, block=block)
    assert moments.count == 100
    torch.testing.assert_close(moments.mean, x.double().mean(dim=0), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(moments.covariance, torch.cov(x.double().T), rtol=1e-12, atol=1e-12)


def test_large_mean_does_not_cancel():
    x = rows(offset=1e7).double()  # squares of 1e14 leave the sum of squares two digits
    moments = moments_of(x, block=8)
    torch.testing.assert_close(moments.covariance, torch.cov(x.T), rtol=1e-7, atol=1e-7)


def test_result_does_not_depend_on_the_number_of_threads(with_threads):
    first, *others = with_threads(lambda: moments_of(rows(300, 200), block=64))
    assert all(torch.equal(first.mean, other.mean) and torch.equal(first.scatter, other.scatter) for other in others)


def test_invalid_rows_raise():
    moments = RunningCovariance.empty(3)
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        moments.update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"\(0, 3\)"):
        moments.update(torch.zeros(0, 3))
    moments.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="1 given"):
        moments.covariance  # noqa: B018
