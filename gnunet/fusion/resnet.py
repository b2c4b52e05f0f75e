"""diffusers' residual block on the fused operator. A separate file, since it imports diffusers."""

from __future__ import annotations

from typing import Any

from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from gnunet.ops.hooks import runs_forward_of

from .modules import Fused, norm_silu


class FusedResnetBlock2D(Fused, ResnetBlock2D):
    """A ResnetBlock2D that applies each norm and the SiLU after it in one operation.

    The time embedding is part of the second one, added before the norm or as scale and shift after it.
    """

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """input_tensor: (N, C, H, W); temb: (N or 1, temb_channels). More arguments are ignored, as in diffusers."""
        is_projected = temb is None or self.time_emb_proj is not None
        # The operator has one row of the time embedding for each image, where diffusers broadcasts an image, too.
        is_broadcast = isinstance(temb, Tensor) and input_tensor.shape[0] == 1 and temb.shape[0] != 1
        if is_broadcast or not (is_projected and self.fused_norms()):
            output: Tensor = super().forward(input_tensor, temb, *args, **kwargs)
            return output
        x, h = input_tensor, norm_silu(self.norm1, input_tensor)
        resample = self.downsample if self.upsample is None else self.upsample
        if resample is not None:
            x, h = resample(x), resample(h)
        h = self.conv1(h)
        h = norm_silu(self.norm2, h, **self._conditioning(temb, h.shape[0]))
        h = self.conv2(self.dropout(h))
        # Without diffusers' x.contiguous() in training, which would copy channels_last activations.
        h = h + (x if self.conv_shortcut is None else self.conv_shortcut(x))
        return h if self.output_scale_factor == 1 else h / self.output_scale_factor

    def fused_norms(self) -> list[str]:
        is_fused = (
            runs_forward_of(self.nonlinearity, nn.SiLU)
            and runs_forward_of(self.norm1, nn.GroupNorm)
            and runs_forward_of(self.norm2, nn.GroupNorm)
        )
        return ["norm1", "norm2"] if is_fused else []

    def _conditioning(self, temb: Tensor | None, batch_size: int) -> dict[str, Tensor]:
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if self.time_embedding_norm == "scale_shift":
            if temb is None:
                raise ValueError("temb must not be None with time_embedding_norm 'scale_shift'")
            scale, shift = temb.expand(batch_size, -1).chunk(2, dim=1)
            return {"scale": scale, "shift": shift}
        is_added = temb is not None and self.time_embedding_norm == "default"
        return {"add": temb.expand(batch_size, -1)} if is_added else {}
