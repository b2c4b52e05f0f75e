"""The whole configuration tree: typed, validated, one place for every default.

Each section is a frozen pydantic model; the string under a key is its help text. What does not go together is found
where a tree is loaded, by `load_config`; `Config(...)` by itself does not look for it.
All lengths of training are counted in images seen, never in steps.
"""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from gnunet.config.norms import SECTIONS, AnyNormConfig
from gnunet.config.schema import Path, Section, ValidValues


def _whole(value: Any) -> Any:
    """Let a float that is a whole number stand for it, so that `total_images: 1e6` means what it says."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _no(value: Any) -> Any:
    """Undo YAML, which reads the word `no` as false."""
    return "no" if value is False else value


Count = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Positive = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]

# A configuration may come with a stranger's checkpoint. These bounds lie far beyond what trains; without them a few
# digits would make the loader compute or allocate without end before a weight is read.
Width = Annotated[Positive, Field(le=2**16)]
"""Channels of a layer."""
Steps = Annotated[Positive, Field(le=100_000)]
"""Steps of a schedule: each has an entry in its tables."""
Batch = Annotated[Positive, Field(le=2**16)]
"""Images that are held in memory together."""
Levels = Annotated[
    list[Width],
    Field(min_length=1, max_length=14),  # 8192 pixels halve 13 times
    ValidValues("a list of one or more whole numbers, each at least 1 and at most 65536; 14 of them at most"),
]
Subset = Annotated[
    dict[str, str | int | bool | list[str | int | bool]],
    ValidValues("a mapping from columns to a value or a list of values, such as {column: [value, value]}"),
]
Files = Annotated[dict[str, Text], ValidValues("a mapping from extractors to files, such as {inception: FILE}")]


class DataConfig(Section):
    """Where the images come from and how they are prepared."""

    source: Text = "noto_emoji"
    """`noto_emoji` (embedded), a folder of images (class subfolders give labels), a folder of idx files
    (MNIST's format), a local .parquet or .arrow file or folder of them, or a Hugging Face hub name."""
    split: Text = "train"
    """Split to take where the source has several."""
    image_column: Text | None = None
    """Column that holds the images; null finds it (`image`, `img`, ...)."""
    label_column: Text | None = None
    """Column that holds the class labels; null finds it (`label`, `labels`, `fine_label`, ...)."""
    subset: Subset = {}
    """Keep only the rows whose column has one of the given values, as `{column: [value, ...]}`."""
    resolution: Positive = Field(32, le=8192)
    """Height and width in pixels: antialiased resize of the shorter side, then centre crop."""
    flip: bool = True
    """Mirror each example left to right with probability one half."""
    class_conditional: bool = False
    """Train on the class labels."""
    label_dropout: float = Field(0.1, ge=0, lt=1)
    """Probability with which an example's label is dropped, for classifier-free guidance; 0 makes guidance
    impossible. Used only with class_conditional."""
    validation_images: Count = 0
    """Images held out of training for the validation loss; 0 validates on training images."""
    on_error: Literal["raise", "skip"] = "raise"
    """What a broken image does: raise an error before training with the file's name, or be left out and counted."""
    num_workers: Count = 2
    """Loader processes on each rank; 0 loads in the training process."""
    cache_dir: Text | None = None
    """Folder of the decoded uint8 cache; null means GNUNET_CACHE, or gnunet in the user's cache folder."""


class ModelConfig(Section):
    """The U-Net, in the names of diffusers' UNet2DModel."""

    hints: ClassVar[dict[str, str]] = {
        "norm_num_groups": "model.norm.groups",
        "norm_eps": "model.norm.eps",
        "sample_size": "data.resolution",
        "out_channels": "model.in_channels, which both ends share",
        "num_class_embeds": "data.class_conditional, which takes the number of classes from the data",
    }

    in_channels: Literal[1, 3] = 3
    """Channels of the images: 1 is grey, 3 is RGB."""
    block_out_channels: Levels = [128, 256, 256, 256]
    """Channels of each level, from full resolution down."""
    layers_per_block: Positive = Field(2, le=64)
    """Residual blocks at each level of the encoder; the decoder has one more."""
    down_block_types: list[Literal["DownBlock2D", "AttnDownBlock2D"]] = [
        "DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"
    ]  # fmt: skip
    """Encoder level types; the Attn kinds have self-attention after each residual block."""
    up_block_types: list[Literal["UpBlock2D", "AttnUpBlock2D"]] = [
        "UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"
    ]  # fmt: skip
    """Decoder level types, from the lowest resolution up."""
    mid_block_type: Literal["UNetMidBlock2D"] | None = "UNetMidBlock2D"
    """Block between encoder and decoder; null leaves it out."""
    mid_block_scale_factor: float = Field(1.0, gt=0)
    """The middle block's residual sums are divided by this."""
    add_attention: bool = True
    """Self-attention in the middle block."""
    attention_head_dim: Width | None = 8
    """Channels of each attention head; null means one head."""
    attn_norm_num_groups: Width | None = None
    """Groups of the middle block's attention norm where they differ from norm.groups."""
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    """How a residual block takes the time embedding: added before its second norm, or as scale and shift."""
    downsample_type: Literal["conv", "resnet"] = "conv"
    """Downsampling by a strided convolution or inside a residual block."""
    upsample_type: Literal["conv", "resnet"] = "conv"
    """Upsampling followed by a convolution or inside a residual block."""
    downsample_padding: Literal[0, 1] = 1
    """Padding of the strided convolution; 0 pads right and bottom only, as DDPM's original."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability before each residual block's second convolution."""
    time_embedding_type: Literal["positional", "fourier"] = "positional"
    """Sinusoidal embedding of the noise level, or random Fourier features."""
    time_embedding_dim: Width | None = None
    """Width of the time embedding; null means four times the first level's channels."""
    freq_shift: Count = Field(0, le=2**16)
    """Frequency shift of the sinusoidal embedding (1 in DDPM's original)."""
    flip_sin_to_cos: bool = True
    """Cosines before sines in the sinusoidal embedding."""
    norm: AnyNormConfig = SECTIONS["group"]()
    """The normalization of every layer."""
    activation_checkpointing: Literal["none", "norm"] = "none"
    """What backward makes again instead of keeping it: `norm` is what norms and skip connections give to
    convolutions and attention, about half of all that is kept, for a few percent more time; the same numbers."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in backward: less memory, about a third more time."""


class DDPMConfig(Section):
    """Discrete-time diffusion (Ho et al., 2020; Nichol & Dhariwal, 2021)."""

    kind: Literal["ddpm"] = "ddpm"
    """The process: ddpm, edm or flow."""
    num_train_timesteps: Steps = 1000
    """Number of noise levels."""
    beta_schedule: Literal["linear", "cosine"] = "linear"
    """How the noise grows with the timestep."""
    beta_start: float = Field(1e-4, gt=0, lt=1)
    """First beta of the linear schedule."""
    beta_end: float = Field(0.02, gt=0, lt=1)
    """Last beta of the linear schedule."""
    prediction_type: Literal["epsilon", "v", "sample"] = "epsilon"
    """What the network predicts: the noise, the velocity (Salimans & Ho, 2022) or the image."""
    min_snr_gamma: float | None = Field(None, gt=0)
    """Clamp of the signal-to-noise ratio in the loss weight (Hang et al., 2023), usually 5; null is off."""


class EDMConfig(Section):
    """The preconditioned process of Karras et al. (2022)."""

    kind: Literal["edm"] = "edm"
    """The process: ddpm, edm or flow."""
    p_mean: float = -1.2
    """Mean of log sigma in training."""
    p_std: float = Field(1.2, gt=0)
    """Standard deviation of log sigma in training."""
    sigma_data: float = Field(0.5, gt=0)
    """Standard deviation of the images, whose values lie in [-1, 1]."""
    sigma_min: float = Field(0.002, gt=0)
    """Lowest noise level in sampling."""
    sigma_max: float = Field(80.0, gt=0)
    """Highest noise level in sampling."""
    rho: float = Field(7.0, gt=0)
    """Curvature of the sampling schedule."""


class FlowConfig(Section):
    """Rectified flow (Liu et al., 2022), with the time distributions of Esser et al. (2024)."""

    kind: Literal["flow"] = "flow"
    """The process: ddpm, edm or flow."""
    t_distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    """Distribution of the time t in training; t = 1 is pure noise."""
    t_mean: float = 0.0
    """Mean of logit t (logit_normal)."""
    t_std: float = Field(1.0, gt=0)
    """Standard deviation of logit t (logit_normal)."""
    shift: float = Field(1.0, gt=0)
    """Shift of the sampling times towards noise, for large images."""


class TrainConfig(Section):
    """Optimization, averaging, and when things are written. Counts are images seen."""

    hints: ClassVar[dict[str, str]] = {
        "lr": "train.learning_rate",
        "epochs": "train.total_images, the number of images seen",
        "max_steps": "train.total_images, the number of images seen",
        "gradient_accumulation_steps": "train.micro_batch_size; accumulation follows from it",
    }

    total_images: Positive = 1_000_000
    """Length of the run; the last batch is the first that reaches it."""
    batch_size: Positive = 128
    """Global batch: images in one optimizer step, over all processes and accumulation."""
    micro_batch_size: Positive | None = None
    """Images in one forward pass on one device; null means batch_size / processes."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of AdamW's first moment."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of AdamW's second moment."""
    adam_eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    warmup_images: Count = 0
    """Images over which the learning rate rises linearly to its peak."""
    lr_schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "constant"
    """Learning rate after the warm-up: constant, linear or cosine to zero at train.total_images, or
    1 / sqrt(images) from lr_decay_start on (Karras et al., 2024)."""
    lr_decay_start: Positive | None = None
    """Images at which the inverse_sqrt decay starts; null means warmup_images."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm; null is off."""
    ema_kind: Literal["power", "half_life"] = "half_life"
    """Average of the weights: power function (Karras et al., 2024) or exponential with a half-life."""
    ema_std: float = Field(0.1, gt=0, le=0.28)
    """Width of the power-function average, as a share of the run so far."""
    ema_half_life: Positive = 500_000
    """Images after which a weight's share in the exponential average has halved."""
    ema_rampup: float | None = Field(0.05, gt=0)
    """The half-life is at most this share of the images seen so far (warm-up); null is off."""
    bn_update_batches: Count = 0
    """Training batches from which running statistics of the averaged weights are estimated anew whenever these are
    used or written; 0 averages the running statistics as the weights. Only for norms that have any."""
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(_no)] = "no"
    """Type of the network's arithmetic; loss, noise, statistics, averages and optimizer stay fp32."""
    compile: Annotated[
        bool | Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"],
        ValidValues("true, false, default, reduce-overhead, max-autotune or max-autotune-no-cudagraphs"),
    ] = False
    """torch.compile the U-Net in one of inductor's modes; true is default."""
    cuda_graph: Annotated[bool | Literal["auto"], ValidValues("auto, true or false")] = "auto"
    """Replay the training step as CUDA graphs, so that a GPU does not wait for Python where networks and batches are
    small: the same numbers, and a step's memory is kept for it. auto: on CUDA, by one process or DDP, unless the step
    cannot be captured; not with fp16, gradient_checkpointing, FSDP, sync_batch norms over several processes,
    or train.compile reduce-overhead and max-autotune."""
    deterministic: bool = False
    """Ask torch for deterministic algorithms (a CPU run is deterministic without it)."""
    log_every: Positive = 10_000
    """Images between lines in metrics.jsonl."""
    validate_every: Count = 100_000
    """Images between validation losses; 0 only at the end."""
    sample_every: Count = 100_000
    """Images between grids of samples; 0 only at the end."""
    checkpoint_every: Count = 100_000
    """Images between checkpoints; 0 only at the end."""
    keep_checkpoints: Positive = 2
    """How many of the newest checkpoints are kept."""
    max_nonfinite_steps: Positive = 10
    """Steps in a row with a non-finite loss or gradient after which the run stops; each is skipped."""
    timeout: Positive = 600
    """Seconds after which processes that wait for one that has died or hangs give up. Longer than the longest thing
    that one process does alone, such as writing a checkpoint."""
    trackers: list[Text] = []
    """Accelerate's trackers to log to beside metrics.jsonl, for instance tensorboard or wandb."""


