import math

import pytest

from gnunet.config import TrainConfig
from gnunet.training.lr_schedule import learning_rate

INVERSE_SQRT = {"lr_schedule": "inverse_sqrt"}


@pytest.mark.parametrize(
    ("keys", "images", "expected"),
    [
        ({}, [0, 500, 1000], [2, 2, 2]),
        ({"warmup_images": 100}, [0, 50, 100, 150], [0, 1, 2, 2]),
        ({"warmup_images": 100, "lr_schedule": "linear"}, [0, 100, 550, 1000, 1100], [0, 2, 1, 0, 0]),
        ({"warmup_images": 1000, "lr_schedule": "linear"}, [500, 1000], [1, 2]),
        ({"lr_schedule": "cosine"}, [0, 250, 500, 1000], [2, 1 + math.cos(math.pi / 4), 1, 0]),
        ({"lr_decay_start": 200} | INVERSE_SQRT, [100, 200, 800], [2, 2, 1]),
        ({"warmup_images": 100} | INVERSE_SQRT, [50, 100, 400], [1, 2, 1]),
    ],
    ids=["constant", "warmup", "linear", "warmup_as_long_as_the_run", "cosine", "decay_start", "decay_after_warmup"],
)
def test_learning_rate(keys, images, expected):
    train = TrainConfig(total_images=1000, learning_rate=2.0, batch_size=10, **keys)
    assert [learning_rate(train, n) for n in images] == pytest.approx(expected)
