"""All keys of the configuration with their types, defaults and help texts (the string below a key or a section).

`Config(...)` validates each value by itself; `load_config` also checks that the values work together.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Predicate
from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, WithJsonSchema

from gnunet.config.data_section import DataConfig, Text
from gnunet.config.kinds import DIFFUSION_SECTIONS, NORM_SECTIONS, AnyDiffusionConfig, AnyNormConfig
from gnunet.config.schema import Section, ValidValues
from gnunet.diffusion import PROCESSES
from gnunet.habits import habits_of

_FalseIsNo = BeforeValidator(lambda value: "no" if value is False else value)  # as YAML reads `no`
# A configuration may be part of an untrusted checkpoint. These bounds, far beyond what can be trained, limit the time
# and memory spent on it before its weights are read.
Width = Annotated[PositiveInt, Field(le=2**16)]
"""Channels of a layer."""
Steps = Annotated[PositiveInt, Field(le=100_000)]
"""Steps of a schedule, each with an entry in its tables."""
Batch = Annotated[PositiveInt, Field(le=2**16)]
"""Images in memory at a time."""
Levels = Annotated[list[Width], Field(min_length=1, max_length=14)]  # 8192 pixels can be halved 13 times
Interval = Annotated[
    list[float], Field(min_length=2, max_length=2, strict=False), Predicate(lambda ends: 0 <= ends[0] < ends[1]),
    WithJsonSchema({"type": "array", "valid": "two numbers, at least 0, the lower first"}),
]  # fmt: skip
Files = Annotated[dict[str, Text], ValidValues("a mapping from extractors to files, such as {inception: FILE}")]


class ModelConfig(Section):
    """The U-Net, in the names of diffusers' UNet2DModel."""

    in_channels: PositiveInt = Field(3, le=4096)
    """Channels of the images: 1 is grayscale, 3 is RGB, 4 is RGB with transparency, which the others show on white. Any
    number of channels of arrays, with data.normalization range or mean_std; those of latents, with data.autoencoder."""
    block_out_channels: Levels = [128, 256, 256, 256]
    """Channels of each level, from the highest resolution to the lowest."""
    layers_per_block: PositiveInt = Field(2, le=64)
    """Residual blocks per encoder level; a decoder level has one more."""
    down_block_types: list[Literal["DownBlock2D", "AttnDownBlock2D"]] = [
        "DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"
    ]  # fmt: skip
    """Type of each encoder level; Attn types have self-attention after each residual block."""
    up_block_types: list[Literal["UpBlock2D", "AttnUpBlock2D"]] = [
        "UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"
    ]  # fmt: skip
    """Type of each decoder level, from the lowest resolution to the highest."""
    mid_block_type: Literal["UNetMidBlock2D"] | None = "UNetMidBlock2D"
    """Block between encoder and decoder; null is none."""
    mid_block_scale_factor: float = Field(1.0, ge=1e-6, le=1e6)
    """Divisor of the residual sums in the middle block."""
    add_attention: bool = True
    """Self-attention in the middle block."""
    attention_head_dim: Width | None = 8
    """Channels per attention head; null is a single head."""
    attn_norm_num_groups: Width | None = None
    """Groups of the norm before the middle block's attention, if not norm.groups."""
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    """How the time embedding enters a residual block: added before its second norm, or as scale and shift after it."""
    downsample_type: Literal["conv", "resnet"] = "conv"
    """Downsample with a strided convolution or in a residual block."""
    upsample_type: Literal["conv", "resnet"] = "conv"
    """Upsample before a convolution or in a residual block."""
    downsample_padding: Literal[0, 1] = 1
    """Padding of the strided convolution; 0 pads only right and bottom, as the original DDPM."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability before the second convolution of each residual block."""
    time_embedding_type: Literal["positional", "fourier"] = "positional"
    """Sinusoidal embedding of the noise level, or random Fourier features."""
    time_embedding_dim: Width | None = None
    """Width of the time embedding; null is four times the channels of the first level."""
    freq_shift: NonNegativeInt = Field(0, le=2**16)
    """Frequency shift of the sinusoidal embedding (1 in DDPM's original)."""
    flip_sin_to_cos: bool = True
    """Cosines before sines in the sinusoidal embedding."""
    class_embed_type: Literal["timestep", "identity"] | None = None
    """How labels enter, with data.class_conditional: null embeds classes; timestep a number, whose range in training is
    0..1000, as timesteps are; identity adds a vector of the time embedding's width to it."""
    norm: AnyNormConfig = NORM_SECTIONS["group"]()
    """The normalization of every layer."""
    activation_checkpointing: Literal["none", "norm"] = "none"
    """Activations that are recomputed in the backward pass: `norm` recomputes the outputs of norms and skip
    connections, about half of the activation memory, for a few percent more time; results are identical."""
    gradient_checkpointing: bool = False
    """Recompute all activations of each block in the backward pass: less memory, about a third more time."""


