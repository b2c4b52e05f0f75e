"""The modules that replace GroupNorm and SiLU in a fused model."""

from __future__ import annotations

from torch import Tensor, nn

from gnunet.ops import group_norm_silu


class FusedGroupNorm(nn.GroupNorm):
    """A GroupNorm and the SiLU after it as one operation; a fused GroupNorm gets this class."""

    def forward(self, input: Tensor, **conditioning: Tensor) -> Tensor:
        """conditioning: add, scale and shift of gnunet.ops.group_norm_silu."""
        return group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps, **conditioning)


class FusedAwaySiLU(nn.Module):
    """Replaces a SiLU that the norm before it now applies; `original` is that SiLU."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.training = original.training

    def forward(self, x: Tensor) -> Tensor:
        return x


class SiLUOfTimeEmbedding(FusedAwaySiLU):
    """The same in a block whose SiLU also activates the time embedding, (N, C), or (N, frames, C) in videos."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.dim() > 3 else self.original(x)  # images, (N, C, H, W), and videos, (N, C, frames, H, W)
