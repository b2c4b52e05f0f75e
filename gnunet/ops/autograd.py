"""A backend's forward and backward as a differentiable function for eager mode, torch.compile and autocast.

In eager mode it is a torch.autograd.Function, and only where something requires a gradient. The compiler gets two
operators of torch.library with the same derivatives: they cause no graph break, and have no autocast rule, so that they
run in x's dtype.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from hashlib import sha256
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any, Protocol, get_type_hints

import torch
from torch import Tensor

from . import reference
from .arguments import TENSORS, NormArgs

_SOURCES = sorted(path for path in Path(__file__).parent.rglob("*.*") if path.suffix in (".py", ".cu"))
_REVISION = sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()[:16]
"""A hash of the sources. It is an argument of the operators, because torch.compile caches compiled code on disk by the
operators' arguments alone, even if their source has changed."""


class Operator(Protocol):
    """A backend's computation."""

    def forward(self, args: NormArgs) -> tuple[Tensor, Tensor]:
        """y, with the strides of empty_like(x), and the groups' statistics that backward needs: mean and rstd of x +
        add, or rstd alone without center, (2 or 1, N, G), in fp32 (float64 where x is float64)."""

    def backward(self, dy: Tensor, stats: Tensor, args: NormArgs, needs: Sequence[bool]) -> list[Tensor]:
        """The gradients of those `args.tensors` for which `needs` is true, in that order: dx with the strides of
        empty_like(x), the others contiguous."""


def apply(operator: Operator, args: NormArgs) -> Tensor:
    """y, differentiable any number of times."""
    if torch.is_grad_enabled():
        tensors = args.tensors
        for t in tensors:
            if t is not None and t.requires_grad:
                y: Tensor = _apply_forward(operator, args, *tensors)
                return y
    return operator.forward(args)[0]


class _Forward(torch.autograd.Function):
    """The inputs are an operator, its arguments, and their tensors once more, for autograd to see."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, args: NormArgs, *tensors: Tensor | None) -> Tensor:
        y, stats = operator.forward(args)
        ctx.operator = operator
        _save_for_backward(ctx, args, stats)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(dy):
            return (None, None, *_by_formula(ctx, dy))
        stats, *tensors = ctx.saved_tensors
        args, needs = NormArgs(*tensors, *ctx.options), ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # create_graph
            found = _Backward.apply(ctx.operator, needs, stats, args, dy, *tensors)
        else:
            found = ctx.operator.backward(dy, stats, args, needs)
        return (None, None, *_spread(needs, found))


_apply_forward: Any = super(torch.autograd.Function, _Forward).apply
"""_Forward.apply without the support for torch.func, which takes as long as the rest and is not needed here."""


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        operator: Operator,
        needs: Sequence[bool],
        stats: Tensor,
        args: NormArgs,
        dy: Tensor,
        *_: Tensor | None,
    ) -> tuple[Tensor, ...]:
        _save_for_double_backward(ctx, dy, args, needs)
        return tuple(operator.backward(dy, stats, args, needs))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, None, None, None, *_double_backward(ctx, grads))


def library_operator(name: str, operator: Operator, *, traceable: bool) -> Callable[[NormArgs], Tensor]:
    """Make gnunet::NAME and gnunet::NAME_backward and return the differentiable function of the former.

    traceable: the backend consists of torch operations and of kernels launched by torch.library.wrap_triton, which the
    compiler traces; otherwise the operators are opaque to it.
    """

    def forward_op(*inputs: Any) -> tuple[Tensor, Tensor]:
        return operator.forward(NormArgs._make(inputs[:-1]))

    def backward_op(dy: Tensor, stats: Tensor, needs: Sequence[bool], *inputs: Any) -> list[Tensor]:
        return operator.backward(dy, stats, NormArgs._make(inputs[:-1]), needs)

    register: Any = torch.library.triton_op if traceable else torch.library.custom_op
    log, nothing = logging.getLogger("torch._library.triton"), logging.Filter("gnunet")
    log.addFilter(nothing)  # it warns where there is no Triton, which is no fault here
    _sign(forward_op, {}, tuple[Tensor, Tensor])
    _sign(backward_op, {"dy": Tensor, "stats": Tensor, "needs": Sequence[bool]}, list[Tensor])
    forward = register(f"gnunet::{name}", forward_op, mutates_args=())
    backward = register(f"gnunet::{name}_backward", backward_op, mutates_args=())
    log.removeFilter(nothing)
    if not traceable:
        forward.register_fake(_forward_fake)
        backward.register_fake(_backward_fake)

    def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        _save_for_backward(ctx, NormArgs._make(inputs[:-1]), output[1])

    def gradients(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        stats, *tensors = ctx.saved_tensors
        needs = NormArgs._make(ctx.needs_input_grad[:-1]).tensors
        return _to_inputs(_spread(needs, backward(dy, stats, needs, *NormArgs(*tensors, *ctx.options), _REVISION)))

    def save_inputs_of_backward(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
        dy, _, needs, *args, _ = inputs
        _save_for_double_backward(ctx, dy, NormArgs._make(args), needs)

    def double_backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        ddy, *found = _double_backward(ctx, grads)
        return (ddy, None, None, *_to_inputs(found))

    forward.register_autograd(gradients, setup_context=save_inputs)
    backward.register_autograd(double_backward, setup_context=save_inputs_of_backward)

    def call(args: NormArgs) -> Tensor:
        y: Tensor = forward(*args, _REVISION)[0]
        return y

    return call


def _sign(function: Any, first: dict[str, Any], returned: Any) -> None:
    """Give a function of *inputs the signature from which torch.library infers a schema: first, NormArgs, revision."""
    hints = {**first, **get_type_hints(NormArgs), "revision": str}
    parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, annotation=hint) for name, hint in hints.items()]
    function.__signature__ = Signature(parameters, return_annotation=returned)


def _forward_fake(*inputs: Any) -> tuple[Tensor, Tensor]:
    args = NormArgs._make(inputs[:-1])
    shape = (2 if args.center else 1, args.x.shape[0], args.num_groups)
    return torch.empty_like(args.x), args.x.new_empty(shape, dtype=args.dtype)


def _backward_fake(dy: Tensor, stats: Tensor, needs: Sequence[bool], *inputs: Any) -> list[Tensor]:
    args = NormArgs._make(inputs[:-1])
    needed = [t for t, need in zip(args.tensors, needs, strict=True) if need and t is not None]
    return [torch.empty_like(t) if t is args.x else t.new_empty(t.shape) for t in needed]


def _save_for_backward(ctx: Any, args: NormArgs, stats: Tensor) -> None:
    ctx.options = args.options
    ctx.save_for_backward(stats, *args.tensors)


def _spread(needs: Sequence[bool], found: Sequence[Tensor | None]) -> list[Tensor | None]:
    """None for each tensor that needs no gradient, between the gradients of those that do."""
    grads = iter(found)
    return [next(grads) if need else None for need in needs]


def _to_inputs(grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients of an operator's inputs, from those of NormArgs.tensors."""
    return (*grads, *[None] * (len(NormArgs._fields) - len(TENSORS)), None)


