"""Checks of values that are valid one by one but not together, before anything is built from them."""

import math
from collections.abc import Iterator
from operator import attrgetter

from gnunet.config.merge import raise_all
from gnunet.config.model_kwargs import unet_kwargs
from gnunet.config.schema import ConfigIssue, join_or
from gnunet.config.sections import Config, TrainConfig
from gnunet.config.yaml_io import format_value
from gnunet.diffusion import PROCESSES, make_process
from gnunet.errors import ConfigError, first_few

# gnunet.models and gnunet.evaluation take seconds to import, which an error in a flag and --help need not wait for.


def check_config(config: Config) -> list[ConfigIssue]:
    """All issues of values that do not work together; none if the configuration can be built."""
    checks = (_check_model, _check_diffusion, _check_train, _check_sampling, _check_validation, _check_evaluate)
    return [issue for check in checks for issue in check(config)]


def accumulation_steps(train: TrainConfig, num_processes: int) -> tuple[int, int]:
    """The images per forward pass on one process, and the forward passes per optimizer step.

    Raises:
        ConfigError: the global batch does not split evenly; the message says what would.
    """
    batch, micro = train.batch_size, train.micro_batch_size
    if batch % num_processes:
        raise ConfigError(
            f"train.batch_size: given {batch} on {num_processes} processes; valid: a multiple of {num_processes}, for "
            f"instance {nearest_multiples(batch, num_processes)}; or {join_or(_divisors(batch))} processes"
        )
    share = batch // num_processes
    micro = micro or share
    if share % micro:
        raise ConfigError(
            f"train.micro_batch_size: given {micro} with train.batch_size {batch} on {num_processes} processes, "
            f"{share} images on each; valid: {join_or(_divisors(share))}, or null"
        )
    return micro, share // micro


def cuda_graph_obstacle(config: Config) -> str | None:
    """The setting, if any, with which a training step cannot be replayed as CUDA graphs."""
    if config.train.mixed_precision == "fp16":  # the loss scale is decided on the host
        return "train.mixed_precision fp16"
    if config.model.gradient_checkpointing:  # it saves the state of random generators on the host
        return "model.gradient_checkpointing true"
    if config.train.optimizer != "adamw":  # the others read the learning rate on the host
        return f"train.optimizer {config.train.optimizer}"
    if config.train.compile in ("reduce-overhead", "max-autotune"):  # they capture their own graphs
        return f"train.compile {config.train.compile}"
    return None


def _issue(config: Config, key: str, valid: str, given: str | None = None) -> ConfigIssue:
    """An issue of a key's value, which is shown unless `given` says it otherwise."""
    if given is None:
        value = attrgetter(key)(config)
        given = f"{value:g}" if isinstance(value, float) else format_value(value)
    return ConfigIssue.of(key, given, valid)


def _check_model(config: Config) -> list[ConfigIssue]:
    # Each line needs the checks of those before it to pass.
    return (
        [*_check_levels(config), *_check_norm_groups(config)]
        or [*_check_data(config), *_check_condition(config), *_check_attention(config)]
        # The size of latents is known once the autoencoder is: `check_latents`.
        or ([] if config.data.autoencoder else [*_check_resolution(config)] or [*_check_norm(config)])
    )


def check_latents(config: Config, channels: int, reduction: int) -> None:
    """Raise ConfigError unless the network fits latents of so many channels, smaller than images by `reduction`."""
    issues = [*_check_resolution(config, reduction)]
    if config.model.in_channels != channels:
        valid = f"{channels}, the channels of the latents of data.autoencoder {config.data.autoencoder}"
        issues.append(_issue(config, "model.in_channels", valid))
    issues = issues or [*_check_norm(config, reduction)]
    raise_all((f"{i.key}: {i.message}; {i.hint}" for i in issues), "the configuration")


