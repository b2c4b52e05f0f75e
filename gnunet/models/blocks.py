"""The U-Net's blocks: residual layers, attention, change of resolution."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnunet.norms import make_conv, make_residual
from gnunet.ops import checkpoint_inputs

from .attention import Attention
from .block_specs import BlockSpec
from .norm_sites import NormSite

Norm = Callable[..., Tensor]


@dataclass(frozen=True)
class BlockSettings:
    """What all blocks of a model share.

    norms: the sites of the model by their paths. attention_head_dim: None for one head. scale_shift: the time
    embedding scales and shifts the second norm's output instead of being added to its input.
    downsample_padding: 0 pads below and on the right only.
    """

    temb_channels: int
    norms: Mapping[str, NormSite]
    dropout: float
    scale_shift: bool
    attention_head_dim: int | None
    downsample_padding: int


class ResnetBlock(nn.Module):
    """norm-SiLU, 3x3 convolution, norm-SiLU with the time embedding, 3x3 convolution, residual.

    Parameters are named as diffusers' ResnetBlock2D. path: of the block in the model. resample: "up" or "down"
    changes the resolution by two, nearest or average, in front of the first convolution and in the shortcut.
    """

    def __init__(
        self,
        path: str,
        in_channels: int,
        out_channels: int,
        settings: BlockSettings,
        *,
        resample: str | None = None,
        rescale: float = 1.0,
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample, self.rescale = settings.scale_shift, resample, rescale
        self.recompute = False  # see UNet2D.enable_recompute
        first, second = settings.norms[f"{path}.norm1"], settings.norms[f"{path}.norm2"]
        self.norm1 = first.build("silu")
        self.conv1 = make_conv(second.norm, in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(settings.temb_channels, (1 + settings.scale_shift) * out_channels)
        self.norm2 = second.build("silu")
        self.dropout = nn.Dropout(settings.dropout)
        self.conv2 = make_conv(second.norm, out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.conv_shortcut = None if same else make_conv(second.norm, in_channels, out_channels, 1)
        self.residual = make_residual(second.norm)

    def forward(self, x: Tensor, temb: Tensor, skip: Tensor | None = None) -> Tensor:
        """x: (N, C, H, W); temb: (N, temb_channels), the time embedding after its SiLU; skip: as x, with further
        channels, for a block that has a convolution in its shortcut and does not change the resolution."""
        if skip is None:
            (h,) = checkpoint_inputs(self._normed, (x,), (self.conv1,), norm=self.norm1, enabled=self.recompute)
            x = self._resampled(x)
            if self.conv_shortcut is not None:
                x = self.conv_shortcut(x)
        else:
            layers = (self.conv1, self.conv_shortcut)
            h, x = checkpoint_inputs(_joined, (x, skip), layers, norm=self.norm1, enabled=self.recompute)
        t = self.time_emb_proj(temb)
        tables = (None, *t.chunk(2, dim=1)) if self.scale_shift else (t, None, None)
        dropout = self.dropout.p if self.dropout.training else 0.0
        (h,) = checkpoint_inputs(
            _conditioned, (h, *tables), (self.conv2,), norm=self.norm2, dropout=dropout, enabled=self.recompute
        )
        y = self.residual(x, h)
        return y / self.rescale if self.rescale != 1 else y

    def _normed(self, norm: Norm, x: Tensor) -> tuple[Tensor]:
        return (self._resampled(norm(x)),)

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample is None:
            return x
        return F.avg_pool2d(x, 2) if self.resample == "down" else _nearest(x)


def _joined(norm: Norm, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    x = torch.cat([x, skip], dim=1)
    return norm(x), x


def _conditioned(
    norm: Norm, x: Tensor, add: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor]:
    return (norm(x, add=add, scale=scale, shift=shift),)


class Downsample(nn.Module):
    """Half the resolution by a 3x3 convolution of stride 2, one that goes with the site's norm."""

    def __init__(self, channels: int, padding: int, site: NormSite) -> None:
        super().__init__()
        self.conv = make_conv(site.norm, channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        if self.conv.padding != (0, 0):
            return self.conv(x)
        (x,) = checkpoint_inputs(_padded, (x,), (self.conv,))
        return x


class Upsample(nn.Module):
    """Twice the resolution, nearest, and a 3x3 convolution, one that goes with the site's norm."""

    def __init__(self, channels: int, site: NormSite) -> None:
        super().__init__()
        self.conv = make_conv(site.norm, channels, channels, 3, padding=1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        (x,) = checkpoint_inputs(_enlarged, (x,), (self.conv,))
        return x


def _padded(norm: None, x: Tensor) -> tuple[Tensor]:
    return (F.pad(x, (0, 1, 0, 1)),)


def _enlarged(norm: None, x: Tensor) -> tuple[Tensor]:
    return (_nearest(x),)


def _nearest(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class _Block(nn.Module):
    """The layers of a BlockSpec; enable_gradient_checkpointing of diffusers' ModelMixin sets the flag."""

    def __init__(self, plan: BlockSpec, settings: BlockSettings, rescale: float = 1.0) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.resnets = nn.ModuleList(
            ResnetBlock(f"{plan.path}.resnets.{j}", *channels, settings, rescale=rescale)
            for j, channels in enumerate(plan.resnets)
        )
        width = plan.out_channels
        head_dim = settings.attention_head_dim or width
        sites = [settings.norms[f"{plan.path}.attentions.{j}.group_norm"] for j in range(plan.attentions)]
        self.attentions = nn.ModuleList(Attention(width, head_dim, site, rescale) for site in sites)

    def _run(self, layer: nn.Module, *args: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(layer, *args)
        return layer(*args)


class DownBlock(_Block):
    """diffusers' DownBlock2D, or AttnDownBlock2D where the plan has attention."""

    def __init__(self, plan: BlockSpec, settings: BlockSettings) -> None:
        super().__init__(plan, settings)
        width, path = plan.out_channels, f"{plan.path}.downsamplers.0"
        self.downsamplers = nn.ModuleList()
        if plan.resample == "resnet":
            self.downsamplers.append(ResnetBlock(path, width, width, settings, resample="down"))
        elif plan.resample == "conv":
            self.downsamplers.append(Downsample(width, settings.downsample_padding, settings.norms[path]))

    def forward(self, h: Tensor, temb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """-> the output, and what the up path takes over: the result of every layer."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            h = self._run(resnet, h, temb)
            if self.attentions:
                h = self._run(self.attentions[i], h)
            skips.append(h)
        for downsample in self.downsamplers:
            h = self._run(downsample, h, temb)
            skips.append(h)
        return h, skips


class MidBlock(_Block):
    """diffusers' UNetMidBlock2D: two residual layers, attention between them."""

    def forward(self, h: Tensor, temb: Tensor) -> Tensor:
        first, second = self.resnets
        h = self._run(first, h, temb)
        for attention in self.attentions:
            h = self._run(attention, h)
        return self._run(second, h, temb)


class UpBlock(_Block):
    """diffusers' UpBlock2D, or AttnUpBlock2D where the plan has attention."""

    def __init__(self, plan: BlockSpec, settings: BlockSettings) -> None:
        super().__init__(plan, settings)
        width, path = plan.out_channels, f"{plan.path}.upsamplers.0"
        self.upsamplers = nn.ModuleList()
        if plan.resample == "resnet":
            self.upsamplers.append(ResnetBlock(path, width, width, settings, resample="up"))
        elif plan.resample == "conv":
            self.upsamplers.append(Upsample(width, settings.norms[path]))

    def forward(self, h: Tensor, skips: list[Tensor], temb: Tensor) -> Tensor:
        """skips: the down path's results so far; this block takes its own off the end."""
        for i, resnet in enumerate(self.resnets):
            h = self._run(resnet, h, temb, skips.pop())
            if self.attentions:
                h = self._run(self.attentions[i], h)
        for upsample in self.upsamplers:
            h = self._run(upsample, h, temb)
        return h
