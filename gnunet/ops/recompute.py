"""Layers whose input is recomputed in the backward pass instead of being kept.

A convolution keeps its input for the gradient of its weight. Often that is cheap to compute from tensors that are kept
anyway, such as the input of a normalization. torch.utils.checkpoint would also run layers again, or keep their outputs
(assets/LOG.md); here nothing but the input is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .group_norm_silu import is_transformed
from .hooks import runs_forward_of
from .module import GroupNormSiLU

InputFn: TypeAlias = Callable[..., Sequence[Tensor]]
_CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


def checkpoint_inputs(
    input_fn: InputFn,
    saved: Sequence[Tensor | None],
    layers: Sequence[nn.Module],
    *,
    norm: nn.Module | None = None,
    dropout: float = 0.0,
    enabled: bool = True,
) -> list[Tensor]:
    """Each layer's output on its part of input_fn(norm, *saved), keeping `saved` for backward instead of the parts.

        (y,) = checkpoint_inputs(lambda norm, x, t: (norm(x, add=t),), (x, t), (conv,), norm=norm)

    is conv(norm(x, add=t)). Outputs and gradients are bit-identical to those of the plain calls, which it makes where
    no gradients are needed, a layer is not exactly one of torch's convolutions or nn.Linear, the norm is not a
    GroupNormSiLU, or one of them has hooks. It works under autocast, with DDP and FSDP2, inside torch.utils.checkpoint
    and in torch.compile, and has derivatives of any order.

    Args:
        input_fn: from the norm and the saved tensors to one batched input for each layer. A cheap function of nothing
            else, without randomness or side effects: it runs again in the backward pass.
        dropout: probability in [0, 1) that an element of an input is set to zero. Its mask is kept, one byte
            an element.
        enabled: False makes the plain calls.
    """
    is_useful = enabled and torch.is_grad_enabled() and not is_transformed()
    if is_useful and (norm is None or runs_forward_of(norm, GroupNormSiLU)):
        if torch.compiler.is_compiling():
            return _call(layers, checkpoint(input_fn, norm, *saved, use_reentrant=False), dropout)
        if all(map(_is_plain, layers)) and any(layer.weight.requires_grad for layer in layers):
            call = _Call(input_fn, norm, tuple(layers), dropout, len(saved))
            return list(_RecomputeInputFunction.apply(call, *saved, *call.parameters()))
    return _call(layers, input_fn(norm, *saved), dropout)


def _call(layers: Sequence[nn.Module], inputs: Sequence[Tensor], dropout: float) -> list[Tensor]:
    return [layer(F.dropout(x, dropout)) if dropout else layer(x) for layer, x in zip(layers, inputs, strict=True)]


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling the layer is just the operation that its type stands for."""
    if type(layer) in _CONVOLUTIONS and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        return False
    return type(layer) in (nn.Linear, *_CONVOLUTIONS) and runs_forward_of(layer, type(layer))


@dataclass(frozen=True)
class _Call:
    """The arguments of checkpoint_inputs without the tensors."""

    input_fn: InputFn
    norm: Any
    layers: tuple[Any, ...]
    dropout: float
    num_saved: int

    def parameters(self) -> list[Tensor | None]:
        """Weight and bias of the norm, if there is one, and of each layer."""
        modules = self.layers if self.norm is None else (self.norm, *self.layers)
        return [parameter for module in modules for parameter in (module.weight, module.bias)]

    def split(self, values: Sequence[Any]) -> tuple[Sequence[Any], list[Sequence[Any]], Sequence[Any]]:
        """Values for the saved tensors and the norm's parameters; pairs of them for each layer's; what follows."""
        start = self.num_saved + (0 if self.norm is None else 2)
        end = start + 2 * len(self.layers)
        return values[:start], [values[i : i + 2] for i in range(start, end, 2)], values[end:]

    def inputs(self, given: Sequence[Tensor | None]) -> Sequence[Tensor]:
        """The layers' inputs, from the saved tensors and the norm's parameters."""
        if self.norm is None:
            return self.input_fn(None, *given)
        *saved, weight, bias = given
        norm: Any = SimpleNamespace(**{**vars(self.norm), "weight": weight, "bias": bias})
        return self.input_fn(partial(GroupNormSiLU.forward, norm), *saved)


