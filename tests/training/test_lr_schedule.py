import math

import pytest

from gnunet.config import TrainConfig
from gnunet.training.lr_schedule import learning_rate


def rates(images: list[float], **keys) -> list[float]:
    train = TrainConfig(total_images=1000, learning_rate=2.0, batch_size=10, **keys)
    return [learning_rate(train, n) for n in images]


def test_constant_without_warmup():
    assert rates([0, 500, 1000]) == [2.0, 2.0, 2.0]


def test_warmup_is_linear_and_then_the_schedule_starts():
    assert rates([0, 50, 100, 150], warmup_images=100) == [0.0, 1.0, 2.0, 2.0]


def test_linear_reaches_zero_at_the_end_and_stays():
    assert rates([0, 100, 550, 1000, 1100], warmup_images=100, lr_schedule="linear") == [0, 2, 1, 0, 0]


def test_cosine():
    quarter = 1 + math.cos(math.pi / 4)
    expected = [2.0, quarter, 1.0, 0.0]
    assert rates([0, 250, 500, 1000], lr_schedule="cosine") == pytest.approx(expected)


def test_inverse_sqrt_starts_at_its_own_point_or_after_the_warmup():
    schedule = {"lr_schedule": "inverse_sqrt"}
    assert rates([100, 200, 800], lr_decay_start=200, **schedule) == [2.0, 2.0, 1.0]
    assert rates([50, 100, 400], warmup_images=100, **schedule) == [1.0, 2.0, 1.0]


def test_warmup_as_long_as_the_run():
    assert rates([500, 1000], warmup_images=1000, lr_schedule="linear") == [1.0, 2.0]
