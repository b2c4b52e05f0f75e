"""Self-attention over the positions of a feature map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnunet.norms import make_residual
from gnunet.ops import checkpoint_inputs

from .norm_sites import NormSite


class Attention(nn.Module):
    """Norm, multi-head self-attention over all positions, residual; parameters named as diffusers' Attention.

    Args:
        channels: of input and output.
        head_dim: of one head; there are channels // head_dim of them.
        site: of the norm in front, which has no activation.
        rescale: what the sum of input and result is divided by.
    """

    # diffusers' loaders look for this flag to rename query, key, value and proj_attn in old files.
    _from_deprecated_attn_block = True

    def __init__(self, channels: int, head_dim: int, site: NormSite, rescale: float = 1.0) -> None:
        super().__init__()
        self.heads, self.rescale = channels // head_dim, rescale
        self.recompute = False  # see UNet2D.enable_recompute
        inner = self.heads * head_dim
        self.group_norm = site.build(None)
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])
        self.residual = make_residual(site.norm)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W), channels_last -> as x."""
        height, width = x.shape[2:]
        projections = (self.to_q, self.to_k, self.to_v)
        q, k, v = (
            tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for tokens in checkpoint_inputs(
                _normed_tokens, (x,), projections, norm=self.group_norm, enabled=self.recompute
            )
        )
        h = _attend(q, k, v).transpose(1, 2).flatten(2)
        h = self.to_out[0](h).transpose(1, 2).unflatten(2, (height, width))
        y = self.residual(x, h)
        return y / self.rescale if self.rescale != 1 else y


_FEW_POSITIONS = 64


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention. Over few positions a CPU computes it in fp32, whose backward is 4 times as fast as
    bfloat16's there and keeps twice the bytes."""
    if q.device.type == "cpu" and q.shape[2] <= _FEW_POSITIONS and q.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v)


def _normed_tokens(norm: nn.Module | None, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The input of query, key and value: (N, H * W, C)."""
    h = x if norm is None else norm(x)
    # In channels_last this is a view.
    tokens = h.flatten(2).transpose(1, 2)
    return tokens, tokens, tokens
