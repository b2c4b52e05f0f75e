"""The U-Net's blocks: residual layers, attention, change of resolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnunet.norms import make_conv, make_linear, make_residual
from gnunet.norms.magnitude import SILU_MAGNITUDE, concat_gains
from gnunet.ops import checkpoint_inputs
from gnunet.ops.hooks import has_hooks

from .norm_sites import NormSite, NormSites

_FEW_POSITIONS = 64
Norm = Callable[..., Tensor]


@dataclass(frozen=True)
class BlockSettings:
    """What all blocks of a model share."""

    temb_channels: int
    norms: NormSites
    dropout: float
    scale_shift: bool  # the time embedding scales and shifts the second norm's output; else it is added to its input
    attention_head_dim: int | None  # None for one head
    downsample_padding: int  # 0 pads at the bottom and on the right only


class ResnetBlock(nn.Module):
    """norm-SiLU, 3x3 convolution, norm-SiLU with the time embedding, 3x3 convolution, residual.

    Parameters are named as diffusers' ResnetBlock2D. skip_channels: how many of in_channels, the last ones, are a skip
    connection. resample: "up" or "down" changes the resolution by two, nearest or average, before the first
    convolution and in the shortcut.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        site: NormSite,
        settings: BlockSettings,
        *,
        skip_channels: int = 0,
        resample: str | None = None,
        output_scale_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample = settings.scale_shift, resample
        self.output_scale_factor, self.skip_fraction = output_scale_factor, skip_channels / in_channels
        self.recompute = False  # see UNet2D.enable_recompute
        self.norm1 = site.make_norm("norm1", in_channels, skip_channels=skip_channels)
        self.conv1 = make_conv(site.norm, in_channels, out_channels, 3, padding=1)
        self.concat_gains = None
        if skip_channels and site.preserves_magnitude:
            self.concat_gains = concat_gains(in_channels - skip_channels, skip_channels)
        width = (1 + settings.scale_shift) * out_channels
        self.time_emb_proj = make_linear(site.norm, settings.temb_channels, width, zero_gain=True)
        self.norm2 = site.make_norm("norm2", out_channels)
        self.dropout = nn.Dropout(settings.dropout)
        self.conv2 = make_conv(site.norm, out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.conv_shortcut = None if same else make_conv(site.norm, in_channels, out_channels, 1)
        self.residual = make_residual(site.norm)
        if site.norm["kind"] == "none":
            with torch.no_grad():
                self.conv1.weight.div_(SILU_MAGNITUDE)
            _zero(self.conv2)

    def forward(self, x: Tensor, temb: Tensor, skip: Tensor | None = None) -> Tensor:
        """x: (N, C, H, W); temb: (N, temb_channels), after its SiLU; skip: as x, only without `resample`."""
        if skip is None:
            (h,) = checkpoint_inputs(self._normed, (x,), (self.conv1,), norm=self.norm1, enabled=self.recompute)
            x = self._resampled(x)
            if self.conv_shortcut is not None:
                x = self.conv_shortcut(x)
        else:
            if self.concat_gains is not None:
                x, skip = x * self.concat_gains[0], skip * self.concat_gains[1]
            layers = (self.conv1, self.conv_shortcut)
            h, x = checkpoint_inputs(_joined, (x, skip), layers, norm=self.norm1, enabled=self.recompute)
        t = self.time_emb_proj(temb)
        tables = (None, *t.chunk(2, dim=1)) if self.scale_shift else (t, None, None)
        if type(self.dropout) is nn.Dropout and not has_hooks(self.dropout):
            dropout = self.dropout.p if self.dropout.training else 0.0
            enabled = self.recompute and dropout < 1
            (h,) = checkpoint_inputs(
                _conditioned, (h, *tables), (self.conv2,), norm=self.norm2, dropout=dropout, enabled=enabled
            )
        else:  # what a user put in its place
            h = self.conv2(self.dropout(*_conditioned(self.norm2, h, *tables)))
        y = self.residual(x, h)
        return y / self.output_scale_factor if self.output_scale_factor != 1 else y

    def _normed(self, norm: Norm, x: Tensor) -> tuple[Tensor]:
        return (self._resampled(norm(x)),)

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample is None:
            return x
        return F.avg_pool2d(x, 2) if self.resample == "down" else _nearest(x)


def _zero(layer: nn.Module) -> None:
    """Initialize the last layer of a residual branch without norms to 0 (Zhang et al., Fixup, arXiv:1901.09321)."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _joined(norm: Norm, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    x = torch.cat([x, skip], dim=1)
    return norm(x), x


def _conditioned(
    norm: Norm, x: Tensor, add: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor]:
    return (norm(x, add=add, scale=scale, shift=shift),)


class Attention(nn.Module):
    """Norm, multi-head self-attention over all positions, residual; parameters are named as diffusers' Attention.

    There are channels // head_dim heads. The residual sum is divided by output_scale_factor.
    """

    # diffusers' loaders look for this flag to rename query, key, value and proj_attn in old files.
    _from_deprecated_attn_block = True

    def __init__(
        self, channels: int, head_dim: int, site: NormSite, *, has_norm: bool = True, output_scale_factor: float = 1.0
    ) -> None:
        super().__init__()
        if not 1 <= head_dim <= channels:
            raise ValueError(f"attention_head_dim must be 1 to {channels} in {site.path}; got {head_dim}")
        self.heads, self.output_scale_factor = channels // head_dim, output_scale_factor
        self.recompute = False  # see UNet2D.enable_recompute
        inner = self.heads * head_dim
        self.group_norm = site.make_norm("group_norm", channels, activation=None) if has_norm else None
        self.normalizes_tokens = site.preserves_magnitude  # cosine attention, of values of unit magnitude
        self.to_q = make_linear(site.norm, channels, inner)
        self.to_k = make_linear(site.norm, channels, inner)
        self.to_v = make_linear(site.norm, channels, inner)
        self.to_out = nn.ModuleList([make_linear(site.norm, inner, channels)])
        self.residual = make_residual(site.norm)
        if site.norm["kind"] == "none":
            _zero(self.to_out[0])

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.to_q, self.to_k, self.to_v)
        tokens = checkpoint_inputs(_normed_tokens, (x,), projections, norm=self.group_norm, enabled=self.recompute)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in tokens)
        if self.normalizes_tokens:
            q, k, v = (F.rms_norm(t, t.shape[-1:], eps=1e-12) for t in (q, k, v))
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


class Downsample(nn.Module):
    """Half the resolution, by a 3x3 convolution of stride 2."""

    def __init__(self, channels: int, site: NormSite, padding: int) -> None:
        super().__init__()
        self.conv = make_conv(site.norm, channels, channels, 3, stride=2, padding=padding)
        self.padding = padding  # here, because an adapter in the convolution's place may not have it

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        if self.padding:
            return self.conv(x)
        (x,) = checkpoint_inputs(lambda norm, x: (F.pad(x, (0, 1, 0, 1)),), (x,), (self.conv,))
        return x


class Upsample(nn.Module):
    """Twice the resolution, nearest, and a 3x3 convolution."""

    def __init__(self, channels: int, site: NormSite) -> None:
        super().__init__()
        self.conv = make_conv(site.norm, channels, channels, 3, padding=1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        (x,) = checkpoint_inputs(lambda norm, x: (_nearest(x),), (x,), (self.conv,))
        return x


def _nearest(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


LAYERS = (ResnetBlock, Attention, Downsample, Upsample)  # what blocks consist of


class MidBlock(nn.Module):
    """diffusers' UNetMidBlock2D: residual layers, and attention after each of the first num_attentions.

    level: how often the resolution is halved before the block. in_channels: of each residual layer, of which the last
    skip_channels are a skip connection. resample: None, or how a block of the encoder or decoder changes the
    resolution at its end, "conv" or "resnet".
    """

    direction: ClassVar[str] = ""

    def __init__(
        self,
        path: str,
        settings: BlockSettings,
        *,
        level: int,
        in_channels: Sequence[int],
        out_channels: int,
        num_attentions: int,
        skip_channels: Sequence[int] = (),
        attention_norm: bool = True,
        output_scale_factor: float = 1.0,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False  # set by ModelMixin.enable_gradient_checkpointing, with the function
        self.resnets, self.attentions = nn.ModuleList(), nn.ModuleList()
        scale = {"output_scale_factor": output_scale_factor}
        for j, (channels, skip) in enumerate(zip(in_channels, skip_channels or [0] * len(in_channels), strict=True)):
            site = settings.norms.at(f"{path}.resnets.{j}", level)
            self.resnets.append(ResnetBlock(channels, out_channels, site, settings, skip_channels=skip, **scale))
        head_dim = out_channels if settings.attention_head_dim is None else settings.attention_head_dim
        for j in range(num_attentions):
            site = settings.norms.at(f"{path}.attentions.{j}", level, attention=attention_norm)
            self.attentions.append(Attention(out_channels, head_dim, site, has_norm=attention_norm, **scale))
        if resample is not None:
            site = settings.norms.at(f"{path}.{self.direction}samplers.0", level)
            layer: nn.Module
            if resample == "resnet":
                layer = ResnetBlock(out_channels, out_channels, site, settings, resample=self.direction)
            elif self.direction == "up":
                layer = Upsample(out_channels, site)
            else:
                layer = Downsample(out_channels, site, settings.downsample_padding)
            self.add_module(f"{self.direction}samplers", nn.ModuleList([layer]))

    def steps(self) -> list[list[nn.Module]]:
        """The layers in the order of the forward pass: a residual layer and its attention, if any, or a change of
        resolution, in each step."""
        steps: list[list[nn.Module]] = [[resnet] for resnet in self.resnets]
        for step, attention in zip(steps, self.attentions, strict=False):
            step.append(attention)
        return steps + [[layer] for layer in getattr(self, f"{self.direction}samplers", ())]

    def forward(self, h: Tensor, temb: Tensor, skips: Sequence[Tensor] = ()) -> Tensor:
        """skips: one for each residual layer, in the encoder's order; the last goes to the first layer."""
        remaining = list(skips)
        for step in self.steps():
            h = self._run(step, h, temb, *([remaining.pop()] if remaining else []))
        return h

    def _run(self, step: list[nn.Module], h: Tensor, *args: Tensor) -> Tensor:
        for layer in step:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = self._gradient_checkpointing_func(layer, h, *args)
            else:
                h = layer(h, *args)
            args = ()  # of attention
        return h


class UpBlock(MidBlock):
    """diffusers' UpBlock2D, or AttnUpBlock2D with attention."""

    direction = "up"


class DownBlock(MidBlock):
    """diffusers' DownBlock2D, or AttnDownBlock2D with attention."""

    direction = "down"

    def forward(self, h: Tensor, temb: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:  # type: ignore[override]
        """-> the output, and the skip connections: the result of every step."""
        results: tuple[Tensor, ...] = ()
        for step in self.steps():
            h = self._run(step, h, temb)
            results += (h,)
        return h, results


def set_input_std(model: nn.Module) -> None:
    """Set `input_std` in those layers of a UNet2D that have it (scaled_ws).

    From 1 after the first convolution, it grows with every residual sum: a block's first norm takes what the sums so
    far have added. A block's second norm has 1, since the convolution between them takes a normalized input.
    Convolutions and changes of resolution keep the variance; a concatenation has the mean over its channels.
    """
    variance, skips = 1.0, [1.0]
    for block in (*model.down_blocks, model.mid_block, *model.up_blocks):
        for step in [] if block is None else block.steps():
            for layer in step:
                if fraction := getattr(layer, "skip_fraction", 0.0):
                    variance = (1 - fraction) * variance + fraction * skips.pop()
                if isinstance(layer, (ResnetBlock, Attention)):
                    _set_input_std(layer.norm1 if isinstance(layer, ResnetBlock) else layer.group_norm, variance)
                    added = getattr(layer.residual, "scale", 1.0) ** 2
                    variance = (variance + added) / layer.output_scale_factor**2
            if isinstance(block, DownBlock):
                skips.append(variance)
    _set_input_std(model.conv_norm_out, variance)


def _set_input_std(norm: nn.Module | None, variance: float) -> None:
    for layer in norm.modules() if norm is not None else ():
        if hasattr(layer, "input_std"):
            layer.input_std = sqrt(variance)
