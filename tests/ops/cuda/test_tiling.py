"""How clusters of thread blocks share out a tensor."""

from math import gcd

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gnunet.ops.cuda.tiling import H100, Gpu, choose_tiling
from gnunet.ops.planned import Shape

A100, CONSUMER = Gpu(163 * 1024, 1), Gpu(99 * 1024, 8)


@st.composite
def shapes(draw):
    groups = draw(st.sampled_from([1, 2, 3, 16, 32, 48, 512]))
    channels = groups * draw(st.sampled_from([1, 2, 3, 4, 5, 6, 8, 10, 16, 18, 20, 30, 60, 128]))
    positions = draw(st.one_of(st.integers(1, 5000), st.sampled_from([2**k for k in range(24)])))
    return Shape(positions, channels, groups, draw(st.sampled_from([2, 4])), draw(st.booleans()))


@settings(max_examples=500, deadline=None, derandomize=True)
@given(shape=shapes(), gpu=st.sampled_from([H100, A100, CONSUMER]), direction=st.sampled_from([(1, 0), (2, 2), (2, 3)]))
def test_every_element_is_in_a_vector_and_tilings_are_what_the_kernels_take(shape, gpu, direction):
    tiling = choose_tiling(shape, gpu, *direction)
    if tiling is None:  # threads are too few for the channels of a group
        channels = gcd(shape.group_channels, 16 // shape.itemsize) if shape.channels_last else 1
        assert shape.group_channels // channels > 1024 - 32 or gpu.shared_bytes < 4 * 8 * shape.group_channels * 3
        return
    assert shape.channels % tiling.width == 0 and tiling.width % shape.group_channels == 0
    in_memory = (shape.channels, tiling.width) if shape.channels_last else (shape.positions,)
    assert all(size % tiling.vector == 0 for size in in_memory) and tiling.vector * shape.itemsize <= 16
    assert tiling.threads % 32 == 0 and tiling.lanes * tiling.rows <= tiling.threads <= 1024
    assert tiling.lanes * (tiling.vector if shape.channels_last else 1) == tiling.width
    assert tiling.ranks <= gpu.max_ranks and tiling.shared_bytes <= gpu.shared_bytes
    positions = shape.positions if shape.channels_last else shape.positions // tiling.vector
    assert tiling.steps * tiling.rows * tiling.ranks >= positions
    assert len(tiling.held) == direction[0] and all(0 <= held <= tiling.steps for held in tiling.held)
    if tiling.fold > 1:  # rows of the same channels are neighbors in a warp, that has no others
        beside = tiling.lanes if shape.channels_last else 1
        assert tiling.rows % tiling.fold == 0 and 32 % (beside * tiling.fold) == 0
        assert tiling.lanes * tiling.rows % 32 == 0 or not shape.channels_last


@pytest.mark.parametrize(
    ("channels", "size", "ranks"),
    [(128, 32, 2), (512, 4, 1), (320, 64, 8), (1280, 32, 8), (1024, 64, 8), (512, 128, 8)],
)
def test_sizes_of_unets_fit_clusters(channels, size, ranks):
    for direction in ((1, 0), (2, 2)):
        tiling = choose_tiling(Shape(size * size, channels, 32, 2, True), H100, *direction)
        assert tiling.fits and tiling.ranks <= ranks and tiling.vector == 8 and tiling.width * 2 >= 32
    contiguous = choose_tiling(Shape(size * size, channels, 32, 2, False), H100, 1, 0)
    assert contiguous.fits and contiguous.vector == 8


def test_without_clusters_small_blocks_fit():
    assert choose_tiling(Shape(256, 512, 32, 2, True), A100, 2, 2).fits
    large = choose_tiling(Shape(4096, 320, 32, 2, True), A100, 1, 0)
    assert large.ranks == 1 and 0 < large.held[0] < large.steps


@pytest.mark.parametrize("shape", [Shape(16, 4096, 1, 2, False), Shape(2**31, 4, 2, 2, True)])
def test_shapes_that_are_not_taken(shape):
    assert choose_tiling(shape, H100, 1, 0) is None
