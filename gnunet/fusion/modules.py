"""What stands in a fused model where GroupNorm and SiLU stood."""

from __future__ import annotations

from torch import Tensor, nn

from gnunet.ops import group_norm_silu


class FusedGroupNorm(nn.GroupNorm):
    """A GroupNorm with the SiLU that follows it, as one operation; what a fused GroupNorm's class becomes."""

    def forward(
        self,
        input: Tensor,
        add: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """See gnunet.ops.group_norm_silu."""
        groups, eps = self.num_groups, self.eps
        return group_norm_silu(input, groups, self.weight, self.bias, eps, add=add, scale=scale, shift=shift)


class FusedAwaySiLU(nn.Module):
    """In the place of a SiLU which the norm before it now applies; `original` is that SiLU."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.training = original.training

    def forward(self, x: Tensor) -> Tensor:
        return x


class SiLUOfTimeEmbedding(FusedAwaySiLU):
    """The same in a block that also activates its time embedding by it: (N, C), or (N, frames, C) in videos."""

    def forward(self, x: Tensor) -> Tensor:
        """An image, (N, C, H, W), or video, (N, C, frames, H, W), as it is; a time embedding activated."""
        return x if x.dim() > 3 else self.original(x)
