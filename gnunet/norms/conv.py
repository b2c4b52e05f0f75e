"""Convolutions whose weight is computed from their parameters in every forward pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnunet.ops.reference import without_autocast

CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}
_FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ReparametrizedConv(nn.Module):
    """A convolution by `effective_weight`. Its parameters are those of a convolution, initialized as torch does.

    The effective weight is computed in float32 (float64 if the parameters are), also under autocast, and has the
    dtype of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        ndim: int = 2,
    ) -> None:
        super().__init__()
        conv = CONVOLUTIONS[ndim](in_channels, out_channels, kernel_size, bias=bias)
        self.weight, self.bias = conv.weight, conv.bias
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, conv.kernel_size
        self.stride, self.padding = (stride,) * ndim, (padding,) * ndim

    def effective_weight(self, weight: Tensor) -> Tensor:
        """weight: (out_channels, in_channels, *kernel), float32 or float64 -> the weight to convolve with."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device):
            dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
            weight = self.effective_weight(self.weight.to(dtype)).to(self.weight.dtype)
        convolve = _FUNCTIONS[len(self.kernel_size)]
        return convolve(x, weight, self.bias, self.stride, self.padding)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, bias={self.bias is not None}"
        )


def per_filter(values: Tensor, weight: Tensor) -> Tensor:
    """(out_channels,), in weight's dtype and to be broadcast over weight, (out_channels, in_channels, *kernel)."""
    return values.to(weight.dtype).reshape(-1, *(1,) * (weight.dim() - 1))


def filter_dims(weight: Tensor) -> tuple[int, ...]:
    """The dimensions of one filter in weight, (out_channels, in_channels, *kernel)."""
    return tuple(range(1, weight.dim()))