class ValidationConfig(Section):
    """The validation loss: a fixed set of images, noise and noise levels."""

    num_examples: Positive = 256
    """Size of the validation set; the images repeat where there are fewer, with other noise."""
    num_bins: Steps = 16
    """Equal bins of log-SNR over which the validation set is spread."""
    log_snr_min: float = -8.0
    """Lower end of the first bin."""
    log_snr_max: float = 8.0
    """Upper end of the last bin."""
    batch_size: Batch = 64
    """Images in one forward pass."""


class SamplingConfig(Section):
    """The grids drawn in training, and the defaults of scripts/sample.py."""

    sampler: Literal["ddpm", "ddim", "dpm++", "euler", "heun"] | None = None
    """Sampler; null means ddim for ddpm, heun for edm, euler for flow."""
    num_inference_steps: Steps = 50
    """Sampling steps."""
    guidance_scale: float = Field(1.0, ge=0)
    """Classifier-free guidance scale; 1 is off."""
    num_images: Batch = 16
    """Images in a grid."""
    batch_size: Batch = 16
    """Images sampled together; an image's bits depend on this and on its index alone."""


class EvaluateConfig(Section):
    """Distances between samples of the averaged weights and the training images, and the best checkpoint by one."""

    every: Count | None = None
    """Images between evaluations; 0 only at the end, null never."""
    num_images: Positive = 1024
    """Samples in an evaluation. Distances at different numbers cannot be compared."""
    metrics: list[Text] = Field(["kid_efficientnet_lite0", "fd_efficientnet_lite0"], min_length=1)
    """What is measured: fid, kid, and fd_, kid_, precision_ and recall_ with an extractor's name behind
    (inception, dinov2, efficientnet_lite0, or one of evaluate.extractors)."""
    monitor: Text | None = None
    """Metric, or validation_loss, whose best checkpoint is kept beside the newest ones and named by
    checkpoints/best."""
    weights: Files = {}
    """Files of extractors' weights that are not in their own place, as `{extractor: FILE}`."""
    extractors: Files = {}
    """Your own extractors, as `{name: SOURCE}`: a TorchScript file, or package.module:Class. Both run code."""


