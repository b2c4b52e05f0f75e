"""uint8 and back, and the geometry of grids."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from gnunet.diffusion import encode_png, make_grid
from gnunet.diffusion.images import GAP_COLOUR
from gnunet.scaling import to_uint8, to_unit_range


def test_every_level_comes_back():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    images = to_unit_range(levels)
    assert images.dtype == torch.float32 and images.min() == -1 and images.max() == 1
    assert np.array_equal(to_uint8(images), levels.permute(0, 2, 3, 1).numpy())


def test_rounds_to_nearest_and_clamps():
    level = 1 / 127.5
    values = [-1 + 0.49 * level, -1 + 0.51 * level, 1 - 0.51 * level, 1 - 0.49 * level, -3.0, 7.0]
    assert to_uint8(torch.tensor(values).view(1, 1, 2, 3)).ravel().tolist() == [0, 1, 254, 255, 0, 255]
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0]).view(1, 1, 2, 2)
    assert to_uint8(special).ravel().tolist() == [128, 255, 0, 128]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_formats(memory_format):
    images = (torch.rand(2, 3, 4, 5) * 2 - 1).to(memory_format=memory_format)
    assert to_unit_range(images.byte()).is_contiguous(memory_format=memory_format)
    array = to_uint8(images)
    assert array.shape == (2, 4, 5, 3) and array.dtype == np.uint8 and array.flags.c_contiguous
    expected = np.rint((images.numpy() + 1) * 127.5).transpose(0, 2, 3, 1)
    assert np.array_equal(array, expected.astype(np.uint8))


@pytest.mark.parametrize(("count", "columns", "size"), [
    (1, None, (5, 4)), (4, None, (12, 10)), (5, None, (19, 10)), (5, 2, (12, 16)), (3, 5, (33, 4)),
])  # fmt: skip
def test_grid_geometry(count, columns, size):
    images = np.random.default_rng(0).integers(0, 256, (count, 4, 5, 3), dtype=np.uint8)
    grid = make_grid(images, columns)
    assert grid.mode == "RGB" and grid.size == size
    columns = columns or int(np.ceil(np.sqrt(count)))
    pixels, covered = np.asarray(grid), np.zeros(size[::-1], bool)
    for i in range(count):
        place = np.s_[i // columns * 6 : i // columns * 6 + 4, i % columns * 7 : i % columns * 7 + 5]
        assert np.array_equal(pixels[place], images[i])
        covered[place] = True
    assert (pixels[~covered] == GAP_COLOUR).all()


@pytest.mark.parametrize(("channels", "names"), [(3, ["b", "a", "b", "b"]), (1, list("abcd")), (3, ["x\ny" * 99] * 4)])
def test_a_grid_with_names_has_each_picture_enlarged_at_its_place(channels, names):
    images = np.random.default_rng(0).integers(0, 256, (4, 4, 5, channels), dtype=np.uint8)
    grid = Image.open(io.BytesIO(encode_png(make_grid(images, scale=3, names=names))))
    pixels = np.asarray(grid).reshape(*grid.size[::-1], channels).copy()
    tiles = json.loads(grid.info["tiles"])
    assert tiles["scale"] == 3 and max(grid.size) < 400
    for image, (top, left) in zip(images, tiles["corners"], strict=True):
        place = np.s_[top : top + 12, left : left + 15]
        np.testing.assert_array_equal(pixels[place], image.repeat(3, 0).repeat(3, 1))
        pixels[place] = GAP_COLOUR
    tops = {
        name: {top for other, (top, _) in zip(names, tiles["corners"], strict=True) if other == name} for name in names
    }
    assert all(len(rows) == 1 for rows in tops.values())  # a class has a row
    assert (pixels != GAP_COLOUR).any()  # the names


def test_grey_grid():
    grid = make_grid(np.full((2, 3, 3, 1), 7, np.uint8))
    assert grid.mode == "L" and grid.size == (8, 3)
    assert np.asarray(grid)[0].tolist() == [7, 7, 7, GAP_COLOUR, GAP_COLOUR, 7, 7, 7]


def test_rows_are_in_the_order_of_the_numbers_that_names_begin_with():
    names = ["10", "9", "-1.5 to 2", "1e+03", "a", "-2"]
    corners = json.loads(make_grid(np.zeros((6, 4, 100, 1), np.uint8), names=names).info["tiles"])["corners"]
    tops = [tuple(reversed(corner)) for corner in corners]
    assert [names[i] for i in sorted(range(6), key=tops.__getitem__)] == ["-2", "-1.5 to 2", "9", "10", "1e+03", "a"]
