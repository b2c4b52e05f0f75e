"""The operator among PyTorch's systems: the compiler, autocast, saved tensors, devices without data."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from gnunet.environment import activation_bytes
from gnunet.ops import GroupNormSiLU, autograd, group_norm_silu

ALL = ("weight", "bias", "add", "scale", "shift")


@pytest.mark.parametrize(
    ("given", "center", "layout"),
    [
        ((), True, "contiguous"),
        (("add",), True, "channels_last"),
        (ALL, True, "channels_last"),
        (ALL, False, "contiguous"),
    ],
)
def test_opcheck(make_case, layout, given, center):
    make_case((2, 6, 4, 5), 3, layout=layout, given=given, center=center).opcheck("group_norm_silu")


def test_opcheck_without_positions_and_activation(make_case):
    make_case((2, 6), 3, given=("shift",), activation=None).opcheck("group_norm_silu")


@pytest.mark.parametrize(("backend", "center"), [("auto", True), ("reference", True), ("auto", False)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiles_without_a_graph_break(make_case, layout, backend, center):
    torch.compiler.reset()
    case = make_case((2, 16, 8, 8), 4, layout=layout, given=ALL, center=center)
    expected, compiled = case.run_with_gradients(backend), case.run_with_gradients(backend, compiled=True)
    assert compiled["y"].stride() == case.x.stride()
    for name, value in compiled.items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("size", [8, 32, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_is_a_tensor_of_its_own(size, dtype):
    x = torch.randn(1, 8, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = group_norm_silu(x, 4, torch.ones(8), torch.ones(8))
    assert y.untyped_storage().nbytes() == y.nbytes
    dx = torch.autograd.grad(y.add_(1), x, torch.ones_like(y))[0]  # changed in place
    assert dx.stride() == x.stride() and dx.untyped_storage().nbytes() == dx.nbytes


IN_PLACE = {
    "mul_": lambda y: y.mul_(2),
    "+=": lambda y: y.add_(y.detach().cos()),
    "dropout": lambda y: F.dropout(y, 0.4, inplace=True),
    "of a part": lambda y: y[:, 1:3].tanh_() is not None and y,
}


@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize(
    ("dtype", "given", "activation", "backend"),
    [
        (torch.float32, (), None, "eager"),
        (torch.bfloat16, (), "silu", "eager"),
        (torch.float32, ("weight", "bias"), "silu", "eager"),
        (torch.bfloat16, ("weight", "bias"), None, "eager"),
        (torch.float32, ALL, "silu", "eager"),
        (torch.float32, ALL, None, "reference"),
        (torch.bfloat16, ("weight", "bias"), "silu", "reference"),
    ],
)
def test_the_result_may_be_changed_in_place(make_case, dtype, given, activation, backend, change):
    """As if it were a copy: also its second derivatives, and without a gradient of x."""
    for layout, size, frozen in itertools.product(("contiguous", "channels_last"), (4, 1), (False, True)):
        case = make_case((2, 8, size, size), 2, dtype=dtype, layout=layout, given=given, activation=activation)
        leaves = [*([] if frozen else [case.x]), *case.tensors.values()]
        case.x.requires_grad_(not frozen)
        results = []
        for prepare in (torch.clone, lambda y: y) if leaves else ():
            torch.manual_seed(0)
            first = torch.autograd.grad(change(prepare(case.run(backend))).square().sum(), leaves, create_graph=True)
            penalty = sum(grad.square().sum() for grad in first)
            results.append((*first, *torch.autograd.grad(penalty, leaves, allow_unused=True)))
        for ours, expected in zip(*results, strict=True):
            assert (ours is None) == (expected is None) and (ours is None or torch.equal(ours, expected))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_inductor_where_a_group_is_cut(backend):
    """There torch.compile (2.13) leaves out elements of a loop that has to find a channel's group."""
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(0)
    a, b, weight, bias = (torch.randn(size, generator=generator) for size in ((2, 14, 4, 4), (2, 10, 4, 4), 24, 24))
    a, b = (t.contiguous(memory_format=torch.channels_last) for t in (a, b))
    before, behind = (torch.randn(size, size, 3, 3, generator=generator) / 20 for size in (14, 24))

    def function(a):
        x = torch.cat((F.conv2d(a, before, padding=1), b), 1)
        y = group_norm_silu(x, 2, weight, bias, backend=backend)  # of 12 channels each
        return F.conv2d(y, behind, padding=1).square().mean()

    a.requires_grad_()
    expected = torch.autograd.grad(function(a), a)
    found = torch.autograd.grad(torch.compile(function, fullgraph=True)(a), a)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_exported_program_needs_no_package_of_ours(backend):
    program = torch.export.export(GroupNormSiLU(3, 6, backend=backend), (torch.randn(2, 6, 4),))
    assert not [node for node in program.graph.nodes if "gnunet" in str(node.target)]


def test_what_was_compiled_from_another_source_of_the_operator_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def found_on_disk() -> int:
        torch.compiler.reset()
        counters.clear()
        torch.compile(lambda x: group_norm_silu(x, 2))(torch.ones(1, 4, 2))
        return counters["aot_autograd"]["autograd_cache_hit"]

    assert [found_on_disk(), found_on_disk()] == [0, 1]
    monkeypatch.setattr(autograd, "_REVISION", "of another source")
    assert found_on_disk() == 0


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("center", [True, False])
def test_autocast_changes_nothing(make_case, dtype, backend, center):
    case = make_case((2, 16, 8, 8), 4, dtype=dtype, parameter_dtype=torch.float32, given=ALL, center=center)
    plain = case.run_with_gradients(backend)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = case.run_with_gradients(backend)
    for name, value in plain.items():
        assert value.dtype == under_autocast[name].dtype and torch.equal(value, under_autocast[name]), name


@pytest.mark.parametrize(("center", "statistics"), [(True, 2), (False, 1)])
def test_saves_the_input_and_the_statistics_only(make_case, center, statistics):
    case = make_case((4, 32, 16, 16), 8, layout="channels_last", given=ALL, center=center)
    extra = activation_bytes(case.run, (case.x, *case.tensors.values()))
    assert extra == statistics * 4 * 8 * 4  # mean and rstd, or rstd, (4, 8), fp32


@pytest.mark.parametrize(("backend", "center"), [("auto", True), ("auto", False), ("reference", True)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_meta_device(memory_format, center, backend):
    layer = GroupNormSiLU(4, 16, center=center, backend=backend, device="meta")
    x = torch.empty(2, 16, 8, 8, device="meta").contiguous(memory_format=memory_format).requires_grad_()
    y = layer(x, add=torch.empty(2, 16, device="meta"))
    assert y.shape == x.shape and y.is_contiguous(memory_format=memory_format)
    y.sum().backward()
    assert x.grad.shape == x.shape
