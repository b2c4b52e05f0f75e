"""How a tensor is tiled for the Triton kernels."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gnunet.ops.planned import Shape
from gnunet.ops.triton_kernels.tiling import align_s, choose_tiling


@st.composite
def shapes(draw):
    groups = draw(st.sampled_from([1, 2, 3, 16, 32, 48, 512]))
    channels = groups * draw(st.sampled_from([1, 2, 3, 4, 5, 6, 8, 10, 16, 20, 30, 60, 128]))
    positions = draw(st.one_of(st.integers(1, 5000), st.sampled_from([2**k for k in range(24)])))
    return Shape(positions, channels, groups, draw(st.sampled_from([2, 4])), draw(st.booleans()))


@settings(max_examples=500, deadline=None, derandomize=True)
@given(shape=shapes(), direction=st.sampled_from(["forward", "backward", "backward of tables"]))
def test_every_element_is_in_a_tile_and_tiles_are_what_the_kernels_take(shape, direction):
    tiling = choose_tiling(shape, direction)
    assert tiling.block_s.bit_count() == tiling.block_c.bit_count() == tiling.groups.bit_count() == 1
    assert 1 <= tiling.num_warps <= 16
    assert tiling.block_s * tiling.block_c <= 16384
    # Offsets within a tile are 32 bits.
    widest = tiling.block_s * shape.channels + tiling.block_c
    assert (widest if shape.channels_last else tiling.block_c * shape.positions) < 2**31
    width = tiling.groups * shape.group_channels
    assert (tiling.group_blocks - 1) * tiling.groups < shape.num_groups <= tiling.group_blocks * tiling.groups
    if tiling.split_size is not None:
        assert tiling.split_size % tiling.block_s == 0
        assert (tiling.position_splits - 1) * tiling.split_size < shape.positions
        assert shape.positions <= tiling.position_splits * tiling.split_size
        assert (tiling.channel_splits - 1) * tiling.block_c < width <= tiling.channel_splits * tiling.block_c
        assert tiling.groups == 1 or tiling.channel_splits == 1
    else:
        assert width <= tiling.block_c and tiling.block_s >= shape.positions
        if shape.channels_last and tiling.groups < shape.num_groups:
            assert width * shape.itemsize >= 64


@pytest.mark.parametrize(
    ("positions", "channels", "channels_last", "single_pass_forward", "single_pass_backward"),
    [
        # DDPM's levels at 32x32 and 4x4, a latent diffusion model's first, a decoder's last; 32 groups, 16 bits.
        (1024, 128, True, False, False),
        (1024, 128, False, True, True),
        (16, 512, True, True, True),
        (4096, 320, True, False, False),
        (1024**2, 128, True, False, False),
    ],
)
def test_known_sizes_go_where_they_should(
    positions, channels, channels_last, single_pass_forward, single_pass_backward
):
    shape = Shape(positions, channels, 32, 2, channels_last)
    assert (choose_tiling(shape, "forward").split_size is None) == single_pass_forward
    assert (choose_tiling(shape, "backward").split_size is None) == single_pass_backward


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_single_sample_gives_a_gpu_enough_programs(channels_last):
    for channels, size in ((320, 64), (512, 64), (128, 1024), (256, 512), (1280, 32)):
        tiling = choose_tiling(Shape(size * size, channels, 32, 2, channels_last), "forward")
        assert tiling.group_blocks * tiling.num_splits >= 80


def test_positions_that_need_64_bits():
    shape = Shape(2**31, 4, 2, 2, True)
    assert align_s(shape) == 1  # the kernels multiply it with the rest, in 32 bits where that has 32
    assert choose_tiling(shape, "forward").num_splits * choose_tiling(shape, "forward").split_size >= 2**31
