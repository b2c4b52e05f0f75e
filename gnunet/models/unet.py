"""The U-Net."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le, Len
from diffusers import UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from gnunet.errors import first_few
from gnunet.norms import ConcatNorm, NormLayer, make_output
from gnunet.norms.signature import validate_options
from gnunet.ops import checkpoint_inputs

from . import convert
from .blocks import LAYERS, Attention, BlockSettings, DownBlock, MidBlock, ResnetBlock, UpBlock, set_input_std
from .embeddings import LossLogVariance, class_embedding, embed, sinusoid_embedding, time_projection
from .norm_sites import NormSites
from .pretrained import check_pretrained

# A config may be untrusted, and its model is built, without memory, before its weights are compared with it: these
# bounds lie far above what trains. No tensor bounds the number of classes of some class embeddings.
MAX_CLASSES = 2**20
MAX_ENCODER_LAYERS = 256  # layers_per_block in all blocks of the encoder
Size = Annotated[int, Ge(1), Le(8192)]
Width = Annotated[int, Ge(1), Le(2**16)]
DownBlockType = Literal["DownBlock2D", "AttnDownBlock2D"]
UpBlockType = Literal["UpBlock2D", "AttnUpBlock2D"]
ResampleType = Literal["conv", "resnet"]


class UNet2D(ModelMixin, ConfigMixin):
    """The U-Net of Ho et al. (arXiv:2006.11239) as diffusers' UNet2DModel builds it, on swappable norms.

    Config keys with their defaults and meanings, parameter names and the signature of `forward` are those of
    diffusers.UNet2DModel, for the block types DownBlock2D, AttnDownBlock2D, UpBlock2D, AttnUpBlock2D and
    UNetMidBlock2D. Checkpoints load in both directions if the norm is one that UNet2DModel has. Everything is computed
    in channels_last, whatever the input's memory format; torch's FSDP2 shards contiguous weights only, for which call
    `model.to(memory_format=torch.contiguous_format)`.

    Args:
        norm: a norm config (see gnunet.norms.make_norm), completed from norm_num_groups and norm_eps. Two further keys:
            `overrides` maps regions to norm configs whose keys replace the others there. Regions are `encoder`,
            `middle`, `decoder`, `attention` (its norms, in any block), `out` (the last norm), and the heights that
            feature maps have at sample_size, as strings. `attention` takes precedence over the other names, and these
            over heights. A region's norm config also decides on its convolutions and residual sums.
            `separate_skip_norm` normalizes a skip connection separately from what it is concatenated with.
        learned_weighting: for training only, learn the logarithm of the loss by noise level, which `forward` returns.
        augment_dim: for training only, how many numbers describe an image's augmentation, of which `forward` is told.

    Raises:
        ValueError: a value that is not supported; a norm config that does not fit a layer, named by its path.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["norm"]
    training_only = {"learned_weighting": "loss_log_variance", "augment_dim": "augment_embedding"}
    """Config keys of training, and their modules, that sampling does not need."""

    @register_to_config
    def __init__(
        self,
        sample_size: Size | Annotated[Sequence[Size], Len(2, 2)] | None = None,
        in_channels: Width = 3,
        out_channels: Width = 3,
        center_input_sample: bool = False,
        time_embedding_type: Literal["positional", "fourier", "learned"] = "positional",
        time_embedding_dim: Annotated[int, Ge(1), Le(2**18)] | None = None,
        freq_shift: Annotated[float, Ge(-(2**16)), Le(2**16)] = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: Sequence[DownBlockType] = (
            "DownBlock2D",
            "AttnDownBlock2D",
            "AttnDownBlock2D",
            "AttnDownBlock2D",
        ),
        mid_block_type: Literal["UNetMidBlock2D"] | None = "UNetMidBlock2D",
        up_block_types: Sequence[UpBlockType] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: Annotated[Sequence[Width], Len(1, 14)] = (224, 448, 672, 896),
        layers_per_block: Annotated[int, Ge(1), Le(64)] = 2,
        mid_block_scale_factor: Annotated[float, Ge(1e-6), Le(1e6)] = 1,
        downsample_padding: Annotated[int, Ge(0), Le(1)] = 1,
        downsample_type: ResampleType = "conv",
        upsample_type: ResampleType = "conv",
        dropout: Annotated[float, Ge(0), Le(1)] = 0.0,
        act_fn: Literal["silu", "swish"] = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int | None = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: Annotated[float, Ge(0)] = 1e-5,
        resnet_time_scale_shift: Literal["default", "scale_shift"] = "default",
        add_attention: bool = True,
        class_embed_type: Literal["timestep", "identity"] | None = None,
        num_class_embeds: Annotated[int, Ge(1), Le(MAX_CLASSES)] | None = None,
        num_train_timesteps: Annotated[int, Ge(1), Le(100_000)] | None = None,
        norm: Mapping[str, Any] | None = None,
        learned_weighting: bool = False,
        augment_dim: Annotated[int, Ge(1), Le(1024)] | None = None,
    ) -> None:
        super().__init__()
        validate_options(UNet2D, self.config)
        levels = len(block_out_channels)
        for name, types in (("down_block_types", down_block_types), ("up_block_types", up_block_types)):
            if len(types) != levels:
                raise ValueError(
                    f"{name} and block_out_channels must have the same length; got {len(types)} and {levels}"
                )
        if layers_per_block * levels > MAX_ENCODER_LAYERS:
            raise ValueError(
                f"layers_per_block must be at most {MAX_ENCODER_LAYERS // levels} with {levels} blocks; "
                f"got {layers_per_block}"
            )
        if time_embedding_type == "learned" and num_train_timesteps is None:
            raise ValueError("time_embedding_type learned needs num_train_timesteps")
        width = block_out_channels[0]
        settings = BlockSettings(
            temb_channels=time_embedding_dim or 4 * width,
            norms=NormSites(self.config),
            dropout=dropout,
            scale_shift=resnet_time_scale_shift == "scale_shift",
            attention_head_dim=attention_head_dim,
            downsample_padding=downsample_padding,
        )

        site = settings.norms.at("conv_in", 0)
        self.input_scale, self.conv_in = site.make_input(in_channels, width, out_channels)
        self.preserves_magnitude = site.preserves_magnitude  # in the embeddings
        self.time_proj = time_projection(self.config)
        time_width = 2 * width if time_embedding_type == "fourier" else width
        widths = (time_width, settings.temb_channels)
        self.time_embedding = sinusoid_embedding(*widths, self.preserves_magnitude)
        self.class_embedding = class_embedding(self.config, *widths, self.preserves_magnitude)

        self.down_blocks = nn.ModuleList()
        self.mid_block = None
        self.up_blocks = nn.ModuleList()
        channels, lowest = block_out_channels, levels - 1
        for level, kind in enumerate(down_block_types):
            in_channels = [channels[max(level - 1, 0)]] + [channels[level]] * (layers_per_block - 1)
            attention = kind.startswith("Attn")
            # As in diffusers, only blocks with attention can resample by a resnet.
            downsample = None if level == lowest else downsample_type if attention else "conv"
            block = DownBlock(
                f"down_blocks.{level}", settings, level=level, in_channels=in_channels, out_channels=channels[level],
                num_attentions=layers_per_block * attention, resample=downsample,
            )  # fmt: skip
            self.down_blocks.append(block)
        if mid_block_type is not None:
            self.mid_block = MidBlock(
                "mid_block", settings, level=lowest, in_channels=[channels[-1]] * 2, out_channels=channels[-1],
                num_attentions=int(add_attention),
                # As in diffusers: with scale_shift, attention only has a norm if its number of groups is given.
                attention_norm=attn_norm_num_groups is not None or not settings.scale_shift,
                output_scale_factor=mid_block_scale_factor,
            )  # fmt: skip
        for i, kind in enumerate(up_block_types):
            level, attention = lowest - i, kind.startswith("Attn")
            # From the residual layers of the down path at this level, and from the input of the first of them.
            skip_channels = [channels[level]] * layers_per_block + [channels[max(level - 1, 0)]]
            previous = [channels[min(level + 1, lowest)]] + [channels[level]] * layers_per_block
            upsample = None if level == 0 else upsample_type if attention else "conv"
            in_channels = [p + s for p, s in zip(previous, skip_channels, strict=True)]
            block = UpBlock(
                f"up_blocks.{i}", settings, level=level, in_channels=in_channels, skip_channels=skip_channels,
                out_channels=channels[level], num_attentions=(layers_per_block + 1) * attention, resample=upsample,
            )  # fmt: skip
            self.up_blocks.append(block)

        self.recompute = False
        site = settings.norms.at("conv_norm_out", 0)
        self.conv_norm_out = site.make_norm("", width)
        self.conv_out = make_output(site.norm, width, out_channels)
        self.augment_embedding = None
        if augment_dim is not None:
            self.augment_embedding = nn.Linear(augment_dim, time_width, bias=False)
            nn.init.zeros_(self.augment_embedding.weight)
        self.loss_log_variance = LossLogVariance() if learned_weighting else None
        settings.norms.check_regions()
        set_input_std(self)
        self.to(memory_format=torch.channels_last)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        log_snr: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> UNet2DOutput | tuple[Tensor, ...]:
        """Predict from a noisy image.

        Args:
            sample: (N, in_channels, H, W); H and W divisible by 2 ** (number of blocks - 1).
            timestep: an integer (a float is truncated, as in diffusers), or a tensor of shape (), (1,) or (N,).
            class_labels: (N,) classes (num_class_embeds), (N,) numbers (class_embed_type timestep) or
                (N, time_embedding_dim) vectors (identity).
            return_dict: False returns a tuple.
            log_snr: (N,), for the logarithm of the expected loss as the second tensor, fp32 (N,), of the tuple
                (learned_weighting).
            augment_labels: (N, augment_dim), all 0 for an image as it is, which None is, too.

        Returns:
            UNet2DOutput with `sample`, (N, out_channels, H, W), channels_last.
        """
        factor = 2 ** (len(self.down_blocks) - 1)
        if any(size % factor for size in sample.shape[2:]):
            raise ValueError(f"height and width must be divisible by {factor}; got {tuple(sample.shape[2:])}")
        for name, given, part in (
            ("augment_labels", augment_labels, self.augment_embedding),
            ("log_snr", log_snr, self.loss_log_variance),
        ):
            if given is not None and part is None:
                raise ValueError(f"{name} were given to a model without {name}")
        if self.config.center_input_sample:
            sample = 2 * sample - 1
        if not isinstance(timestep, Tensor):
            timestep = torch.tensor(timestep, dtype=torch.long, device=sample.device)
        if timestep.dim() > 1 or timestep.numel() not in (1, sample.shape[0]):
            raise ValueError(f"timestep must have shape (), (1,) or ({len(sample)},); got {tuple(timestep.shape)}")
        timestep = timestep.to(sample.device).expand(sample.shape[0])
        temb = embed(self, timestep, class_labels, augment_labels, sample.dtype)

        sample = sample.contiguous(memory_format=torch.channels_last)
        # A single channel is contiguous in both formats, so that a convolution may return either.
        h = self.conv_in(sample if self.input_scale is None else self.input_scale(sample, timestep))
        h = h.contiguous(memory_format=torch.channels_last)
        skips = (h,)
        for block in self.down_blocks:
            h, results = block(h, temb)
            skips += results
        if self.mid_block is not None:
            h = self.mid_block(h, temb)
        layers = self.config.layers_per_block + 1
        for block in self.up_blocks:
            own, skips = skips[-layers:], skips[:-layers]
            h = block(h, temb, own)
        (h,) = checkpoint_inputs(
            lambda norm, h: (norm(h),), (h,), (self.conv_out,), norm=self.conv_norm_out, enabled=self.recompute
        )

        if self.config.time_embedding_type == "fourier":
            h = h / timestep.reshape(-1, 1, 1, 1)
        if return_dict:
            return UNet2DOutput(sample=h)
        return (h,) if log_snr is None else (h, self.loss_log_variance(log_snr))

    def norm_layers(self) -> dict[str, nn.Module]:
        """The norm layers by path, from input to output. A `ConcatNorm` is one layer."""
        layers: dict[str, nn.Module] = {}
        for name in ("down_blocks", "mid_block", "up_blocks", "conv_norm_out"):
            for path, module in self.get_submodule(name).named_modules(prefix=name) if getattr(self, name) else ():
                if isinstance(module, (NormLayer, ConcatNorm)) and ".parts." not in path:
                    layers[path] = module
        return layers

    def norms_without_checkpointing(self) -> list[str]:
        """The paths of the norm layers that cannot be recomputed in the backward pass."""
        return [path for path, layer in self.norm_layers().items() if not layer.supports_checkpointing]

    def fsdp_units(self) -> list[nn.Module]:
        """The modules that the forward pass calls one after the other and that hold most of the parameters."""
        return [module for module in self.modules() if isinstance(module, LAYERS)]

    def enable_recompute(self, enabled: bool = True) -> None:
        """Recompute the inputs of convolutions and attention in the backward pass from the inputs of norms and skip
        concatenations, instead of saving both: about half the activation memory for a few percent more time.

        Results are identical. Norms other than GroupNormSiLU and convolutions other than torch's are not affected. Off
        in a new model; not part of its config.
        """
        for module in self.modules():
            if isinstance(module, (UNet2D, ResnetBlock, Attention)):
                module.recompute = enabled

    def enable_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        """As ModelMixin's; a ValueError if a norm of the model cannot be recomputed in the backward pass."""
        if paths := self.norms_without_checkpointing():
            raise ValueError(
                "gradient checkpointing recomputes layers in the backward pass, when the running statistics that some "
                f"norms use in training have changed; the model has such norms in {first_few(paths)}"
            )
        super().enable_gradient_checkpointing(*args, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any
    ) -> UNet2D | tuple[UNet2D, dict[str, Any]]:
        """As ModelMixin.from_pretrained, with weights in channels_last.

        Nothing is unpickled unless `use_safetensors=False`. The headers of a folder's weights are compared with its
        config before any memory is allocated.

        Raises:
            CheckpointError: a folder's files are corrupted, do not belong together, or are not those of a U-Net.
        """
        kwargs.setdefault("use_safetensors", True)
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if kwargs["use_safetensors"] and folder.is_dir():
            check_pretrained(cls, folder, **kwargs)
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        nn.Module.to(model, memory_format=torch.channels_last)  # the model's own raises an error if part is offloaded
        return loaded

    @classmethod
    def from_diffusers(cls, model: UNet2DModel) -> UNet2D:
        """A copy of a diffusers model, in its dtype, device and mode.

        Raises:
            ValueError: a block type or another setting is not supported, or a module is not as the config says.
        """
        return convert.from_diffusers(cls, model)

    def to_diffusers(self) -> UNet2DModel:
        """A copy as a plain diffusers model, in its dtype, device and mode.

        Raises:
            ValueError: norm layers that UNet2DModel does not have: it knows group normalization, by one count of
                groups and one eps for all layers, and another count in the middle block's attention. Or a module that
                is not as the config says.
        """
        return convert.to_diffusers(UNet2D, self)
