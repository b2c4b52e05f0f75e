"""From a forward and a backward function to an operator that autograd, torch.compile and autocast know.

Both functions become custom operators of torch.library: opaque to the compiler, hence no graph break, and
without an autocast rule, hence run in x's dtype. Outside of the compiler the same derivatives are reached
through torch.autograd.Function, because a custom operator costs some 0.2 ms a call in Python, ten times as
much. The gradient of the backward is that of the reference formula.
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
        /,
    ) -> Tensor: ...


def register(
    name: str,
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    backward: Callable[..., list[Tensor]],
) -> Implementation:
    """Make gnunet::NAME and gnunet::NAME_backward and return the differentiable function of the former.

    forward(x, num_groups, weight, bias, eps, add, scale, shift, silu) -> y, mean, rstd; y has the strides
    of empty_like(x), mean and rstd are (N, G) in fp32 (float64 where x is float64).
    backward(dy, x, mean, rstd, num_groups, weight, bias, eps, add, scale, shift, silu, needs) -> the
    gradients of those of x, weight, bias, add, scale, shift which are given and for which `needs` is true,
    in that order; that of x as y, the others contiguous.
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        return forward(x, num_groups, weight, bias, eps, add, scale, shift, silu)

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
        needs: Sequence[bool],
    ) -> list[Tensor]:
        return backward(dy, x, mean, rstd, num_groups, weight, bias, eps, add, scale, shift, silu, needs)

    def forward_fake(x: Tensor, num_groups: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        mean = x.new_empty((x.shape[0], num_groups), dtype=dtype)
        return torch.empty_like(x), mean, torch.empty_like(mean)

    def backward_fake(*args: Any) -> list[Tensor]:
        _, x, _, _, _, weight, bias, _, add, scale, shift, _, needs = args
        found = [
            None if t is None or not need else t
            for t, need in zip((x, weight, bias, add, scale, shift), needs, strict=True)
        ]
        return [torch.empty_like(t) if t is x else t.new_empty(t.shape) for t in found if t is not None]

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, ctx.num_groups, weight, bias, ctx.eps, add, scale, shift, ctx.silu = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, mean, rstd, weight, bias, add, scale, shift)

    def differentiate(ctx: Any, run: Callable[..., Sequence[Tensor]], dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias, add, scale, shift = ctx.saved_tensors
        need_x, _, need_weight, need_bias, _, need_add, need_scale, need_shift, _ = ctx.needs_input_grad
        needs = [need_x, need_weight, need_bias, need_add, need_scale, need_shift]
        found = iter(
            run(dy, x, mean, rstd, ctx.num_groups, weight, bias, ctx.eps, add, scale, shift, ctx.silu, needs)
        )
        dx, dweight, dbias, dadd, dscale, dshift = (next(found) if need else None for need in needs)
        return dx, None, dweight, dbias, None, dadd, dscale, dshift, None

    def save_again(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
        dy, x, _, _, ctx.num_groups, weight, bias, ctx.eps, add, scale, shift, ctx.silu, ctx.needs = inputs
        ctx.save_for_backward(dy, x, weight, bias, add, scale, shift)

    def differentiate_again(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            dy, x, *parameters = map(_leaf_or_view, ctx.saved_tensors)
            weight, bias, add, scale, shift = parameters
            y = reference.group_norm_silu(x, ctx.num_groups, weight, bias, ctx.eps, add, scale, shift, ctx.silu)
            inputs = (x, *parameters)
            wanted = [t for t, need in zip(inputs, ctx.needs, strict=True) if need]
            first = torch.autograd.grad(y, wanted, dy, create_graph=True)
        pairs = [(g, gg) for g, gg in zip(first, grads, strict=True) if gg is not None and g.requires_grad]
        given = [t for t in (dy, *inputs) if t is not None]
        second = torch.autograd.grad(
            [g for g, _ in pairs], given, [gg for _, gg in pairs], create_graph=create_graph, allow_unused=True
        )
        found = iter(second)
        ddy, dx, dweight, dbias, dadd, dscale, dshift = (
            None if t is None else next(found) for t in (dy, *inputs)
        )
        return ddy, dx, None, None, None, dweight, dbias, None, dadd, dscale, dshift, None, None

    forward_library_op = torch.library.custom_op(f"gnunet::{name}", forward_op, mutates_args=())
    backward_library_op = torch.library.custom_op(f"gnunet::{name}_backward", backward_op, mutates_args=())
    forward_library_op.register_fake(forward_fake)
    backward_library_op.register_fake(backward_fake)
    forward_library_op.register_autograd(
        lambda ctx, dy, *_: differentiate(ctx, backward_library_op, dy),
        setup_context=lambda ctx, inputs, output: save(ctx, inputs, output),
    )
    backward_library_op.register_autograd(
        differentiate_again, setup_context=lambda ctx, inputs, output: save_again(ctx, inputs, output)
    )

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
            output = forward(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
            # Grad mode is on where a graph of the gradients is asked for.
            return differentiate(ctx, Backward.apply if torch.is_grad_enabled() else backward, dy)

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
            grads = backward(*inputs)
            save_again(ctx, inputs, grads)
            return tuple(grads)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return differentiate_again(ctx, grads)

    def group_norm_silu(*inputs: Any) -> Tensor:
        operator = forward_library_op if torch.compiler.is_compiling() else Forward.apply
        y: Tensor = operator(*inputs)[0]
        return y

    return group_norm_silu


def _leaf_or_view(t: Any) -> Any:
    """t as an input of a new graph: joined to the graph that t is part of, if it is part of one."""
    if t is None:
        return None
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