class Config(Section):
    """Everything a run is made from."""

    seed: Count = Field(0, le=2**64 - 1)
    """Seed of the weights, of every example's draws, and of the sampled images."""
    run_dir: Text = "runs/default"
    """Folder of the run; running the same command again resumes it."""
    data: DataConfig = DataConfig()
    """Where the images come from and how they are prepared."""
    model: ModelConfig = ModelConfig()
    """The U-Net, in the names of diffusers' UNet2DModel."""
    diffusion: Annotated[DDPMConfig | EDMConfig | FlowConfig, Field(discriminator="kind")] = DDPMConfig()
    """The diffusion process."""
    train: TrainConfig = TrainConfig()
    """Optimization, averaging, and when things are written."""
    validation: ValidationConfig = ValidationConfig()
    """The validation loss."""
    sampling: SamplingConfig = SamplingConfig()
    """Sampling in training."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation in training, and the defaults of scripts/evaluate.py."""

    @classmethod
    def keys_to_reset(cls, earlier: dict[str, Any], later: dict[str, Any]) -> Iterator[Path]:
        """Forget an earlier file's sampler or guidance where a later layer's process or data lacks it."""
        sampling = earlier.get("sampling")
        if not isinstance(sampling, dict):
            return
        diffusion, data = (later.get(name) or {} for name in ("diffusion", "data"))
        if isinstance(diffusion, dict) and sampling.get("sampler") and diffusion.get("kind"):
            from gnunet.diffusion import PROCESSES  # imports diffusers, which takes seconds

            process = PROCESSES.get(str(diffusion["kind"]))
            if process and sampling["sampler"] not in process.samplers:
                yield ("sampling", "sampler")
        if isinstance(data, dict) and data.get("class_conditional") is False and "guidance_scale" in sampling:
            yield ("sampling", "guidance_scale")
