"""The U-Net."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import GaussianFourierProjection, TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from gnunet.errors import CheckpointError, first_few
from gnunet.norms import NORMS, set_noise_level
from gnunet.ops import checkpoint_inputs
from gnunet.safe_io import TensorSpec

from . import convert
from .attention import Attention
from .block_specs import block_specs
from .blocks import BlockSettings, DownBlock, Downsample, MidBlock, ResnetBlock, UpBlock, Upsample
from .config_check import check, check_fits, read_folder
from .input_std import with_input_std
from .norm_sites import plan_norms


class UNet2D(ModelMixin, ConfigMixin):
    """The U-Net of Ho et al. (arXiv:2006.11239) as diffusers' UNet2DModel builds it, on swappable norms.

    Config keys, their defaults and meanings, the names of the parameters and the signature of `forward` are
    those of diffusers.UNet2DModel, for the block types DownBlock2D, AttnDownBlock2D, UpBlock2D,
    AttnUpBlock2D and UNetMidBlock2D; checkpoints load in both directions where the norm is one that
    UNet2DModel has. It computes in channels_last throughout, whatever the input's memory format.

    Args:
        norm: a norm config (see gnunet.norms.make_norm); what it leaves out comes from norm_num_groups and
            norm_eps. None is UNet2DModel's group normalization. Two further keys:
            `overrides` maps regions to norm configs whose keys replace the others there. Regions are `encoder`,
            `middle`, `decoder`, `attention` (its norms, in any block), `out` (the last norm), and the heights
            that feature maps have at sample_size, as strings. Where several fit, a resolution gives way to a
            part of the network, and both to `attention`. Blocks have their region's convolutions and residual
            sums too.
            `separate_skip_norm`, true or false, normalizes a skip connection apart from what it is concatenated with.

    Raises:
        ValueError: a value that is not supported; a norm that does not fit a layer, named by its path.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = (
            "DownBlock2D",
            "AttnDownBlock2D",
            "AttnDownBlock2D",
            "AttnDownBlock2D",
        ),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        norm: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        config: Mapping[str, Any] = self.config
        error = check(config)
        if error:
            raise ValueError(error)
        width = block_out_channels[0]
        settings = BlockSettings(
            temb_channels=time_embedding_dim or 4 * width,
            norms={site.path: site for site in with_input_std(config, plan_norms(config))},
            dropout=dropout,
            scale_shift=resnet_time_scale_shift == "scale_shift",
            attention_head_dim=attention_head_dim,
            downsample_padding=downsample_padding,
        )

        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.time_proj = _time_projection(config)
        time_width = 2 * width if time_embedding_type == "fourier" else width
        self.time_embedding = TimestepEmbedding(time_width, settings.temb_channels)
        self.class_embedding = _class_embedding(config, time_width, settings.temb_channels)

        self.down_blocks = nn.ModuleList()
        self.mid_block = None
        self.up_blocks = nn.ModuleList()
        for plan in block_specs(config):
            if plan.path == "mid_block":
                self.mid_block = MidBlock(plan, settings, mid_block_scale_factor)
            elif plan.path.startswith("down_blocks"):
                self.down_blocks.append(DownBlock(plan, settings))
            else:
                self.up_blocks.append(UpBlock(plan, settings))

        self.recompute = False
        self.conv_norm_out = settings.norms["conv_norm_out"].build("silu")
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        self.has_noise_levels = any(getattr(module, "noise_edges", ()) for module in self.modules())
        self.to(memory_format=torch.channels_last)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predict from a noisy image.

        Args:
            sample: (N, in_channels, H, W); H and W divisible by 2 ** (number of blocks - 1).
            timestep: a number, or a tensor of shape (), (1,) or (N,).
            class_labels: (N,) classes (num_class_embeds), (N,) numbers (class_embed_type timestep) or
                (N, time_embedding_dim) vectors (identity).
            return_dict: False returns a tuple of one tensor.

        Returns:
            UNet2DOutput with `sample`, (N, out_channels, H, W), channels_last.

        Raises:
            ValueError: labels missing or unexpected; a size that the blocks cannot halve.
        """
        factor = 2 ** (len(self.down_blocks) - 1)
        if any(size % factor for size in sample.shape[2:]):
            raise ValueError(f"height and width must be divisible by {factor}; got {tuple(sample.shape[2:])}")
        if self.config.center_input_sample:
            sample = 2 * sample - 1
        timestep = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        if self.has_noise_levels:
            set_noise_level(self, timestep)
        temb = F.silu(self._embed(timestep, class_labels))

        # A single channel is contiguous in both formats, so that a convolution may return either.
        h = self.conv_in(sample.contiguous(memory_format=torch.channels_last))
        h = h.contiguous(memory_format=torch.channels_last)
        skips = [h]
        for block in self.down_blocks:
            h, results = block(h, temb)
            skips += results
        if self.mid_block is not None:
            h = self.mid_block(h, temb)
        for block in self.up_blocks:
            h = block(h, skips, temb)
        (h,) = checkpoint_inputs(_normed, (h,), (self.conv_out,), norm=self.conv_norm_out, enabled=self.recompute)

        if self.config.time_embedding_type == "fourier":
            h = h / timestep.reshape(-1, 1, 1, 1)
        return UNet2DOutput(sample=h) if return_dict else (h,)

    def _embed(self, timestep: Tensor, class_labels: Tensor | None) -> Tensor:
        """(N, temb_channels) from timesteps and labels."""
        dtype = self.conv_in.weight.dtype
        emb = self.time_embedding(self.time_proj(timestep).to(dtype))
        if self.class_embedding is None:
            if class_labels is not None:
                raise ValueError("class_labels were given to a model without class embedding")
            return emb
        if class_labels is None:
            raise ValueError("a model with class embedding needs class_labels")
        if self.config.class_embed_type == "timestep":
            class_labels = self.time_proj(class_labels).to(dtype)
        return emb + self.class_embedding(class_labels).to(dtype)

    def layers(self) -> list[nn.Module]:
        """The modules that the forward pass calls in turn and that hold most of the parameters."""
        kinds = (ResnetBlock, Attention, Downsample, Upsample)
        return [module for module in self.modules() if isinstance(module, kinds)]

    def enable_recompute(self, enabled: bool = True) -> None:
        """Keep for backward what norms and skip concatenations take, and make what they give to convolutions and
        attention again, instead of keeping both: about half the memory for a few percent more time.

        The numbers are the same. Norms that are no GroupNormSiLU and convolutions that are not torch's own are not
        affected. Off in a new model; not part of its config.
        """
        for module in self.modules():
            if isinstance(module, (UNet2D, ResnetBlock, Attention)):
                module.recompute = enabled

    def enable_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        """As ModelMixin.enable_gradient_checkpointing.

        Raises:
            ValueError: a norm whose forward pass in training cannot be run again in backward.
        """
        if paths := norms_without_checkpointing(self.config):
            raise ValueError(
                "gradient checkpointing runs layers again in backward, when the running statistics that some norms "
                f"normalize by in training are others; the model has such norms in {first_few(paths)}"
            )
        super().enable_gradient_checkpointing(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, path: str | PathLike[str], **kwargs: Any) -> UNet2D | tuple[UNet2D, dict[str, Any]]:
        """As ModelMixin.from_pretrained; the loaded weights are channels_last.

        Nothing is unpickled unless `use_safetensors=False` asks for it. A folder's weights are compared with its config
        by their headers, before any memory is taken.

        Raises:
            CheckpointError: a folder's files are damaged, do not belong together, or have no U-Net's config.
        """
        kwargs.setdefault("use_safetensors", True)
        folder = Path(path, kwargs.get("subfolder") or "")
        if kwargs["use_safetensors"] and folder.is_dir() and (found := read_folder(folder, kwargs.get("variant"))):
            cls._check_folder(folder, *found, {key: value for key, value in kwargs.items() if key in _defaults()})
        loaded = super().from_pretrained(path, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.to(memory_format=torch.channels_last)
        return loaded

    @classmethod
    def _check_folder(
        cls, folder: Path, stored: dict[str, Any], weights: dict[str, TensorSpec], given: dict[str, Any]
    ) -> None:
        try:
            # What diffusers itself would build from this file.
            config, _, _ = cls.extract_init_dict(stored, **given)
        except Exception as error:  # of any kind, as its values may be
            raise CheckpointError(f"{folder / 'config.json'}: cannot be read ({error})") from None
        try:
            check_fits(cls, config, weights)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from None

    @classmethod
    def from_diffusers(cls, model: UNet2DModel) -> UNet2D:
        """A copy of a diffusers model: same weights, dtype, device and mode; see `convert.from_diffusers`."""
        return convert.from_diffusers(cls, model)

    def to_diffusers(self) -> UNet2DModel:
        """A copy as a plain diffusers model, which needs no gnunet; see `convert.to_diffusers`."""
        return convert.to_diffusers(self)


def check_config(config: Mapping[str, Any]) -> str | None:
    """What is wrong with keyword arguments of UNet2D, in words, or None; builds no weights."""
    unknown = [key for key in config if key not in _defaults()]
    if unknown:
        return f"unknown key {', '.join(map(repr, unknown))}; valid are {', '.join(_defaults())}"
    return check({**_defaults(), **config})


def norm_sites(config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(path, channels) of every norm layer that UNet2D(**config) has, in running order; builds no weights.

    With separate_skip_norm, a layer is each of the parts.
    """
    return [layer for site in plan_norms({**_defaults(), **config}) for layer in site.layers]


