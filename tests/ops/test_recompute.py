"""Layers whose input is recomputed in the backward pass: bits, what is kept, and PyTorch's systems around them."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from gnunet.environment import activation_bytes
from gnunet.ops import GroupNormSiLU, checkpoint_inputs


def normed(norm, x, add=None, scale=None, shift=None):
    return (norm(x, add=add, scale=scale, shift=shift),)


def joined(norm, x, skip):
    x = torch.cat([x, skip], dim=1)
    return norm(x), x


def enlarged(norm, x):
    return (F.interpolate(x, scale_factor=2.0, mode="nearest"),)


def pooled(norm, x):
    return (F.avg_pool2d(norm(x), 2),)


def padded(norm, x):
    return (F.pad(x, (0, 1, 0, 1)),)


def tokens(norm, x):
    rows = norm(x).flatten(2).transpose(1, 2)
    return rows, rows, rows


def squared(norm, x):
    return (x @ x.detach(),)  # which autocast casts


@dataclass
class Call:
    """A call of checkpoint_inputs on random tensors; `spatial` is x's."""

    input_fn: object
    layers: list
    tables: tuple = ()
    channels: tuple = (16,)
    spatial: tuple = (8, 8)
    norm: bool = True
    dropout: float = 0.0
    center: bool = True
    backend: str = "auto"
    saved: list = field(default_factory=list)

    def prepare(self, dtype=torch.float32, layout="channels_last"):
        """A copy with saved tensors, and modules of other values than the initial ones."""
        torch.manual_seed(0)
        call = copy.deepcopy(self)
        shapes = [(3, c, *self.spatial) for c in self.channels] + [(3, 16) if given else None for given in self.tables]
        call.saved = [None if shape is None else torch.randn(shape, dtype=dtype) for shape in shapes]
        if layout == "channels_last":
            call.saved = [
                s if s is None or s.dim() < 3 else s.movedim(1, -1).contiguous().movedim(-1, 1) for s in call.saved
            ]
        for source in call.saved:
            if source is not None:
                source.requires_grad_()
        options = {"center": self.center, "backend": self.backend, "dtype": dtype}
        call.norm = GroupNormSiLU(4, 16, **options) if self.norm else None
        for module in (call.norm, *call.layers):
            if module is not None:
                module.to(dtype)
                for parameter in module.parameters():
                    nn.init.normal_(parameter, 0.5, 0.5)
        if layout == "channels_last":
            for layer in call.layers:
                if isinstance(layer, nn.Conv2d):
                    layer.to(memory_format=torch.channels_last)
        return call

    def run(self, enabled=True):
        return checkpoint_inputs(
            self.input_fn, self.saved, self.layers, norm=self.norm, dropout=self.dropout, enabled=enabled
        )

    def leaves(self):
        modules = self.layers if self.norm is None else [self.norm, *self.layers]
        return [*(s for s in self.saved if s is not None), *(p for m in modules for p in m.parameters())]

    def run_with_gradients(self, enabled=True, amp=None):
        torch.manual_seed(1)
        with torch.autocast("cpu", amp, enabled=amp is not None):
            outputs = self.run(enabled)
        torch.manual_seed(2)
        dys = [torch.randn_like(y) for y in outputs]
        leaves = [leaf for leaf in self.leaves() if leaf.requires_grad]
        return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, dys)]


CALLS = {
    "normed": Call(normed, [nn.Conv2d(16, 24, 3, padding=1)]),
    "uncentred": Call(normed, [nn.Conv2d(16, 24, 3, padding=1)], (True,), center=False),
    "reference": Call(normed, [nn.Conv2d(16, 24, 3, padding=1)], backend="reference"),
    "added": Call(normed, [nn.Conv2d(16, 24, 3, padding=1)], (True,)),
    "scaled": Call(normed, [nn.Conv2d(16, 24, 3, padding=1)], (False, True, True)),
    "dropped": Call(normed, [nn.Conv2d(16, 24, 3, padding=1)], (True,), dropout=0.3),
    "joined": Call(joined, [nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(16, 24, 1)], channels=(10, 6)),
    "pooled": Call(pooled, [nn.Conv2d(16, 24, 3, padding=1, bias=False)]),
    "enlarged": Call(enlarged, [nn.Conv2d(16, 16, 3, padding=1)], norm=False),
    "padded": Call(padded, [nn.Conv2d(16, 16, 3, stride=2)], norm=False),
    "squared": Call(squared, [nn.Conv2d(16, 16, 1)], norm=False),
    "grouped": Call(normed, [nn.Conv2d(16, 24, 3, padding=2, dilation=2, groups=4)]),
    "tokens": Call(tokens, [nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(16, 24, bias=False)]),
    "1d": Call(normed, [nn.Conv1d(16, 24, 3, padding=1)], spatial=(20,)),
    "3d": Call(normed, [nn.Conv3d(16, 8, 3, padding=1)], spatial=(4, 3, 5)),
}


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


