"""From a forward and a backward function to an operator that autograd, torch.compile and autocast know.

Both functions become custom operators of torch.library: opaque to the compiler, hence no graph break, and
without an autocast rule, hence run in x's dtype. Outside of the compiler the same derivatives are reached
through torch.autograd.Function, because a custom operator costs 0.1 ms and more a call in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from . import reference


class Implementation(Protocol):
    """What a backend offers: `gnunet.ops.group_norm_silu` after its checks, all arguments positional."""

    def __call__(
        self,
        x: Tensor,
        num_groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        add: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        silu: bool,
        center: bool,
        /,
    ) -> Tensor: ...


def register(
    name: str,
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    backward: Callable[..., list[Tensor]],
) -> Implementation:
    """Make gnunet::NAME and gnunet::NAME_backward and return the differentiable function of the former.

    forward(x, num_groups, weight, bias, eps, add, scale, shift, silu, center) -> y, mean, rstd; y has the
    strides of empty_like(x), mean and rstd are (N, G) in fp32 (float64 where x is float64), but mean is (0, G)
    without center.
    backward(dy, x, mean, rstd, num_groups, weight, bias, eps, add, scale, shift, silu, center, needs) -> the
    gradients of those of x, weight, bias, add, scale, shift for which `needs` is true, in that order; that
    of x as y, the others contiguous.
    """

    def forward_op(
        x: Tensor,
        num_groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        add: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        silu: bool,
        center: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return forward(x, num_groups, weight, bias, eps, add, scale, shift, silu, center)

    def backward_op(
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        num_groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        add: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        silu: bool,
        center: bool,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        return backward(dy, x, mean, rstd, num_groups, weight, bias, eps, add, scale, shift, silu, center, needs)

    compiled_forward = torch.library.custom_op(f"gnunet::{name}", forward_op, mutates_args=())
    compiled_backward = torch.library.custom_op(f"gnunet::{name}_backward", backward_op, mutates_args=())
    compiled_forward.register_fake(_forward_fake)
    compiled_backward.register_fake(_backward_fake)
    compiled_forward.register_autograd(
        lambda ctx, dy, *_: _gradients(ctx, compiled_backward, dy), setup_context=_save_inputs
    )
    compiled_backward.register_autograd(_second_gradients, setup_context=_save_inputs_of_backward)

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
            output = forward(*inputs)
            _save_inputs(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
            # Grad mode is on where a graph of the gradients is asked for.
            return _gradients(ctx, Backward.apply if torch.is_grad_enabled() else backward, dy)

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
            output = backward(*inputs)
            _save_inputs_of_backward(ctx, inputs, output)
            return tuple(output)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return _second_gradients(ctx, grads)

    def group_norm_silu(*inputs: Any) -> Tensor:
        run = compiled_forward if torch.compiler.is_compiling() else Forward.apply
        y: Tensor = run(*inputs)[0]
        return y

    return group_norm_silu


def _forward_fake(x: Tensor, num_groups: int, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, center = rest
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rstd = x.new_empty((x.shape[0], num_groups), dtype=dtype)
    return torch.empty_like(x), rstd.new_empty((x.shape[0] if center else 0, num_groups)), rstd


def _backward_fake(*inputs: Any) -> list[Tensor]:
    _, x, _, _, _, weight, bias, _, add, scale, shift, _, _, needs = inputs
    tensors = zip((x, weight, bias, add, scale, shift), needs, strict=True)
    return [torch.empty_like(t) if t is x else t.new_empty(t.shape) for t, need in tensors if need]


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, ctx.num_groups, weight, bias, ctx.eps, add, scale, shift, ctx.silu, ctx.center = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, mean, rstd, weight, bias, add, scale, shift)


def _gradients(ctx: Any, backward: Callable[..., Sequence[Tensor]], dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of forward's inputs, by the function, autograd.Function or operator given."""
    x, mean, rstd, weight, bias, add, scale, shift = ctx.saved_tensors
    need_x, _, need_weight, need_bias, _, need_add, need_scale, need_shift, _, _ = ctx.needs_input_grad
    needs = [need_x, need_weight, need_bias, need_add, need_scale, need_shift]
    rest = (ctx.num_groups, weight, bias, ctx.eps, add, scale, shift, ctx.silu, ctx.center, needs)
    found = iter(backward(dy, x, mean, rstd, *rest))
    dx, dweight, dbias, dadd, dscale, dshift = (next(found) if need else None for need in needs)
    return dx, None, dweight, dbias, None, dadd, dscale, dshift, None, None


def _save_inputs_of_backward(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    dy, x, _, _, ctx.num_groups, weight, bias, ctx.eps, add, scale, shift, ctx.silu, ctx.center, ctx.needs = inputs
    ctx.save_for_backward(dy, x, weight, bias, add, scale, shift)


def _second_gradients(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of backward's inputs: those of the reference formula's gradients.

    mean and rstd get none. They were made from x, and the formula follows that path too.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        dy, x, *parameters = map(_input_of_new_graph, ctx.saved_tensors)
        weight, bias, add, scale, shift = parameters
        groups, eps = ctx.num_groups, ctx.eps
        y = reference.group_norm_silu(x, groups, weight, bias, eps, add, scale, shift, ctx.silu, ctx.center)
        wanted = [t for t, need in zip((x, *parameters), ctx.needs, strict=True) if need]
        first = torch.autograd.grad(y, wanted, dy, create_graph=True)
    # A gradient that is constant, as that of bias and shift without activation, has none of its own.
    pairs = [(g, gg) for g, gg in zip(first, grads, strict=True) if gg is not None and g.requires_grad]
    given = [t for t in (dy, x, *parameters) if t is not None]
    outputs, grad_outputs = [g for g, _ in pairs], [gg for _, gg in pairs]
    found = iter(torch.autograd.grad(outputs, given, grad_outputs, create_graph=create_graph, allow_unused=True))
    ddy, dx, dweight, dbias, dadd, dscale, dshift = (None if t is None else next(found) for t in (dy, x, *parameters))
    return ddy, dx, None, None, None, dweight, dbias, None, dadd, dscale, dshift, None, None, None


def _input_of_new_graph(t: Any) -> Any:
    """A leaf, or a view that stays joined to the graph that t is part of."""
    if t is None:
        return None
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
