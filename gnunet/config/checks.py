"""Checks of values that are valid one by one and not together.

`problems` looks at a whole tree before anything is built from it. What depends on the machine, such as the
number of processes, is checked when that is known: `accumulation_steps`.
"""

import math
from collections.abc import Iterator, Sequence

from gnunet.config.merge import inline
from gnunet.config.model_kwargs import unet_kwargs
from gnunet.config.norms import KEYS, MAX_NOISE_BINS
from gnunet.config.renamed_keys import RENAMED_KEYS
from gnunet.config.schema import Problem, one_of
from gnunet.config.sections import Config, TrainConfig
from gnunet.errors import ConfigError, first_few


def problems(config: Config) -> list[Problem]:
    """Everything in a tree that does not go together; an empty list means that it can be built."""
    levels = list(_levels(config))
    found = levels or [*_resolution(config), *_attention(config), *_norm(config)]
    found = [*found, *_diffusion(config), *_train(config), *_sampling(config), *_validation(config)]
    return [*found, *_evaluate(config)]


def accumulation_steps(train: TrainConfig, num_processes: int) -> tuple[int, int]:
    """Split the global batch over processes and forward passes.

    Returns:
        The images in one forward pass on one process, and the number of passes in an optimizer step.

    Raises:
        ConfigError: the batch does not split evenly; the message says what would.
    """
    batch, micro = train.batch_size, train.micro_batch_size
    if batch % num_processes:
        raise ConfigError(
            f"train.batch_size: given {batch}, on {num_processes} processes with train.micro_batch_size "
            f"{'null' if micro is None else micro}; valid: a multiple of {num_processes}, for instance "
            f"{_near(batch, num_processes)}; or {one_of(_divisors(batch))} processes"
        )
    share = batch // num_processes
    micro = share if micro is None else micro
    if share % micro:
        raise ConfigError(
            f"train.micro_batch_size: given {micro}, with train.batch_size {batch} on {num_processes} "
            f"processes, {share} images on each; valid: {one_of(_divisors(share))}, or null"
        )
    return micro, share // micro


def cuda_graph_obstacle(config: Config) -> str | None:
    """The setting that keeps a training step from being replayed as CUDA graphs, whatever the machine."""
    if config.train.mixed_precision == "fp16":  # its scale is decided on the host
        return "train.mixed_precision fp16"
    if config.model.gradient_checkpointing:  # it saves the state of random generators on the host
        return "model.gradient_checkpointing true"
    if config.train.compile in ("reduce-overhead", "max-autotune"):  # which have graphs of their own
        return f"train.compile {config.train.compile}"
    return None


def _levels(config: Config) -> Iterator[Problem]:
    model = config.model
    levels = len(model.block_out_channels)
    for name in ("down_block_types", "up_block_types"):
        types = getattr(model, name)
        if len(types) != levels:
            valid = f"{levels} of them, one for each level of model.block_out_channels"
            yield Problem.of(f"model.{name}", f"{len(types)}: {', '.join(types) or 'none'}", valid)


def _resolution(config: Config) -> Iterator[Problem]:
    resolution, levels = config.data.resolution, len(config.model.block_out_channels)
    factor = 2 ** (levels - 1)
    if resolution % factor:
        valid = (
            f"a multiple of {factor}, for instance {_near(resolution, factor)} "
            f"(the {levels} levels of model.block_out_channels halve it {levels - 1} times)"
        )
        yield Problem.of("data.resolution", str(resolution), valid)


def _attention(config: Config) -> Iterator[Problem]:
    model = config.model
    head = model.attention_head_dim
    channels = model.block_out_channels
    blocks = zip([*channels, *reversed(channels)], [*model.down_block_types, *model.up_block_types], strict=True)
    used = {c for c, block in blocks if block.startswith("Attn")}
    if model.mid_block_type and model.add_attention:
        used.add(channels[-1])
    if head is not None and any(c % head for c in used):
        divisors, levels = one_of(_divisors(math.gcd(*used))), " and ".join(str(c) for c in sorted(used))
        valid = f"{divisors}, which divide the {levels} channels under attention; or null"
        yield Problem.of("model.attention_head_dim", str(head), valid)


