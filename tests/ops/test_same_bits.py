"""A sample's result has the same bits in every run and in every batch."""

import pytest
import torch

from gnunet.ops import group_norm_silu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (channels, groups, spatial): more than torch's grain of work for one sample, sizes that no vector
# divides, one group, one channel, as many groups as channels, many channels, 0 to 3 dimensions.
SHAPES = [
    (32, 8, (32, 32)),
    (32, 8, (33, 31)),
    (192, 8, (8, 8)),
    (512, 32, (8, 8)),
    (512, 1, (16, 16)),
    (6, 3, (7, 5)),
    (6, 1, (40, 40)),
    (1, 1, (211, 211)),
    (3, 1, (101, 103)),
    (30, 10, (37,)),
    (64, 64, (40, 41)),
    (48, 8, (4, 4, 5)),
    (40, 4, ()),
    (4096, 8, (4, 4)),
]


def run(x, dy, num_groups, options):
    """-> y, dx"""
    x = x.detach().requires_grad_()
    y = group_norm_silu(x, num_groups, **options)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


@pytest.mark.parametrize("given", [("add", "scale", "shift"), ("add",)])  # PyTorch's own kernels take the latter
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("threads", "center"), [(1, True), (2, True), (3, True), (2, False)])
@pytest.mark.parametrize(("channels", "groups", "spatial"), SHAPES)
def test_alone_as_in_a_batch_of_seven(lay_out, set_threads, channels, groups, spatial, threads, center, layout, given):
    set_threads(threads)
    generator = torch.Generator().manual_seed(0)
    shared = {name: torch.randn(channels, generator=generator) for name in ("weight", "bias")} | {"center": center}
    own = {name: torch.randn(7, channels, generator=generator) for name in given}
    for dtype in DTYPES:
        x, dy = (torch.randn(7, channels, *spatial, generator=generator).to(dtype) for _ in range(2))
        batch = run(lay_out(x, layout), lay_out(dy, layout), groups, {**shared, **own})
        for i in (0, 3, 6):
            tensors = {**shared, **{name: t[i : i + 1] for name, t in own.items()}}
            alone = run(lay_out(x[i : i + 1], layout), lay_out(dy[i : i + 1], layout), groups, tensors)
            for together, single in zip(batch, alone, strict=True):
                assert torch.equal(together[i : i + 1], single), (dtype, i)

        companions = x.clone()
        companions[[0, 1, 2, 4, 5, 6]] = torch.nan
        beside_nan = run(lay_out(companions, layout), lay_out(dy, layout), groups, {**shared, **own})
        for together, beside in zip(batch, beside_nan, strict=True):
            assert torch.equal(together[3], beside[3]), dtype


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_two_runs_agree(make_case, layout):
    case = make_case((5, 48, 17, 19), 8, layout=layout, given=("weight", "bias", "add", "scale", "shift"))
    dy = torch.randn(case.x.shape)
    first, second = case.run_with_gradients(dy), case.run_with_gradients(dy)
    assert all(torch.equal(first[name], second[name]) for name in first)
