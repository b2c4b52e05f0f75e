"""How a tensor is cut up for the Triton kernels."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gnunet.ops.gpu.plan import Chunks, Loop, Shape, Tile, cut, power_of_two


@st.composite
def shapes(draw):
    groups = draw(st.sampled_from([1, 2, 3, 16, 32, 48, 512]))
    channels = groups * draw(st.sampled_from([1, 2, 3, 4, 5, 6, 8, 10, 16, 20, 30, 60, 128]))
    positions = draw(st.one_of(st.integers(1, 5000), st.sampled_from([2**k for k in range(24)])))
    return Shape(positions, channels, groups, draw(st.sampled_from([2, 4])), draw(st.booleans()))


@settings(max_examples=500, deadline=None, derandomize=True)
@given(shape=shapes(), direction=st.sampled_from(["forward", "backward"]))
def test_every_element_is_in_a_tile_and_tiles_are_what_the_kernels_take(shape, direction):
    plan = cut(shape, direction)
    assert plan.block_s == power_of_two(plan.block_s) and plan.block_c == power_of_two(plan.block_c)
    assert 1 <= plan.num_warps <= 16
    assert plan.block_s * plan.block_c <= 16384
    # Offsets within a tile are 32 bits.
    widest = plan.block_s * shape.channels + plan.block_c
    assert (widest if shape.channels_last else plan.block_c * shape.positions) < 2**31
    if isinstance(plan, Chunks):
        assert plan.chunk % plan.block_s == 0
        assert (plan.chunks - 1) * plan.chunk < shape.positions <= plan.chunks * plan.chunk
        assert plan.chunks <= 1024
        return
    width = plan.groups * shape.group_channels
    assert plan.groups <= shape.num_groups and width <= plan.block_c
    if isinstance(plan, Tile):
        assert plan.block_s >= shape.positions
    if shape.channels_last and plan.groups < shape.num_groups:
        assert width * shape.itemsize >= 64


@pytest.mark.parametrize(
    ("positions", "channels", "channels_last", "forward", "backward"),
    [
        # DDPM's levels at 32x32 and 4x4, a latent diffusion model's first, a decoder's last; 32 groups, 16 bits.
        (1024, 128, True, Loop, Loop),
        (1024, 128, False, Tile, Tile),
        (16, 512, True, Tile, Tile),
        (4096, 320, True, Chunks, Chunks),
        (4096, 320, False, Loop, Loop),
        (1024**2, 128, True, Chunks, Chunks),
    ],
)
def test_known_sizes_go_where_they_should(positions, channels, channels_last, forward, backward):
    shape = Shape(positions, channels, 32, 2, channels_last)
    assert (type(cut(shape, "forward")), type(cut(shape, "backward"))) == (forward, backward)


def test_a_single_sample_gives_a_gpu_enough_programs():
    for channels, size in ((320, 64), (512, 64), (128, 1024), (256, 512)):
        plan = cut(Shape(size * size, channels, 32, 2, True), "forward")
        assert plan.chunks * -(-channels // plan.block_c) >= 256