class _RecomputeInputFunction(torch.autograd.Function):
    """From (call, *saved, *call.parameters()) to the layers' outputs."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        given, parameters, _ = call.split(tensors)
        ctx.call, ctx.device_type = call, next(t.device.type for t in tensors if t is not None)
        ctx.autocast_dtype = _autocast_dtype(ctx.device_type)
        with _autocast(ctx.device_type, ctx.autocast_dtype):
            inputs, masks = call.inputs(given), ()
            if call.dropout:
                inputs, masks = zip(*(torch.native_dropout(x, call.dropout, True) for x in inputs), strict=True)
            outputs = [_run(layer, x, *pair) for layer, x, pair in zip(call.layers, inputs, parameters, strict=True)]
        ctx.save_for_backward(*tensors, *masks)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        call, create_graph = ctx.call, torch.is_grad_enabled()
        # Read once, because torch.utils.checkpoint recomputes saved tensors at each access.
        given, parameters, masks = call.split(ctx.saved_tensors)
        needs, layer_needs, _ = call.split(ctx.needs_input_grad[1:])
        with torch.enable_grad(), _autocast(ctx.device_type, ctx.autocast_dtype):
            given = [_as_grad_leaf(t, need, create_graph) for t, need in zip(given, needs, strict=True)]
            inputs = call.inputs(given)

        cast = partial(_cast, dtype=ctx.autocast_dtype)
        drop = partial(_drop, dropout=call.dropout)
        roots, root_grads = [], []
        layer_grads: list[Tensor | None] = []
        for i, (layer, dy, x) in enumerate(zip(call.layers, dys, inputs, strict=True)):
            if dy is None:
                layer_grads += [None, None]
                continue
            fed, weight = cast(drop(x, masks[i]) if masks else x), cast(parameters[i][0])
            dx, dweight, dbias = _gradients(layer, dy, fed, weight, (x.requires_grad, *layer_needs[i]))
            layer_grads += [dweight, dbias]
            if dx is not None:
                dx = dx.to(x.dtype)
                roots.append(x)
                root_grads.append(drop(dx, masks[i]) if masks else dx)

        wanted = [t for t, need in zip(given, needs, strict=True) if need]
        # Last layer first, as autograd adds up the gradients of an input that layers share.
        grads = partial(torch.autograd.grad, create_graph=create_graph, allow_unused=True)
        found = iter(grads(roots[::-1], wanted, root_grads[::-1]) if roots else ())
        return None, *(next(found, None) if need else None for need in needs), *layer_grads


def _as_grad_leaf(t: Tensor | None, need: bool, create_graph: bool) -> Tensor | None:
    """t as an input to differentiate with respect to, if needed; part of its graph if create_graph."""
    if t is None:
        return None
    if create_graph:
        return t.view_as(t) if need else t
    return t.detach().requires_grad_(need)


def _drop(x: Tensor, mask: Tensor, dropout: float) -> Tensor:
    """What F.dropout gives for this mask, of x or of a gradient, rounding as it does in half precision."""
    if x.device.type == "cpu":
        return x * mask.to(x.dtype).div_(1 - dropout)
    return torch.ops.aten.native_dropout_backward.default(x, mask, 1 / (1 - dropout))


def _run(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What layer(x) computes with these parameters."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return _CONVOLUTIONS[type(layer)](x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def _gradients(
    layer: Any, dy: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias that are needed."""
    if isinstance(layer, nn.Linear):
        rows = dy.flatten(0, -2)
        dx = (rows @ weight).view(x.shape) if needs[0] else None
        return dx, rows.T @ x.flatten(0, -2) if needs[1] else None, rows.sum(0) if needs[2] else None
    geometry = layer.stride, layer.padding, layer.dilation, False, layer.output_padding, layer.groups
    return torch.ops.aten.convolution_backward.default(dy, x, weight, [len(weight)], *geometry, needs)


def _cast(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    """t as autocast casts it before these layers; float64 is left alone."""
    return t if dtype is None or t.dtype == torch.float64 else t.to(dtype)


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast now casts to for these layers; None where it is off."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # the meta device has none
        return None
    return torch.get_autocast_dtype(device_type)


def _autocast(device_type: str, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Autocast as it was when `_autocast_dtype` returned this dtype, but without its cache of parameters' copies."""
    # The cache would keep copies made here, without a gradient, for calls that need one.
    if dtype is None and _autocast_dtype(device_type) is None:
        return nullcontext()
    return torch.autocast(device_type, dtype, enabled=dtype is not None, cache_enabled=False)
