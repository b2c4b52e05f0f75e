"""Self-attention over the positions of a feature map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnunet.norms import make_residual
from gnunet.ops import checkpoint_inputs

from .norm_sites import NormSite

_FEW_POSITIONS = 64


class Attention(nn.Module):
    """Norm, multi-head self-attention over all positions, residual; parameters are named as diffusers' Attention.

    There are channels // head_dim heads. The residual sum is divided by output_scale_factor.
    """

    # diffusers' loaders look for this flag to rename query, key, value and proj_attn in old files.
    _from_deprecated_attn_block = True

    def __init__(
        self,
        channels: int,
        head_dim: int,
        site: NormSite,
        *,
        has_norm: bool = True,
        output_scale_factor: float = 1.0,
    ) -> None:
        super().__init__()
        if not 1 <= head_dim <= channels:
            raise ValueError(f"attention_head_dim must be 1 to {channels} in {site.path}; got {head_dim}")
        self.heads, self.output_scale_factor = channels // head_dim, output_scale_factor
        self.recompute = False  # see UNet2D.enable_recompute
        inner = self.heads * head_dim
        self.group_norm = site.make_norm("group_norm", channels, activation=None) if has_norm else None
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])
        self.residual = make_residual(site.norm)

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.to_q, self.to_k, self.to_v)
        tokens = checkpoint_inputs(_normed_tokens, (x,), projections, norm=self.group_norm, enabled=self.recompute)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in tokens)
        h = _attend(q, k, v).transpose(1, 2).flatten(2)
        h = self.to_out[0](h).transpose(1, 2).unflatten(2, x.shape[2:])
        y = self.residual(x, h)
        return y / self.output_scale_factor if self.output_scale_factor != 1 else y


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # In float32, the backward pass over few positions is 4 times as fast on a CPU, and saves twice the bytes.
    if q.device.type == "cpu" and q.shape[2] <= _FEW_POSITIONS and q.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v)


def _normed_tokens(norm: nn.Module | None, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The input of query, key and value: (N, H * W, C)."""
    h = x if norm is None else norm(x)
    tokens = h.flatten(2).transpose(1, 2)  # in channels_last, a view
    return tokens, tokens, tokens