def is_recomputed(output):
    return type(output.grad_fn).__name__ == "_RecomputeInputFunctionBackward"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
def test_bits_are_those_of_the_plain_calls(call, amp, layout):
    call = call.prepare(layout=layout)
    assert all(map(is_recomputed, call.run()))
    for found, expected in zip(call.run_with_gradients(amp=amp), call.run_with_gradients(False, amp), strict=True):
        assert found.dtype == expected.dtype and found.stride() == expected.stride()
        assert torch.equal(found, expected)


def test_keeps_what_is_saved_and_nothing_else(call):
    call = call.prepare()
    assert activation_bytes(call.run, call.leaves()) == (call.saved[0].numel() if call.dropout else 0)  # masks


def test_autocast_copies_of_weights_are_not_kept_or_handed_on(call):
    call = call.prepare()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = []
        size = activation_bytes(lambda: outputs.extend(call.run()), call.leaves())
        again, *_ = call.run(enabled=False)
    assert size == (call.saved[0].numel() if call.dropout else 0)
    weight = call.layers[0].weight
    for output in (outputs[0], again):
        assert torch.autograd.grad(output.sum(), weight)[0].abs().sum() > 0


@pytest.mark.parametrize("frozen", ["saved", "norm", "bias", "saved and norm", "weight"])
def test_frozen_parts_get_no_gradient(frozen):
    call = CALLS["added"].prepare()
    tensors = {"saved": call.saved, "norm": call.norm.parameters(), "bias": [call.layers[0].bias]}
    for name in frozen.split(" and "):
        for t in tensors.get(name, [call.layers[0].weight]):
            t.requires_grad_(False)
    # A convolution with a frozen weight does not keep its input.
    assert is_recomputed(call.run()[0]) == (frozen != "weight")
    found, expected = call.run_with_gradients(), call.run_with_gradients(enabled=False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_output_that_is_not_used():
    call = CALLS["joined"].prepare()
    for i in (0, 1):
        grads = [
            torch.autograd.grad(call.run(enabled)[i].square().sum(), call.leaves(), allow_unused=True)
            for enabled in (True, False)
        ]
        for found, expected in zip(*grads, strict=True):
            assert (found is None) == (expected is None)
            assert found is None or torch.equal(found, expected)


def test_without_gradients_it_is_the_plain_calls(call):
    call = call.prepare()
    with torch.no_grad():
        assert activation_bytes(call.run) == 0
        assert not any(y.requires_grad for y in call.run())
    for leaf in call.leaves():
        leaf.requires_grad_(False)
    assert not any(y.requires_grad for y in call.run())


class Doubled(nn.Conv2d):
    """As an adapter or a weight normalization would be: more than its type's operation."""

    def forward(self, x):
        return 2 * super().forward(x)


class Shifted(GroupNormSiLU):
    def forward(self, x, **tables):
        return super().forward(x + 1, **tables)


def double_output(module, args, output):
    return 2 * output


CHANGES = {
    "a hook": lambda call: call.layers[0].register_forward_hook(double_output),
    "a hook of the norm": lambda call: call.norm.register_forward_hook(double_output),
    "a replaced forward": lambda call: setattr(call.layers[0], "forward", lambda x: 2 * x),
    "circular padding": lambda call: setattr(call, "layers", [nn.Conv2d(16, 24, 3, 1, 1, padding_mode="circular")]),
    "padding by name": lambda call: setattr(call, "layers", [nn.Conv2d(16, 24, 3, padding="same")]),
    "a subclass": lambda call: setattr(call, "layers", [Doubled(16, 24, 3)]),
    "a subclass of the norm": lambda call: setattr(call, "norm", Shifted(4, 16)),
    "another norm": lambda call: vars(call).update(norm=nn.GroupNorm(4, 16), input_fn=lambda norm, x: (norm(x),)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_unknown_layers_and_norms_are_called_plainly(change):
    call = CALLS["normed"].prepare()
    change(call)
    assert not is_recomputed(call.run()[0])
    (expected,) = call.input_fn(call.norm, *call.saved)
    assert torch.equal(call.run()[0], call.layers[0](expected))


@pytest.mark.parametrize("name", ["added", "scaled", "joined", "tokens", "enlarged"])
def test_second_derivatives(name):
    call = CALLS[name].prepare(torch.float64)
    call.saved = [s if s is None else s[:1, ..., :2].detach().requires_grad_() for s in call.saved]
    call.saved = [s if s is None or s.dim() > 2 else torch.randn(1, 16).double().requires_grad_() for s in call.saved]
    inputs = [s for s in call.saved if s is not None]
    given = [s is not None for s in call.saved]

    def function(*tensors):
        rest = iter(tensors)
        call.saved = [next(rest) if is_given else None for is_given in given]
        return tuple(call.run())

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["added", "scaled", "dropped", "joined", "tokens", "enlarged"])
def test_a_gradient_penalty_is_that_of_the_plain_calls(name):
    """With the gradients of all parameters, through what the saved tensors were computed from."""
    call = CALLS[name].prepare(torch.float64)
    leaves = call.saved

    def penalty(enabled):
        call.saved = [s if s is None else s * s for s in leaves]
        torch.manual_seed(1)
        loss = sum(y.square().sum() for y in call.run(enabled))
        call.saved = leaves
        first = torch.autograd.grad(loss, call.leaves(), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), call.leaves())

    for found, expected in zip(penalty(True), penalty(False), strict=True):
        torch.testing.assert_close(found, expected)


def test_parameters_that_stand_in_for_the_modules_own():
    """torch.func.functional_call: backward uses the ones that forward used."""
    norm, conv = GroupNormSiLU(4, 16), nn.Conv2d(16, 8, 3)
    x = torch.randn(2, 16, 8, 8)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = norm, conv

        def forward(self, x, enabled):
            return checkpoint_inputs(normed, (x,), (self.conv,), norm=self.norm, enabled=enabled)[0]

    others = {name: torch.randn_like(p).requires_grad_() for name, p in Model().named_parameters()}
    grads = []
    for enabled in (True, False):
        y = torch.func.functional_call(Model(), others, (x, enabled))
        grads.append(torch.autograd.grad(y.square().sum(), list(others.values())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_saved_tensor_changed_before_backward_is_an_error():
    call = CALLS["normed"].prepare()
    call.saved = [call.saved[0] * 1]
    (y,) = call.run()
    call.saved[0].detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inside_a_checkpoint(call):
    call = call.prepare()
    grads = []
    for run in (call.run, lambda: checkpoint(call.run, use_reentrant=False)):
        torch.manual_seed(1)
        grads.append(torch.autograd.grad(sum(y.square().sum() for y in run()), call.leaves()))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_compiles_without_a_graph_break(call):
    torch.compiler.reset()
    call = call.prepare()
    call.dropout = 0.0  # whose masks the compiler draws in another order
    expected = call.run_with_gradients()
    plain_size = activation_bytes(lambda: call.run(enabled=False), call.leaves())
    call.run = torch.compile(call.run, fullgraph=True, backend="aot_eager")
    for a, b in zip(call.run_with_gradients(), expected, strict=True):  # compiled, the formula rounds otherwise
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert activation_bytes(call.run, call.leaves()) < plain_size


@pytest.mark.parametrize("name", ["normed", "added", "joined", "tokens", "enlarged"])
def test_forward_mode(name):
    call = CALLS[name].prepare(torch.float64)
    x, *others = call.saved

    def run(x):
        call.saved = [x, *others]
        return sum(y.square().sum() for y in call.run())

    gradient, tangent = torch.autograd.grad(run(x), x)[0], torch.randn_like(x)
    for jvp in (torch.func.jvp, torch.compile(torch.func.jvp, backend="aot_eager")):
        torch.testing.assert_close(jvp(run, (x.detach(),), (tangent,))[1], (gradient * tangent).sum())


@pytest.mark.parametrize("name", ["normed", "dropped", "joined", "tokens"])
def test_meta_device(name):
    call = CALLS[name].prepare()
    for module in (call.norm, *call.layers):
        module.to("meta")
    call.saved = [s if s is None else s.to("meta").detach().requires_grad_() for s in call.saved]
    outputs = call.run()
    grads = torch.autograd.grad(sum(y.sum() for y in outputs), call.leaves())
    assert [g.shape for g in grads] == [leaf.shape for leaf in call.leaves()]