def _norm(config: Config) -> Iterator[Problem]:
    found = [*_overrides(config), *_groups(config)]
    yield from found
    if found:
        return
    # Imported here because they import diffusers, which a mistyped flag need not wait for.
    from gnunet.models import check_config, norms_without_checkpointing

    arguments = unet_kwargs(config, None)
    if error := check_config(arguments):
        yield Problem("model.norm", f"given {inline(config.model.norm.model_dump())}", error)
    elif config.model.gradient_checkpointing and (sites := norms_without_checkpointing(arguments)):
        valid = f"false with the norms of {first_few(sites)}, whose training forward pass cannot be recomputed"
        yield Problem.of("model.gradient_checkpointing", "true", valid)


def _overrides(config: Config) -> Iterator[Problem]:
    valid = [key for key in KEYS if key != "overrides"]
    for region, keys in config.model.norm.overrides.items():
        for key in keys:
            if key not in valid:
                path = f"model.norm.overrides.{region}.{key}"
                new = RENAMED_KEYS.get(f"model.norm.{key}", "").rpartition(".")[2]
                yield Problem(path, "unknown key", f"renamed to {new}" if new else f"valid keys: {', '.join(valid)}")
        # The model checks a region's keys, but never sees this one.
        bins = keys.get("noise_bins", 1)
        if type(bins) is not int or not 1 <= bins <= MAX_NOISE_BINS:
            given = f"noise_bins {repr(bins)[:100]} in {region}"
            yield Problem.of("model.norm.overrides", given, f"a whole number, at least 1 and at most {MAX_NOISE_BINS}")


def _groups(config: Config) -> Iterator[Problem]:
    norm, own = config.model.norm, config.model.attn_norm_num_groups
    if not hasattr(norm, "channels_per_group"):
        return
    if (norm.groups is None) == (norm.channels_per_group is None):
        given = "null" if norm.groups is None else f"{norm.groups} beside {norm.channels_per_group} channels_per_group"
        valid = "a number for one of model.norm.groups and model.norm.channels_per_group, null for the other"
        yield Problem.of("model.norm.groups", given, valid)
        return
    if norm.overrides:
        return  # the layers do not share one number: the model's own check names the layer
    from gnunet.models import norm_sites

    sites = norm_sites(unet_kwargs(config, None))
    if own is not None:
        middle = [site for site in sites if site[0].startswith("mid_block.attentions.")]
        sites = [site for site in sites if site not in middle]
        yield from _divides("model.attn_norm_num_groups", own, middle)
    name = "groups" if norm.channels_per_group is None else "channels_per_group"
    yield from _divides(f"model.norm.{name}", getattr(norm, name), sites)


def _divides(path: str, number: int, sites: Sequence[tuple[str, int]]) -> Iterator[Problem]:
    """Check that a number divides the channels of all the norm layers, given as (path, channels)."""
    failing: dict[int, list[str]] = {}
    for layer, channels in sites:
        if channels % number:
            failing.setdefault(channels, []).append(layer)
    if failing:
        layers = "; ".join(f"the {channels} channels of {first_few(names)}" for channels, names in failing.items())
        valid = one_of(_divisors(math.gcd(*(channels for _, channels in sites))))
        yield Problem.of(
            path,
            str(number),
            f"{valid}, which divide every layer's channels; {number} does not divide {layers}",
        )


def _diffusion(config: Config) -> Iterator[Problem]:
    diffusion = config.diffusion
    if config.model.time_embedding_type == "fourier" and diffusion.kind != "flow":
        valid = f"positional with diffusion.kind {diffusion.kind} (fourier needs timesteps above 0, as flow has)"
        yield Problem.of("model.time_embedding_type", "fourier", valid)
    if diffusion.kind == "ddpm" and diffusion.beta_schedule == "linear":
        yield from _ascending(diffusion, "diffusion", "beta_start", "beta_end")
    if diffusion.kind == "edm":
        yield from _ascending(diffusion, "diffusion", "sigma_min", "sigma_max")