def norms_without_checkpointing(config: Mapping[str, Any]) -> list[str]:
    """Paths of the norm layers of UNet2D(**config) whose forward pass in training cannot be run again in backward."""
    sites = plan_norms({**_defaults(), **config})
    return [site.path for site in sites if site.parts and not NORMS[site.norm["kind"]].repeatable]


def _defaults() -> dict[str, Any]:
    parameters = inspect.signature(UNet2D.__init__).parameters
    return {name: p.default for name, p in parameters.items() if name != "self"}


def _normed(norm: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor]:
    return (norm(x),)


def _time_projection(config: Mapping[str, Any]) -> nn.Module:
    width = config["block_out_channels"][0]
    if config["time_embedding_type"] == "fourier":
        return GaussianFourierProjection(embedding_size=width, scale=16)
    if config["time_embedding_type"] == "learned":
        return nn.Embedding(config["num_train_timesteps"], width)
    return Timesteps(width, config["flip_sin_to_cos"], config["freq_shift"])


def _class_embedding(config: Mapping[str, Any], time_width: int, temb_channels: int) -> nn.Module | None:
    if config["class_embed_type"] == "timestep":
        return TimestepEmbedding(time_width, temb_channels)
    if config["class_embed_type"] == "identity":
        return nn.Identity()
    if config["num_class_embeds"] is not None:
        return nn.Embedding(config["num_class_embeds"], temb_channels)
    return None
