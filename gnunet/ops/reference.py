"""GroupNorm + SiLU as a plain formula in differentiable torch operations."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import NormArgs


def group_norm_silu(args: NormArgs) -> Tensor:
    """The definition against which every other backend is tested.

    Computes in float64 where x is float64 and in float32 otherwise, also under autocast; differentiable any number of
    times. Returns x's shape, dtype and memory format.
    """
    x, weight, bias, add, scale, shift, num_groups, eps, silu, center = args
    # Not args.dtype: PyTorch 2.9's torch.compile does not evaluate a NamedTuple's properties.
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with without_autocast(x.device):
        u = x.to(dtype)
        if add is not None:
            u = u + append_dims(add, u)
        # Splitting the channels is a view in every memory format, so no layout is copied.
        grouped = u.unflatten(1, (num_groups, x.shape[1] // num_groups))
        reduced = tuple(range(2, grouped.dim()))
        if center:
            grouped = grouped - grouped.mean(reduced, keepdim=True)
        mean_square = grouped.square().mean(reduced, keepdim=True)
        w = (grouped * torch.rsqrt(mean_square + eps)).flatten(1, 2)
        if weight is not None:
            w = w * append_dims(weight, w)
        if bias is not None:
            w = w + append_dims(bias, w)
        if scale is not None:
            w = w * (1 + append_dims(scale, w))
        if shift is not None:
            w = w + append_dims(shift, w)
        return (F.silu(w) if silu else w).to(x.dtype)


def append_dims(table: Tensor, u: Tensor) -> Tensor:
    """(C,) or (N, C), also with N or C of 1, in u's dtype and to be broadcast over u, (N, C, *spatial)."""
    return table.to(u.dtype).reshape(*table.shape, *(1,) * (u.dim() - 2))


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast turned off for a device; the meta device has none."""
    # torch.compile cannot trace torch.amp.is_autocast_available in PyTorch 2.9.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
