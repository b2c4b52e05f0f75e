"""diffusers' residual block on the fused operator. A separate file, since it imports diffusers."""

from __future__ import annotations

from typing import Any

from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor


class FusedResnetBlock2D(ResnetBlock2D):
    """The class of a fused ResnetBlock2D, whose norms are FusedGroupNorm.

    The time embedding is part of the second norm's operation, added before it or as scale and shift after it.
    """

    unfused_class = ResnetBlock2D

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *_: Any, **__: Any) -> Tensor:
        """input_tensor: (N, C, H, W); temb: (N or 1, temb_channels). More arguments are ignored, as in diffusers."""
        x, h = input_tensor, self.norm1(input_tensor)
        resample = self.downsample if self.upsample is None else self.upsample
        if resample is not None:
            x, h = resample(x), resample(h)
        h = self.conv1(h)
        h = self.norm2(h, **self._conditioning(temb, h.shape[0]))
        h = self.conv2(self.dropout(h))
        # Without diffusers' x.contiguous() in training, which would copy channels_last activations.
        h = h + (x if self.conv_shortcut is None else self.conv_shortcut(x))
        return h if self.output_scale_factor == 1 else h / self.output_scale_factor

    def _conditioning(self, temb: Tensor | None, batch_size: int) -> dict[str, Tensor]:
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if self.time_embedding_norm not in ("default", "scale_shift"):
            return {}
        if temb is None:
            if self.time_embedding_norm == "scale_shift":
                raise ValueError("temb must not be None with time_embedding_norm 'scale_shift'")
            return {}
        temb = temb.expand(batch_size, -1)
        if self.time_embedding_norm == "default":
            return {"add": temb}
        scale, shift = temb.chunk(2, dim=1)
        return {"scale": scale, "shift": shift}