def _train(config: Config) -> Iterator[Problem]:
    train = config.train
    if train.micro_batch_size is not None and train.batch_size % train.micro_batch_size:
        divisors = one_of(_divisors(train.batch_size))
        valid = f"{divisors}, which divide train.batch_size {train.batch_size}; or null"
        yield Problem.of("train.micro_batch_size", str(train.micro_batch_size), valid)
    if train.lr_schedule == "inverse_sqrt" and train.lr_decay_start is None and train.warmup_images == 0:
        valid = "a whole number, at least 1; or train.warmup_images above 0 (for train.lr_schedule inverse_sqrt)"
        yield Problem.of("train.lr_decay_start", "null", valid)
    if train.cuda_graph is True and (obstacle := cuda_graph_obstacle(config)):
        yield Problem.of("train.cuda_graph", "true", f"auto or false with {obstacle}")


def _sampling(config: Config) -> Iterator[Problem]:
    from gnunet.diffusion import PROCESSES  # imports diffusers, which takes seconds

    sampling, diffusion = config.sampling, config.diffusion
    samplers = PROCESSES[diffusion.kind].samplers
    if sampling.sampler not in (None, *samplers):
        valid = f"{one_of(samplers)} with diffusion.kind {diffusion.kind}, or null"
        yield Problem.of("sampling.sampler", sampling.sampler, valid)
    if diffusion.kind == "ddpm" and sampling.num_inference_steps > diffusion.num_train_timesteps:
        valid = f"at most diffusion.num_train_timesteps {diffusion.num_train_timesteps}"
        yield Problem.of("sampling.num_inference_steps", str(sampling.num_inference_steps), valid)
    if sampling.guidance_scale != 1 and not (config.data.class_conditional and config.data.label_dropout > 0):
        valid = "1; or any with data.class_conditional true and data.label_dropout above 0"
        yield Problem.of("sampling.guidance_scale", f"{sampling.guidance_scale:g}", valid)


def _validation(config: Config) -> Iterator[Problem]:
    validation = config.validation
    yield from _ascending(validation, "validation", "log_snr_min", "log_snr_max")
    if validation.num_examples < validation.num_bins:
        valid = f"at least validation.num_bins {validation.num_bins}, for one example in each bin"
        yield Problem.of("validation.num_examples", str(validation.num_examples), valid)


def _evaluate(config: Config) -> Iterator[Problem]:
    # Imported here because it imports torch; see `_groups`.
    from gnunet.evaluation import EXTRACTORS, get_metrics

    evaluate = config.evaluate
    for name in evaluate.extractors:
        if name in EXTRACTORS or not name.isidentifier():
            valid = f"names of letters, digits and _, other than {one_of(list(EXTRACTORS))}"
            yield Problem.of("evaluate.extractors", name, valid)
    known = [*EXTRACTORS, *evaluate.extractors]
    for name in evaluate.weights:
        if name not in known:
            yield Problem.of("evaluate.weights", name, one_of(known))
    try:
        metrics = get_metrics(evaluate.metrics, known)
    except ConfigError as error:
        yield Problem("evaluate.metrics", f"given {', '.join(evaluate.metrics)}", str(error))
        return
    for metric in metrics:
        if evaluate.num_images < metric.min_images:
            valid = f"at least {metric.min_images}, which {metric.name} needs"
            yield Problem.of("evaluate.num_images", str(evaluate.num_images), valid)
    names = ["validation_loss", *([] if evaluate.every is None else evaluate.metrics)]
    if evaluate.monitor not in (None, *names):
        more = "; or one of evaluate.metrics where evaluate.every is a number" if evaluate.every is None else ""
        yield Problem.of("evaluate.monitor", evaluate.monitor, f"{one_of(names)}, or null{more}")


def _ascending(section: object, path: str, lower: str, upper: str) -> Iterator[Problem]:
    low, high = getattr(section, lower), getattr(section, upper)
    if low >= high:
        yield Problem.of(f"{path}.{lower}", f"{low:g}", f"a number below {path}.{upper} {high:g}")


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _near(number: int, factor: int) -> str:
    """The multiples of a factor on both sides of a number."""
    below = number // factor * factor
    return one_of([n for n in (below, below + factor) if n > 0])