class TrainConfig(Section):
    """Optimization, EMA, precision, and when things are written. Lengths and intervals are in images seen."""

    total_images: PositiveInt = Field(1_000_000, le=10**15)
    """Length of the run, which may be raised later; the last batch may exceed it."""
    batch_size: PositiveInt = Field(128, le=2**20)
    """Global batch size: images per optimizer step, over all processes and accumulation steps."""
    micro_batch_size: Batch | None = None
    """Images per forward pass on one device; null is batch_size / processes, without gradient accumulation."""
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """AdamW, also with 8-bit state (extra gnunet[optimizers]), or Muon (Jordan et al., 2024) for convolutions
    and linear layers inside the network and AdamW for the rest; its updates have the size of AdamW's. Not with FSDP."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of AdamW's first moment."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of AdamW's second moment."""
    adam_eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    warmup_images: NonNegativeInt = 0
    """Images over which the learning rate rises linearly to its peak."""
    lr_schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "constant"
    """Learning rate after the warmup: constant, linear or cosine to zero at total_images, or proportional to
    1 / sqrt(images) from lr_decay_start on (Karras et al., 2024)."""
    lr_decay_start: PositiveInt | None = None
    """Images at which the inverse_sqrt decay starts; null is warmup_images."""
    init_from: Text | None = None
    """Start from the weights of a run, a checkpoint, a diffusers folder or a model of the Hugging Face hub, as far as
    they fit. `model`, `diffusion` and data.resolution are that model's instead of those of earlier files; keys beside
    init_from, in later files and in flags take precedence. A run that has begun does not read it again."""
    init_weights: Literal["ema", "raw"] = "ema"
    """Which weights of init_from: the EMA weights, or those that were being trained."""
    loss_weighting: Literal["process", "learned"] = "process"
    """Weight of each noise level in the loss: the process's own, or that divided by the loss that is expected there,
    which is learned besides (Karras et al., 2024)."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Clip gradients to this global norm; null is off."""
    ema_kind: Literal["power", "half_life"] = "half_life"
    """EMA of the weights: power function (Karras et al., 2024) or exponential with a half-life."""
    ema_std: float = Field(0.1, gt=0, le=0.28)
    """Relative width of the power-function EMA, as a share of the run so far."""
    ema_half_life: PositiveInt = 500_000
    """Half-life of the exponential EMA in images."""
    ema_rampup: float | None = Field(0.05, gt=0)
    """Upper limit of the half-life as a share of the images seen so far (EMA warmup); null is off."""
    ema_snapshot_every: NonNegativeInt | None = None
    """Images between snapshots, of which `gnunet ema` makes an EMA of any width; 0 is only at the end, null is never.
    Bytes a parameter: 8 more in device memory and checkpoints, 4 a snapshot; all are kept."""
    bn_update_batches: NonNegativeInt = Field(0, le=2**20)
    """Training batches from which the EMA weights' running statistics are re-estimated whenever the EMA weights are
    used or written; 0 averages the running statistics like the weights. Only for norms with running statistics."""
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], _FalseIsNo] = "no"
    """Precision of the network; loss, noise, norm statistics, EMA and optimizer stay in fp32."""
    compile: Annotated[
        bool | Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"],
        ValidValues("true, false, default, reduce-overhead, max-autotune or max-autotune-no-cudagraphs"),
    ] = False
    """Compile the U-Net with torch.compile, optionally in one of inductor's modes."""
    cuda_graph: Annotated[bool | Literal["auto"], ValidValues("auto, true or false")] = "auto"
    """Replay the training step as CUDA graphs: faster for small networks and batches, identical results, but a step's
    memory stays reserved. auto: on CUDA with one process or DDP, unless the step cannot be captured. Not with fp16,
    gradient_checkpointing, FSDP, sync_batch on several processes, compile reduce-overhead or max-autotune, or another
    optimizer than adamw."""
    deterministic: bool = False
    """Use deterministic algorithms on GPUs; CPU runs are deterministic without it."""
    log_every: PositiveInt = 10_000
    """Images between log lines in metrics.jsonl."""
    validate_every: NonNegativeInt = 100_000
    """Images between validation losses; 0 is only at the end."""
    sample_every: NonNegativeInt = 100_000
    """Images between sample grids; 0 is only at the end."""
    checkpoint_every: NonNegativeInt = 100_000
    """Images between checkpoints; 0 is only at the end."""
    keep_checkpoints: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    max_nonfinite_steps: PositiveInt = 10
    """Consecutive steps with a non-finite loss or gradient, which are skipped, after which the run stops."""
    timeout: PositiveInt = Field(600, le=10**9)
    """Timeout of collectives in seconds, after which the other processes of a dead or hanging one stop. It must exceed
    the longest work of a single process, such as writing a checkpoint."""
    trackers: list[Text] = []
    """Accelerate's trackers to log to in addition to metrics.jsonl, such as tensorboard or wandb."""


