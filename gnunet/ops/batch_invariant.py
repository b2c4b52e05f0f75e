"""Sums and SiLU whose bits for one sample do not depend on the rest of the batch.

PyTorch's own operations give no such promise: a CPU kernel splits the whole tensor among threads, and
where a split falls decides in which order a sum is taken, or whether an element is computed by the
vector or by the scalar code (which differ in exp). The functions here fix both. What needs no care are
single additions and multiplications, which round in one way only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAF = 64  # rows added one after the other; few enough for rounding to stay in the last places
_VECTOR = 64  # elements: a multiple of what any CPU kernel takes in one unrolled vector step
_GRAIN = 32768  # at::internal::GRAIN_SIZE: elementwise kernels give a thread no less than this


def sum_rows(rows: Tensor) -> Tensor:
    """(N, S, C), C dense -> (N, C): sums over S in an order that depends on S and C only."""
    batch, size, channels = rows.shape
    if rows.device.type == "cpu":
        # With a sample for every thread, a thread adds up whole samples. With fewer, torch would split the
        # channels; so give every thread a sample, some of them the same.
        copies = 1 if rows.numel() < _GRAIN else -(-torch.get_num_threads() // batch)
        return rows.sum(1) if copies == 1 else rows.expand(copies, *rows.shape).sum(2)[0]
    while size > 1:
        # A pooling window is added up by one thread, row after row. This is (N, C, S, 1), channels_last:
        step = rows.stride(1)
        image = rows.as_strided((batch, channels, size, 1), (rows.stride(0), 1, step, step))
        pooled = F.avg_pool2d(image, (_LEAF, 1), ceil_mode=True, divisor_override=1)
        size = pooled.shape[2]
        rows = pooled.as_strided((batch, size, channels), (size * channels, channels, 1))
    return rows.reshape(batch, channels)


def sum_columns(columns: Tensor) -> Tensor:
    """(N, C, S) -> (N, C): sums over S, each by one thread."""
    if columns.shape[0] * columns.shape[1] == 1:
        # A single sum is the one case that torch splits among threads; two equal sums are not.
        return columns.expand(2, -1, -1).sum(2)[:1]
    return columns.sum(2)


def fma(a: Tensor, b: Tensor, c: Tensor | None, out: Tensor | None = None) -> Tensor:
    """a * b + c, of a's shape, None being 0; in one kernel where that is fast and rounds alike everywhere."""
    if out is None:
        out = torch.empty_like(a)
    if c is None:
        return torch.mul(a, b, out=out)
    if a.device.type == "cpu":
        # Where both b and c are one number for many of a's, the kernel is not vectorized.
        is_vectorized = a.shape[-1] in (b.shape[-1], c.shape[-1])
        if not (is_vectorized and _ADDCMUL_ROUNDS_ALIKE):
            return torch.mul(a, b, out=out).add_(c)
    return torch.addcmul(c, a, b, out=out)


def _addcmul_rounds_alike() -> bool:
    """Whether the vector and the scalar code of the CPU's addcmul both round once, or both twice.

    They are compiled for each kind of processor, and not everywhere by the same rules.
    """
    a, b, c = (torch.linspace(0.1, 1, 64, device="cpu").roll(shift) for shift in (0, 21, 42))
    one_by_one = [torch.addcmul(c[i : i + 1], a[i : i + 1], b[i : i + 1]) for i in range(len(a))]
    return torch.equal(torch.cat(one_by_one), torch.addcmul(c, a, b))


_ADDCMUL_ROUNDS_ALIKE = _addcmul_rounds_alike()


def silu_(w: Tensor) -> Tensor:
    """w, contiguous -> silu(w), in place."""
    _apply_vector_aligned(lambda out: torch.ops.aten.silu.out(out, out=out), w)
    return w


def silu_backward_(dy: Tensor, w: Tensor) -> Tensor:
    """dy and w, contiguous and of one shape and dtype -> dy * silu'(w), written over w."""
    _apply_vector_aligned(lambda out, d: torch.ops.aten.silu_backward.grad_input(d, out, grad_input=out), w, dy)
    return w


def _apply_vector_aligned(op: Callable[..., object], *tensors: Tensor) -> None:
    """Run an elementwise op that writes over tensors[0] so that vector code computes every element."""
    numel = tensors[0].numel()
    whole = numel if tensors[0].device.type != "cpu" else _aligned_prefix(numel, torch.get_num_threads())
    if whole == numel:
        op(*tensors)
        return
    flat = [t.view(-1) for t in tensors]
    if whole:
        op(*(t[:whole] for t in flat))
    padded = [F.pad(t[whole:], (0, -(numel - whole) % _VECTOR)) for t in flat]
    op(*padded)
    flat[0][whole:] = padded[0][: numel - whole]


def _aligned_prefix(numel: int, threads: int) -> int:
    """The largest count <= numel of elements that at::parallel_for deals out in multiples of _VECTOR."""
    count = numel - numel % _VECTOR
    while count and count % (_VECTOR * min(threads, -(-count // _GRAIN))):
        count -= _VECTOR
    return count
