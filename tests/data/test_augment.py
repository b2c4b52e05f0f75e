"""Transforms of training images against the paper's table (Karras et al., 2022, table 6), step by step."""

import numpy as np
import pytest
import torch

from gnunet.data.augment import draw_transforms, transform
from gnunet.random_streams import Stream, StreamKey

SIZE = 24, 16  # height, width


def draw(probability, count=4000, size=SIZE):
    return draw_transforms(Stream(3, StreamKey.AUGMENT), range(count), probability, size)


def rotate(points, cos, sin):
    return np.array([[cos, -sin], [sin, cos]]) @ points


def test_maps_are_the_inverse_of_the_transforms_that_the_labels_describe():
    labels, maps = draw(1.0, 50)
    points = np.random.default_rng(0).uniform(-1, 1, (2, 6))  # (x, y), from -1 to 1
    side = np.array([[SIZE[1]], [SIZE[0]]])
    for (x_flip, y_flip, scale, cos, sin, u, v, x, y), to_image in zip(labels.astype(float), maps, strict=True):
        moved = points * side * [[1 - 2 * x_flip], [1 - 2 * y_flip]] * 2 ** (0.2 * scale)
        moved = rotate(moved, cos + 1, -sin)  # by -a3
        stretch = np.hypot(u, v)  # or its negative, with the opposite axis: the same transform
        axis = np.array([u, v]) / stretch
        one, other = (stretched(moved, axis, factor) for factor in (stretch, -stretch))
        shift = np.array([[x], [y]]) / 8 * 2  # coordinates span 2
        back = [to_image[:, :2] @ (each / side + shift) + to_image[:, 2:] for each in (one, other)]
        assert min(abs(each - points).max() for each in back) < 1e-5


def stretched(points, axis, exponent):
    along = rotate(points, axis[0], -axis[1]) * [[2 ** (0.2 * exponent)], [2 ** (-0.2 * exponent)]]
    return rotate(along, *axis)


def test_each_transform_has_the_probability_and_distribution():
    labels, maps = draw(0.2)
    used = labels[:, [2, 4, 5, 7]].T != 0
    assert used.mean(1) == pytest.approx(0.2, abs=0.02)
    assert labels[:, :2].mean(0) == pytest.approx([0.5, 0.1], abs=0.025)  # in x always flipped or not
    together = (used[0] & used[1]).mean()
    assert together == pytest.approx(0.04, abs=0.01)  # independent of one another
    for column in (2, 7, 8):
        values = labels[labels[:, column] != 0, column]
        assert values.mean() == pytest.approx(0, abs=0.1) and values.std() == pytest.approx(1, abs=0.1)
    plain = ~labels.any(1)
    assert plain.mean() == pytest.approx(0.8**4 * 0.9 * 0.5, abs=0.03)
    assert (maps[plain] == np.eye(2, 3)).all()
    assert not draw(0.0, 8)[0][:, 1:].any()


def test_an_example_depends_on_seed_and_index_alone():
    stream = Stream(3, StreamKey.AUGMENT)
    for all_of_them, some in zip(draw(0.5, 12), draw_transforms(stream, [7, 3], 0.5, SIZE), strict=True):
        assert (all_of_them[[7, 3]] == some).all()


@pytest.mark.parametrize(
    ("to_image", "expected"),
    [
        ([[1, 0, 0], [0, 1, 0]], lambda x: x),
        ([[-1, 0, 0], [0, 1, 0]], lambda x: x.flip(3)),
        ([[1, 0, 0], [0, -1, 0]], lambda x: x.flip(2)),
        ([[1, 0, 0.25], [0, 1, 0]], lambda x: torch.cat([x[..., 2:], x.flip(3)[..., :2]], 3)),  # shifted by 2 of 16
        ([[0, 24 / 16, 0], [-16 / 24, 0, 0]], lambda x: x[:, :, 4:-4].rot90(-1, (2, 3))),  # a quarter turn of squares
    ],
    ids=["identity", "x", "y", "shift", "turn"],
)
def test_transform(to_image, expected):
    images = torch.randn(2, 3, *SIZE)
    maps = torch.tensor(to_image, dtype=torch.float32).expand(2, 2, 3)
    moved, wanted = transform(images, maps), expected(images)
    inside = moved if moved.shape == wanted.shape else moved[:, :, 4:-4]
    torch.testing.assert_close(inside, wanted, rtol=0, atol=1e-4)
    assert torch.equal(transform(images[1:], maps[1:]), moved[1:])
    if expected(images) is images:
        assert torch.equal(moved, images)
