"""Keyword arguments made from a configuration, for the U-Net and the data."""

from typing import TYPE_CHECKING, Any

import torch

from gnunet.config.kinds import NORM_SECTIONS
from gnunet.config.sections import Config
from gnunet.diffusion import make_process
from gnunet.norms import NORMS
from gnunet.norms.network_input import DATA_STD
from gnunet.scaling import as_resolution

if TYPE_CHECKING:
    from gnunet.data import Condition

MAX_LOG_SNR = 10.0  # beyond which the input is all noise or all image
KINDS_OF_UNIT_INPUT = [kind for kind, norm in NORMS.items() if norm.input_layer is not None]
NUM_SAMPLE_LEVELS = 33


def image_kwargs(config: Config) -> dict[str, Any]:
    """Keyword arguments of `gnunet.data.load_images`, except channels."""
    data, condition = config.data, config.data.condition
    pairs = condition.model_dump(exclude={"kind"}) if condition is not None and condition.kind == "paired" else None
    of_training = {"flip", "augment", "autoencoder", "label_dropout", "condition", "condition_dropout", "num_workers"}
    settings = data.model_dump(exclude=of_training | {"validation_images"})
    return {**settings, "pairs": pairs, "label_shape": label_shape(config.model)}


def label_shape(model: Any) -> tuple[int, ...] | None:
    """The shape of each label that is a number or a vector, by the keys of a U-Net; None for others."""
    width = model.time_embedding_dim or 4 * model.block_out_channels[0]
    return {None: None, "timestep": (), "identity": (width,)}[model.class_embed_type]


def make_condition(config: Config) -> "Condition | None":
    """What the network sees besides the noisy image; None for nothing."""
    condition, channels = config.data.condition, config.model.in_channels
    if condition is None:
        return None
    from gnunet.data import Condition  # imports datasets, which takes seconds

    values = condition.model_dump(exclude={"folder", "column"})
    own = values.get("num_classes") or values.get("channels")
    added = own or {"mask": channels + 1, "grey": 1}.get(condition.kind, channels)
    return Condition(**{**values, "channels": added}, can_drop=config.data.condition_dropout > 0)


def process_kwargs(config: Config) -> dict[str, Any]:
    """Keyword arguments of `gnunet.diffusion.make_process`."""
    settings, data = config.diffusion.model_dump(), config.data
    if config.diffusion.kind == "ddpm" and (data.normalization == "mean_std" or data.autoencoder is not None):
        settings["clip_sample"] = False  # values outside of -1..1 occur
    return settings


def unet_kwargs(config: Config, num_classes: int | None, reduction: int = 1) -> dict[str, Any]:
    """Keyword arguments of `gnunet.models.UNet2D`; with `num_classes` None or 0 it has no class embedding.

    `reduction` is that of data.autoencoder. If data.label_dropout is above 0, the last embedding is the null label's.
    """
    model, condition, augment_dim = config.model, make_condition(config), None
    if config.data.augment:
        from gnunet.data.augment import NUM_LABELS  # imports datasets, which takes seconds

        augment_dim = NUM_LABELS
    return {
        **model.model_dump(exclude={"norm", "activation_checkpointing", "gradient_checkpointing"}),
        "sample_size": as_resolution([side // reduction for side in config.data.size]),
        "in_channels": model.in_channels + (condition.channels if condition else 0),
        "out_channels": model.in_channels,
        "num_class_embeds": num_classes + (config.data.label_dropout > 0) if num_classes else None,
        # diffusers' own keys for the norm; norm_num_groups is also the default of overrides.
        "norm_num_groups": getattr(model.norm, "groups", None) or NORM_SECTIONS["group"]().groups,
        "norm_eps": getattr(model.norm, "eps", 1e-5),
        "norm": _norm_kwargs(config),
        "learned_weighting": config.train.loss_weighting == "learned",
        "augment_dim": augment_dim,
    }


def _sample_levels(config: Config) -> list[list[float]]:
    """Timesteps of training and, at its ends, of sampling, ascending, with the factors of image and noise in what the
    network sees."""
    with torch.device("cpu"):  # also where the network is made without memory
        process = make_process(**config.diffusion.model_dump())
        trained = process.noise_level((torch.arange(NUM_SAMPLE_LEVELS, dtype=torch.float64) + 0.5) / NUM_SAMPLE_LEVELS)
        log_snr = torch.cat([trained.log_snr.double(), torch.tensor([-MAX_LOG_SNR, MAX_LOG_SNR], dtype=torch.float64)])
        level = process.from_log_snr(log_snr)
        factor = process.network_input(torch.ones(len(log_snr), 1, 1, 1), level).flatten()
        rows = torch.stack([level.timestep, factor * level.alpha, factor * level.sigma], 1).tolist()
    return [[timestep, *factors] for timestep, factors in sorted({row[0]: row[1:] for row in rows}.items())]


def _norm_kwargs(config: Config) -> dict[str, Any]:
    """model.norm for UNet2D, with what kinds derive from the length of the run and from data and process."""
    norm, train = config.model.norm.model_dump(), config.train
    of_data = getattr(config.diffusion, "sigma_data", DATA_STD if config.data.autoencoder is None else 1.0)
    derived = {"renorm_warmup": train.total_images // train.batch_size // 10, "data_std": of_data}
    regions = (norm, *norm["overrides"].values())
    for keys in regions:
        if keys.get("kind") == "batch_renorm":
            keys.setdefault("renorm_warmup", None)
        keys |= {key: value for key, value in derived.items() if key in keys and keys[key] is None}
    if any(keys.get("kind") in KINDS_OF_UNIT_INPUT for keys in regions):
        norm["sample_levels"] = _sample_levels(config)
    return norm
