"""Every kind of model that fuse knows computes what it did: outputs and the gradients of all parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import pytest
import torch

import gnunet


class Case(NamedTuple):
    model: str
    config: dict[str, Any]
    call: Callable[..., Any]
    pairs: int
    """Counted by hand: 2 for each residual block (4 where it is spatial and temporal), 1 before each output."""


def _cross_attention(kind: str, **more: Any) -> dict[str, Any]:
    """8 residual blocks (ControlNet: 4) with cross-attention."""
    return {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": (f"CrossAttnDownBlock{kind}", f"DownBlock{kind}"),
        "up_block_types": (f"UpBlock{kind}", f"CrossAttnUpBlock{kind}"),
        "cross_attention_dim": 16,
        **more,
    }


def _image(model, randn):
    return model(randn(2, 3, 8, 8), torch.tensor([3, 500])).sample


def _text_to_image(model, randn):
    return model(randn(2, 4, 8, 8), torch.tensor([3, 500]), randn(2, 5, 16)).sample


def _text_to_video(model, randn):
    frames, text = randn(1, 4, 2, 4, 4), randn(1, 5, 16)
    return model(frames, 3, text.repeat(2, 1, 1) if "Motion" in type(model).__name__ else text).sample


def _encode_and_decode(model, randn, shape=(2, 3, 8, 8)):
    sample = randn(*shape)
    return model.encode(sample).latent_dist, model(sample).sample


def _video_encode_and_decode(model, randn):
    return _encode_and_decode(model, randn, (1, 3, 9, 16, 16))


GROUPS = {"norm_num_groups": 8}
UNET = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    **GROUPS,
}
VAE = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
}
VIDEO_VAE = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4}
CASES = {
    "unet_dropout": Case("UNet2DModel", {**UNET, "dropout": 0.3}, _image, 8 * 2 + 1),
    "unet_scale_shift_resnet_resampling": Case(
        "UNet2DModel",
        {
            **UNET,
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "resnet_time_scale_shift": "scale_shift",
        },
        _image,
        10 * 2 + 1,
    ),
    "unet_fir_resampling_and_skips": Case(
        "UNet2DModel",
        {
            **UNET,
            "block_out_channels": (32, 32),
            "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
            "mid_block_scale_factor": 2**0.5,
        },
        _image,
        10 * 2 + 2,  # one before the skip's output
    ),
    "stable_diffusion": Case("UNet2DConditionModel", _cross_attention("2D", **GROUPS), _text_to_image, 8 * 2 + 1),
    "kandinsky": Case(
        "UNet2DConditionModel",
        _cross_attention(
            "2D",
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            resnet_time_scale_shift="scale_shift",
            resnet_skip_time_act=True,
            resnet_out_scale_factor=1.4,
            **GROUPS,
        ),
        _text_to_image,
        10 * 2 + 1,
    ),
    "controlnet": Case(
        "ControlNetModel",
        {
            **{k: v for k, v in _cross_attention("2D", **GROUPS).items() if k != "up_block_types"},
            "conditioning_embedding_out_channels": (8, 8),
        },
        lambda m, randn: m(
            randn(2, 4, 8, 8), torch.tensor([3, 500]), randn(2, 5, 16), randn(2, 3, 16, 16), return_dict=False
        ),
        4 * 2,
    ),
    "controlnet_xs": Case(
        "UNetControlNetXSModel",
        {
            **{k: v for k, v in _cross_attention("2D", **GROUPS).items() if k != "layers_per_block"},
            "num_attention_heads": 2,
            "ctrl_conditioning_embedding_out_channels": (8, 8),
            "ctrl_block_out_channels": (8, 16),
            "ctrl_num_attention_heads": 1,
            "ctrl_max_norm_num_groups": 8,
        },
        lambda m, randn: m(randn(2, 4, 8, 8), torch.tensor([3, 500]), randn(2, 5, 16), randn(2, 3, 16, 16)).sample,
        (12 + 6) * 2 + 1,
    ),
    "autoencoder": Case("AutoencoderKL", {**VAE, **GROUPS}, _encode_and_decode, 10 * 2 + 2),
    "autoencoder_asymmetric": Case(
        "AsymmetricAutoencoderKL",
        {
            "down_block_types": VAE["down_block_types"],
            "down_block_out_channels": (16, 32),
            "up_block_types": VAE["up_block_types"],
            "up_block_out_channels": (16, 32),
            **GROUPS,
        },
        _encode_and_decode,
        10 * 2 + 2,
    ),
    "autoencoder_vq": Case(
        "VQModel", {**VAE, **GROUPS, "num_vq_embeddings": 8}, lambda m, randn: m(randn(2, 3, 8, 8)).sample, 10 * 2 + 2
    ),
    "autoencoder_vq_spatial_norm": Case(
        "VQModel",
        {**VAE, "block_out_channels": (32, 32), "num_vq_embeddings": 8, "norm_type": "spatial"},
        lambda m, randn: m(randn(2, 3, 8, 8)).sample,
        4 * 2 + 1,  # the encoder
    ),
    "autoencoder_hunyuan_image": Case(
        "AutoencoderKLHunyuanImage",
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 4,
            "block_out_channels": (32, 32),
            "layers_per_block": 1,
            "spatial_compression_ratio": 2,
            "sample_size": 8,
        },
        _encode_and_decode,
        10 * 2 + 2,
    ),
    "autoencoder_kvae": Case(
        "AutoencoderKLKVAE",
        {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 1)},
        _encode_and_decode,
        4 * 2 + 1,  # the encoder
    ),
    "autoencoder_ltx2_audio": Case(
        "AutoencoderKLLTX2Audio",
        {
            "base_channels": 32,
            "ch_mult": (1, 2),
            "num_res_blocks": 1,
            "latent_channels": 4,
            "norm_type": "group",
            "causality_axis": "none",
            "mel_bins": 16,
        },
        lambda m, randn: _encode_and_decode(m, randn, (2, 2, 16, 16)),
        10 * 2 + 2,
    ),
    "video_unet": Case(
        "UNet3DConditionModel",
        _cross_attention("3D", block_out_channels=(32, 32), attention_head_dim=8, **GROUPS),
        _text_to_video,
        8 * 2 + 8 * 4 + 1,  # four in a TemporalConvLayer
    ),
    "video_i2vgen": Case(
        "I2VGenXLUNet",
        _cross_attention("3D", block_out_channels=(32, 32), attention_head_dim=8, num_attention_heads=2, **GROUPS),
        lambda m, randn: (
            m(randn(1, 4, 2, 4, 4), 3, torch.tensor([2]), randn(1, 4, 2, 4, 4), randn(1, 16), randn(1, 5, 16)).sample
        ),
        8 * 2 + 8 * 4 + 1,
    ),
    "video_unet_spatio_temporal": Case(
        "UNetSpatioTemporalConditionModel",
        _cross_attention(
            "SpatioTemporal",
            in_channels=4,
            block_out_channels=(32, 32),
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            num_attention_heads=2,
            projection_class_embeddings_input_dim=24,
            addition_time_embed_dim=8,
        ),
        lambda m, randn: m(randn(1, 3, 4, 8, 8), 3, randn(1, 5, 16), torch.ones(1, 3)).sample,
        8 * 4 + 1,
    ),
    "video_unet_motion": Case(
        "UNetMotionModel",
        _cross_attention("Motion", num_attention_heads=2, motion_num_attention_heads=2, **GROUPS),
        _text_to_video,
        8 * 2 + 1,
    ),
    "video_autoencoder_temporal_decoder": Case(
        "AutoencoderKLTemporalDecoder",
        {"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2, "layers_per_block": 1},
        lambda m, randn: m(randn(2, 3, 8, 8), num_frames=2).sample,
        4 * 2 + 1 + 5 * 4 + 1,
    ),
    "video_autoencoder_hunyuan": Case("AutoencoderKLHunyuanVideo", VIDEO_VAE, _video_encode_and_decode, 16 * 2 + 2),
    "video_autoencoder_cogvideox": Case(
        "AutoencoderKLCogVideoX",
        {
            **VIDEO_VAE,
            "down_block_types": ("CogVideoXDownBlock3D",) * 4,
            "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        },
        _video_encode_and_decode,
        6 * 2 + 1,  # the encoder
    ),
    "video_autoencoder_allegro": Case(
        "AutoencoderKLAllegro",
        VIDEO_VAE,
        lambda m, randn: (m.encoder(randn(1, 3, 8, 16, 16)), m.decoder(randn(1, 4, 2, 2, 2))),
        16 * 2 + 20 * 4 + 2,
    ),
    "video_autoencoder_magvit": Case(
        "AutoencoderKLMagvit",
        {
            **VIDEO_VAE,
            "down_block_types": ("SpatialDownBlock3D",) + ("SpatialTemporalDownBlock3D",) * 3,
            "up_block_types": ("SpatialUpBlock3D",) + ("SpatialTemporalUpBlock3D",) * 3,
        },
        _video_encode_and_decode,
        14 * 2 + 2,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_same_function(randomized, run, assert_same, case):
    """In float64, so that nothing but a wrong formula can make a difference; fused, and undone."""
    if not hasattr(diffusers, case.model):
        pytest.skip(f"diffusers {diffusers.__version__} has no {case.model}")
    torch.manual_seed(0)
    model = randomized(getattr(diffusers, case.model)(**case.config).train()).double()
    keys, modules = list(model.state_dict()), dict(model.named_modules())
    classes = {path: type(module) for path, module in modules.items()}
    expected = run(model, case.call)

    report = gnunet.fuse(model)
    assert report == len(report.fused) == case.pairs
    assert report.fused == [path for path in report.fused if isinstance(modules[path], torch.nn.GroupNorm)]
    assert list(model.state_dict()) == keys
    assert_same(run(model, case.call), expected, rtol=1e-9)

    assert gnunet.unfuse(model) == case.pairs
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert all(modules[path] is module for path, module in model.named_modules())
    assert_same(run(model, case.call), expected, rtol=0)