def _check_levels(config: Config) -> Iterator[ConfigIssue]:
    from gnunet.models.unet import MAX_ENCODER_LAYERS

    levels = len(config.model.block_out_channels)
    for name in ("down_block_types", "up_block_types"):
        types = getattr(config.model, name)
        if len(types) != levels:
            valid = f"{levels} of them, one for each level of model.block_out_channels"
            yield _issue(config, f"model.{name}", valid, f"{len(types)}: {', '.join(types) or 'none'}")
    if config.model.layers_per_block * levels > MAX_ENCODER_LAYERS:
        most = MAX_ENCODER_LAYERS // levels
        valid = f"an integer, above 0 and at most {most} with {levels} levels of model.block_out_channels"
        yield _issue(config, "model.layers_per_block", valid)


def _check_resolution(config: Config, reduction: int = 1) -> Iterator[ConfigIssue]:
    levels = len(config.model.block_out_channels)
    factor = 2 ** (levels - 1) * reduction
    sides = zip(("height", "width"), config.data.size, strict=True)
    if wrong := {name: nearest_multiples(side, factor) for name, side in sides if side % factor}:
        listed = " and ".join(f"{name} {sides}" for name, sides in wrong.items())
        listed = wrong["height"] if isinstance(config.data.resolution, int) else listed
        halvings = f"{levels} levels of model.block_out_channels halve it {levels - 1} times"
        halvings += f" after data.autoencoder divides it by {reduction}" if reduction > 1 else ""
        yield _issue(config, "data.resolution", f"multiples of {factor}, for instance {listed} ({halvings})")


def _check_data(config: Config) -> Iterator[ConfigIssue]:
    channels, is_pictures = config.model.in_channels, config.data.normalization == "pixels"
    if config.data.autoencoder is not None:
        if not is_pictures:
            yield _issue(config, "data.normalization", "pixels with data.autoencoder")
    elif is_pictures and channels not in (1, 3, 4):
        valid = "1, 3 or 4; or any number with data.normalization range or mean_std, or data.autoencoder"
        yield _issue(config, "model.in_channels", valid)
    if config.model.class_embed_type and not config.data.class_conditional:
        yield _issue(config, "model.class_embed_type", "null, or any with data.class_conditional true")
    if not is_pictures and channels not in (1, 3) and config.evaluate.every is not None:
        valid = f"null with arrays of {channels} channels, which metrics do not see; validation_loss is evaluated"
        yield _issue(config, "evaluate.every", valid)
    if config.data.augment and (config.data.autoencoder is not None or config.data.condition is not None):
        yield _issue(config, "data.augment", "0 with data.autoencoder or data.condition")


def _check_condition(config: Config) -> Iterator[ConfigIssue]:
    condition, side, channels = config.data.condition, math.gcd(*config.data.size), config.model.in_channels
    if condition is None:
        return
    if config.data.autoencoder is not None:
        yield _issue(config, "data.condition.kind", "data.condition null with data.autoencoder")
    if condition.kind == "low_resolution" and side % condition.factor:
        valid = f"{join_or(_divisors(side)[1:])}, which divide data.resolution {config.data.resolution}"
        valid = valid if side > 1 else f"none with data.resolution {config.data.resolution}, of no common divisor"
        yield _issue(config, "data.condition.factor", valid)
    if condition.kind == "paired" and (condition.folder is None) == (condition.column is None):
        given = f"folder {condition.folder} and column {condition.column}"
        yield _issue(config, "data.condition", "a folder or a column for kind paired, null for the other", given)
    of_arrays = config.data.normalization != "pixels"
    if (condition.kind == "grey" and (channels < 3 or of_arrays)) or (condition.kind == "paired" and of_arrays):
        valid = f"another with model.in_channels {channels} and data.normalization {config.data.normalization}"
        yield _issue(config, "data.condition.kind", valid)