class ValidationConfig(Section):
    """The validation loss, on a fixed set of images, noise and noise levels."""

    num_examples: PositiveInt = Field(256, le=1_000_000)
    """Size of the validation set; if there are fewer images, they repeat with different noise."""
    num_bins: Steps = 16
    """Equal bins of log-SNR over which the examples are distributed."""
    log_snr_min: float = -8.0
    """Lower edge of the first bin."""
    log_snr_max: float = 8.0
    """Upper edge of the last bin."""
    draw: NonNegativeInt = Field(0, le=2**64 - 1)
    """Which draw of noise, noise levels and masks; settings that are chosen on one are reported on another."""
    batch_size: Batch = 64
    """Images per forward pass."""

    @property
    def bin_edges(self) -> list[float]:
        """The ends of the bins of log-SNR, one more than there are bins."""
        return np.linspace(self.log_snr_min, self.log_snr_max, self.num_bins + 1).tolist()


class SamplingConfig(Section):
    """The sample grids drawn in training, and the defaults of gnunet sample."""

    sampler: Literal["ddpm", "ddim", "dpm++", "euler", "heun"] | None = None
    """Sampler; null is ddim for ddpm, heun for edm, euler for flow."""
    num_inference_steps: Steps = 50
    """Number of sampling steps."""
    guidance_scale: float = Field(1.0, ge=0, le=1000)
    """Scale of classifier-free guidance, or of autoguidance with gnunet sample --guide; 1 is off."""
    guidance_interval: Interval | None = None
    """Lowest and highest noise level, as sigma / alpha, with guidance (Kynkäänniemi et al., 2024); null is all."""
    num_images: Batch = 16
    """Images in a grid."""
    batch_size: Batch = 16
    """Images sampled at a time; an image's bits depend only on this and its index."""


class EvaluateConfig(Section):
    """Metrics of the EMA weights' samples, the best checkpoint by one of them, and the defaults of gnunet evaluate."""

    every: NonNegativeInt | None = None
    """Images between evaluations; 0 is only at the end, null is never."""
    num_images: PositiveInt = Field(1024, le=2**24)
    """Samples per evaluation. Distances from different numbers of samples are not comparable."""
    metrics: list[Text] = Field(["kid_efficientnet_lite0", "fd_efficientnet_lite0"], min_length=1)
    """Metrics: fid, kid, and fd_, kid_, precision_ and recall_ followed by the name of an extractor (inception,
    dinov2, efficientnet_lite0, or one of evaluate.extractors)."""
    monitor: Text | None = None
    """Metric, or validation_loss, whose best checkpoint is also kept, and named in checkpoints/best."""
    weights: Files = {}
    """Weight files of extractors, if not at their usual location."""
    extractors: Files = {}
    """Custom extractors by name: a TorchScript file, or package.module:Class. Both execute code."""


class Config(Section):
    """The configuration of a run."""

    hints: ClassVar[dict[str, str]] = habits_of("train")

    seed: NonNegativeInt = Field(0, le=2**64 - 1)
    """Seed of the initial weights, of every example's augmentation and noise, and of the sampled images."""
    run_dir: Text = "runs/default"
    """Folder of the run; running the same command again resumes from it."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    diffusion: AnyDiffusionConfig = DIFFUSION_SECTIONS["ddpm"]()
    """The diffusion process."""
    train: TrainConfig = TrainConfig()
    validation: ValidationConfig = ValidationConfig()
    sampling: SamplingConfig = SamplingConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @classmethod
    def drop_overridden(cls, earlier: dict[str, Any], later: Mapping[str, Any]) -> None:
        # A sampler is one of the process's, and guidance needs labels or a condition.
        sampling, diffusion, data = earlier.get("sampling"), later.get("diffusion"), later.get("data")
        if not isinstance(sampling, dict):
            return
        process = PROCESSES.get(str(diffusion.get("kind"))) if isinstance(diffusion, Mapping) else None
        if process and sampling.get("sampler") not in process.samplers:
            sampling.pop("sampler", None)
        dropout = {**(earlier.get("data") or {}), **(data or {})}.get("condition_dropout")
        if isinstance(data, Mapping) and data.get("class_conditional") is False and not dropout:
            sampling.pop("guidance_scale", None)