def _by_formula(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    """The gradients of the saved tensors by the formula, which torch.func can transform."""
    _, *tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad[2:]
    with torch.enable_grad():
        args = NormArgs(*map(_as_grad_leaf, tensors), *ctx.options)
        return _spread(needs, _formula_gradients(args, needs, dy))


def _save_for_double_backward(ctx: Any, dy: Tensor, args: NormArgs, needs: Sequence[bool]) -> None:
    ctx.options, ctx.needs = args.options, needs
    ctx.save_for_backward(dy, *args.tensors)


def _double_backward(ctx: Any, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of dy and of NormArgs.tensors by the formula, which computes the statistics from x."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        dy, *tensors = map(_as_grad_leaf, ctx.saved_tensors)
        args = NormArgs(*tensors, *ctx.options)
        first = _formula_gradients(args, ctx.needs, dy, create_graph=True)
    # A gradient that is constant, as that of bias and shift without activation, has no gradient.
    pairs = [(g, gg) for g, gg in zip(first, grads, strict=True) if gg is not None and g.requires_grad]
    given = [dy, *(t for t in args.tensors if t is not None)]
    outputs, grad_outputs = [g for g, _ in pairs], [gg for _, gg in pairs]
    found = torch.autograd.grad(outputs, given, grad_outputs, create_graph=create_graph, allow_unused=True)
    return [found[0], *_spread([t is not None for t in args.tensors], found[1:])]


def _formula_gradients(
    args: NormArgs, needs: Sequence[bool], dy: Tensor, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """The gradients of the tensors that need one."""
    wanted = [t for t, need in zip(args.tensors, needs, strict=True) if need and t is not None]
    return torch.autograd.grad(reference.group_norm_silu(args), wanted, dy, create_graph=create_graph)


def _as_grad_leaf(t: Any) -> Any:
    """A new leaf, or a view that stays part of t's graph."""
    if t is None:
        return None
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