def _check_attention(config: Config) -> Iterator[ConfigIssue]:
    model, channels = config.model, config.model.block_out_channels
    blocks = zip([*channels, *reversed(channels)], [*model.down_block_types, *model.up_block_types], strict=True)
    used = {width for width, block in blocks if block.startswith("Attn")}
    if model.mid_block_type and model.add_attention:
        used.add(channels[-1])
    head = model.attention_head_dim
    if head is not None and any(width % head for width in used):
        widths = " and ".join(str(width) for width in sorted(used))
        valid = f"{join_or(_divisors(math.gcd(*used)))}, which divide the {widths} channels under attention; or null"
        yield _issue(config, "model.attention_head_dim", valid)


def _check_norm_groups(config: Config) -> Iterator[ConfigIssue]:
    norm = config.model.norm
    if hasattr(norm, "channels_per_group") and (norm.groups is None) == (norm.channels_per_group is None):
        given = "null" if norm.groups is None else f"{norm.groups} and {norm.channels_per_group} channels_per_group"
        valid = "a number for one of model.norm.groups and model.norm.channels_per_group, null for the other"
        yield _issue(config, "model.norm.groups", valid, given)


def _check_norm(config: Config, reduction: int = 1) -> Iterator[ConfigIssue]:
    from gnunet.models import check_config as check_unet_config
    from gnunet.models import norm_sites, norms_without_checkpointing

    model, arguments = config.model, unet_kwargs(config, None, reduction)
    if error := check_unet_config(arguments):
        issues: list[ConfigIssue] = []
        if hasattr(model.norm, "channels_per_group") and not model.norm.overrides:
            # One number for all layers, so that the numbers that are valid for all can be listed.
            name = "groups" if model.norm.channels_per_group is None else "channels_per_group"
            of_attention, others = [], []
            for site in norm_sites(arguments):
                has_own = site[0].startswith("mid_block.attentions.") and model.attn_norm_num_groups is not None
                (of_attention if has_own else others).append(site)
            for key, sites in {f"model.norm.{name}": others, "model.attn_norm_num_groups": of_attention}.items():
                number = attrgetter(key)(config)
                if wrong := [f"{path} ({width} channels)" for path, width in sites if width % (number or width)]:
                    valid = f"{join_or(_divisors(math.gcd(*(width for _, width in sites))))} for all norm layers"
                    issues.append(_issue(config, key, f"{valid}; {number} does not divide {first_few(wrong)}"))
        given = {"kind": model.norm.kind, **model.norm.model_dump(exclude_defaults=True)}
        yield from issues or [ConfigIssue("model.norm", f"given {format_value(given)}", error)]
    elif model.gradient_checkpointing and (norms := norms_without_checkpointing(arguments)):
        valid = f"false with the norms of {first_few(norms)}, whose training forward pass cannot be recomputed"
        yield _issue(config, "model.gradient_checkpointing", valid)


def _check_diffusion(config: Config) -> Iterator[ConfigIssue]:
    diffusion = config.diffusion
    if config.model.time_embedding_type == "fourier" and diffusion.kind != "flow":
        valid = f"positional with diffusion.kind {diffusion.kind} (fourier needs timesteps above 0, as in flow)"
        yield _issue(config, "model.time_embedding_type", valid)
    wrong_order: list[ConfigIssue] = []
    if diffusion.kind == "ddpm" and diffusion.beta_schedule == "linear":
        wrong_order += _check_less_than(config, "diffusion.beta_start", "diffusion.beta_end")
    if diffusion.kind == "edm":
        wrong_order += _check_less_than(config, "diffusion.sigma_min", "diffusion.sigma_max")
    yield from wrong_order
    if not wrong_order and (issue := make_process(**diffusion.model_dump()).untrained_levels()):
        key, given, valid = issue
        yield _issue(config, f"diffusion.{key}", valid, given)


