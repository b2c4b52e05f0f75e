"""DINOv2 ViT-L/14, the network of FD-DINOv2."""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnunet.evaluation.extractors.base import Extractor, Preprocessing, find_weights, fitting_weights, weights_digest

URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
IMAGENET = Preprocessing(
    size=224, mean=(0.485 * 255, 0.456 * 255, 0.406 * 255), std=(0.229 * 255, 0.224 * 255, 0.225 * 255)
)
NAMES = {"patch_embed.proj": "patch_embed", "attn.qkv.": "self_attn.in_proj_", "attn.proj": "self_attn.out_proj"}
NAMES |= {"mlp.fc": "linear"}
"""Parts of the published names of weights, and of torch's."""
SCALES = {"attn.proj": "ls1.gamma", "mlp.fc2": "ls2.gamma"}
"""Layers, and the LayerScale that multiplies the output of each."""


def load_dinov2(weights: str | Path | None, device: torch.device) -> Extractor:
    """The 1024 features of DINOv2's class token (Oquab et al., 2023), as FD-DINOv2 uses them (Stein et al., 2023).

    The network is implemented here because the libraries that have it either resize the position embedding
    differently, which shifts the distances, or run code from a hub.
    """
    state = find_weights("dinov2", weights, URL)
    network = VisionTransformer(width=1024, depth=24, heads=16, patch=14, grid=16)
    with fitting_weights("dinov2"):
        network.load_state_dict(convert_weights(state, grid=16))
    kind, digest = "dinov2 vit-l/14 class token", weights_digest(state)
    network.eval().requires_grad_(False).to(device)
    return Extractor("dinov2", network, kind, digest, IMAGENET, device)


class VisionTransformer(nn.Module):
    """DINOv2's network for inference: fp32 (N, 3, H, W) of `grid` x `grid` patches -> (N, width), the class token."""

    def __init__(self, *, width: int, depth: int, heads: int, patch: int, grid: int):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        options = {"activation": "gelu", "layer_norm_eps": 1e-6, "batch_first": True, "norm_first": True}
        blocks = (nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, **options) for _ in range(depth))
        self.blocks, self.norm = nn.Sequential(*blocks), nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1) + self.pos_embed
        return self.norm(self.blocks(tokens)[:, 0])


def convert_weights(state: Mapping[str, Tensor], grid: int) -> dict[str, Tensor]:
    """The published weights for `VisionTransformer`: LayerScale is multiplied into the layer before it."""
    converted = {}
    for name, tensor in state.items():
        for layer, scale in SCALES.items():
            if layer in name:
                tensor = torch.einsum("o,o...->o...", state[name.partition(layer)[0] + scale], tensor)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        if not name.endswith((".gamma", "mask_token")):  # the mask is used in training only
            converted[name] = tensor
    class_token, patches = state["pos_embed"].split([1, 37 * 37], dim=1)
    square = patches.transpose(1, 2).unflatten(2, (37, 37))
    # The 0.1 is `interpolate_offset` in DINOv2's code; the published features depend on it.
    resized = F.interpolate(square, scale_factor=(grid + 0.1) / 37, mode="bicubic")
    return converted | {"pos_embed": torch.cat([class_token, resized.flatten(2).transpose(1, 2)], dim=1)}
