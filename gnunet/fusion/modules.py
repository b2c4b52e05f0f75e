"""The modules that replace GroupNorm and SiLU in a fused model."""

from __future__ import annotations

from torch import Tensor, nn

from gnunet.ops import group_norm_silu


class FusedGroupNorm(nn.GroupNorm):
    """A GroupNorm and the SiLU after it as one operation; a fused GroupNorm gets this class."""

    def forward(
        self,
        input: Tensor,
        add: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """The arguments of gnunet.ops.group_norm_silu."""
        groups, eps = self.num_groups, self.eps
        return group_norm_silu(input, groups, self.weight, self.bias, eps, add=add, scale=scale, shift=shift)


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
        """Identity for images, (N, C, H, W), and videos, (N, C, frames, H, W); SiLU for time embeddings."""
        return x if x.dim() > 3 else self.original(x)