def _check_train(config: Config) -> Iterator[ConfigIssue]:
    train = config.train
    if train.micro_batch_size is not None and train.batch_size % train.micro_batch_size:
        valid = f"{join_or(_divisors(train.batch_size))}, which divide train.batch_size {train.batch_size}; or null"
        yield _issue(config, "train.micro_batch_size", valid)
    if train.lr_schedule == "inverse_sqrt" and train.lr_decay_start is None and train.warmup_images == 0:
        valid = "an integer, at least 1, or train.warmup_images above 0 with train.lr_schedule inverse_sqrt"
        yield _issue(config, "train.lr_decay_start", valid)
    if train.cuda_graph is True and (obstacle := cuda_graph_obstacle(config)):
        yield _issue(config, "train.cuda_graph", f"auto or false with {obstacle}")


def _check_sampling(config: Config) -> Iterator[ConfigIssue]:
    sampling, diffusion, data = config.sampling, config.diffusion, config.data
    samplers = PROCESSES[diffusion.kind].samplers
    if sampling.sampler not in (None, *samplers):
        valid = f"{join_or(samplers)} with diffusion.kind {diffusion.kind}, or null"
        yield _issue(config, "sampling.sampler", valid)
    if diffusion.kind == "ddpm" and sampling.num_inference_steps > diffusion.num_train_timesteps:
        valid = f"at most diffusion.num_train_timesteps {diffusion.num_train_timesteps}"
        yield _issue(config, "sampling.num_inference_steps", valid)
    drops_condition = data.condition is not None and data.condition_dropout > 0
    if sampling.guidance_scale != 1 and not (data.class_conditional and data.label_dropout > 0) and not drops_condition:
        valid = "1; or any with data.class_conditional true and data.label_dropout above 0, or data.condition_dropout"
        yield _issue(config, "sampling.guidance_scale", valid)


def _check_validation(config: Config) -> Iterator[ConfigIssue]:
    yield from _check_less_than(config, "validation.log_snr_min", "validation.log_snr_max")
    if config.validation.num_examples < config.validation.num_bins:
        valid = f"at least validation.num_bins {config.validation.num_bins}, one example for each bin"
        yield _issue(config, "validation.num_examples", valid)


def _check_evaluate(config: Config) -> Iterator[ConfigIssue]:
    from gnunet.evaluation.metrics import EXTRACTORS, get_metrics, too_few_images

    evaluate = config.evaluate
    for name in evaluate.extractors:
        if name in EXTRACTORS or not name.isidentifier():
            valid = f"names of letters, digits and _, other than {join_or(EXTRACTORS)}"
            yield _issue(config, "evaluate.extractors", valid, name)
    known = [*EXTRACTORS, *evaluate.extractors]
    for name in evaluate.weights:
        if name not in known:
            yield _issue(config, "evaluate.weights", join_or(known), name)
    try:
        metrics = get_metrics(evaluate.metrics, known)
    except ConfigError as error:
        yield ConfigIssue("evaluate.metrics", f"given {', '.join(evaluate.metrics)}", str(error))
        return
    if valid := too_few_images(metrics, evaluate.num_images):
        yield _issue(config, "evaluate.num_images", valid)
    names = ["validation_loss", *([] if evaluate.every is None else evaluate.metrics)]
    if evaluate.monitor not in (None, *names):
        more = "; or one of evaluate.metrics if evaluate.every is a number" if evaluate.every is None else ""
        yield _issue(config, "evaluate.monitor", f"{join_or(names)}, or null{more}")


def _check_less_than(config: Config, lower: str, upper: str) -> Iterator[ConfigIssue]:
    low, high = attrgetter(lower, upper)(config)
    if low >= high:
        yield _issue(config, lower, f"a number below {upper} {high:g}")


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def nearest_multiples(number: int, factor: int) -> str:
    """The multiples of a factor below and above a number, as text."""
    below = number // factor * factor
    return join_or(multiple for multiple in (below, below + factor) if multiple > 0)
