"""DINOv2 ViT-L/14, the network of FD-DINOv2."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnunet.evaluation.extractors.base import (
    Extractor,
    Preprocessing,
    find_weights,
    load_state_dict_strict,
    read_weights,
    weights_digest,
)

URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
IMAGENET = Preprocessing(
    size=224, mean=(0.485 * 255, 0.456 * 255, 0.406 * 255), std=(0.229 * 255, 0.224 * 255, 0.225 * 255)
)


def load_dinov2(weights: str | Path | None, device: torch.device) -> Extractor:
    """The 1024 features of DINOv2's class token (Oquab et al., 2023), as FD-DINOv2 uses them (Stein et al., 2023).

    The network is implemented here because the libraries that have it either resize the position embedding
    differently, which shifts the distances, or run code from a hub.
    """
    state = read_weights(find_weights("dinov2", weights, URL), "dinov2")
    network = VisionTransformer(width=1024, depth=24, heads=16, patch=14, grid=37)
    load_state_dict_strict(network, state, "dinov2")
    kind, digest = "dinov2 vit-l/14 class token", weights_digest(state)
    return Extractor("dinov2", network.to(device), kind, digest, IMAGENET, device)


class VisionTransformer(nn.Module):
    """DINOv2's vision transformer for inference, with the parameter names of the published weights.

    fp32 (N, 3, H, W), H and W multiples of `patch` -> (N, width), the normalized class token. `grid` is the number of
    patches per side of the images that the position embedding was trained on.
    """

    def __init__(self, *, width: int, depth: int, heads: int, patch: int, grid: int):
        super().__init__()
        self.grid = grid
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # used in training only, but in the weights file
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](x)
        positions = self.positions(*patches.shape[-2:])
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        tokens = tokens + positions
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens[:, 0])

    def positions(self, rows: int, columns: int) -> Tensor:
        """The position embedding of a grid of patches, (1, 1 + rows * columns, width)."""
        if rows == columns == self.grid:
            return self.pos_embed
        class_token, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        square = patches.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        # The 0.1 is `interpolate_offset` in DINOv2's code; the published features depend on it.
        scale = ((rows + 0.1) / self.grid, (columns + 0.1) / self.grid)
        resized = F.interpolate(square, scale_factor=scale, mode="bicubic")
        return torch.cat([class_token, resized.flatten(2).transpose(1, 2)], dim=1)


class Block(nn.Module):
    """A pre-norm transformer block with LayerScale on each residual branch."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.ls2 = LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma
