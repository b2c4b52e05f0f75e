import pytest
import torch
from torch import nn

from gnunet.config import TrainConfig
from gnunet.training.ema import EMA, ema_decays, power_exponent


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_power_exponent_gives_the_profile_its_width(std):
    gamma = power_exponent(std)
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    weight = t**gamma / (t**gamma).sum()
    mean = (weight * t).sum()
    assert ((weight * (t - mean) ** 2).sum().sqrt()).item() == pytest.approx(std, rel=1e-4)


def test_power_average_of_steps_follows_the_power_profile():
    train = TrainConfig(total_images=1000, batch_size=1, ema_kind="power", ema_std=0.1)
    share = [1.0]
    for images in range(2, 1001):
        [decay] = ema_decays(train, images)
        share = [s * decay for s in share] + [1 - decay]
    gamma = power_exponent(0.1)
    assert sum(share) == pytest.approx(1)
    assert share[499] / share[999] == pytest.approx(0.5**gamma, rel=0.02)


@pytest.mark.parametrize(
    ("half_life", "rampup", "images", "expected"),
    [(100, None, 5000, 0.5), (10_000, 0.05, 2000, 0.5), (10_000, 0.05, 10**9, 0.5**0.01)],
    ids=["constant", "5%_of_2000_images", "after_rampup"],
)
def test_decay_halves_over_the_half_life(half_life, rampup, images, expected):
    train = TrainConfig(batch_size=100, ema_half_life=half_life, ema_rampup=rampup)
    assert ema_decays(train, images) == [expected]


def test_update_averages_parameters_and_statistics_and_copies_counts():
    model = nn.BatchNorm1d(3)
    ema = EMA(model)
    with torch.no_grad():
        model.weight += 4.0
        model.running_mean += 2.0
        model.num_batches_tracked += 5
    ema.update(1 - 0.75)
    assert torch.equal(ema.model.weight, torch.full((3,), 2.0))
    assert torch.equal(ema.model.running_mean, torch.full((3,), 0.5))
    assert ema.model.num_batches_tracked == 5
    assert not ema.model.training and model.training
    assert not any(p.requires_grad for p in ema.model.parameters())
