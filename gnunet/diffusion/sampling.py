"""Sampling: image i of a checkpoint is a pure function of (checkpoint, sampler settings, seed, i).

All noise of image i, at the start and on the way, is drawn on the host from streams keyed by (seed, i). Its
bits may still depend on the shape of the batch that it is computed in, since libraries choose algorithms by
shape; so batches are always whole. Batch c holds images c * batch_size to (c + 1) * batch_size - 1, and those
of them that were not asked for are computed all the same and thrown away.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from gnunet.diffusion.images import to_uint8
from gnunet.diffusion.process import Predict, Process, call_model
from gnunet.errors import ConfigError
from gnunet.random_streams import Stream, StreamKey

logger = logging.getLogger(__name__)


def sample_images(
    network: nn.Module,
    process: Process,
    *,
    indices: Sequence[int],
    resolution: int,
    channels: int,
    seed: int,
    steps: int,
    batch_size: int,
    sampler: str | None = None,
    guidance: float = 1.0,
    labels: np.ndarray | Sequence[int] | None = None,
    null_label: int | None = None,
    device: torch.device | str = "cpu",
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    progress: Callable[[int], None] | None = None,
    check: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Sample the images with these indices.

    The network runs in eval mode, without gradients; its modes are put back. Images with values that are not
    finite are counted in a warning.

    Args:
        network: called as network(x, timestep, class_labels=labels, return_dict=False)[0].
        process: the one that the network was trained on.
        indices: which images, each 0 or more, in any order.
        resolution: height and width in pixels.
        channels: channels of the images.
        seed: the images' seed.
        steps: sampling steps.
        batch_size: images computed together; an image's bits depend on this and on its index alone.
        sampler: one of process.samplers; None means process.default_sampler.
        guidance: scale of classifier-free guidance (Ho & Salimans, 2022), 1 for none. Otherwise the network
            runs on batches of 2 * batch_size, the second half without labels.
        labels: int64 (len(indices),), each image's class; None for a network without classes.
        null_label: the class that stands for none; needed for guidance.
        device: where the network is.
        autocast: makes the context that the network runs in.
        progress: called after each batch with the number of images it added to the result.
        check: called before each run of the network; what it raises ends the sampling.

    Returns:
        uint8 (len(indices), H, W, C), in the order of `indices`.

    Raises:
        ConfigError: no such sampler, too many steps for it, or guidance without labels and a null label.
    """
    sampler = process.check_sampler(sampler, steps)
    if guidance != 1 and (labels is None or null_label is None):
        raise ConfigError(
            f"sampling.guidance: {guidance} given; valid: 1, since the model was not trained on classes "
            "with a label for none"
        )
    wanted = np.asarray(indices, dtype=np.int64)
    all_labels = None if labels is None else np.asarray(labels, dtype=np.int64)
    starts = Stream(seed, StreamKey.SAMPLE_NOISE)
    result = np.empty((len(wanted), resolution, resolution, channels), dtype=np.uint8)
    broken = 0
    # One algorithm for every process that samples, whatever a trainer has chosen for its own speed.
    with evaluation_mode(network), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        for chunk in np.unique(wanted // batch_size).tolist():
            batch = range(chunk * batch_size, (chunk + 1) * batch_size)
            rows = np.flatnonzero(wanted // batch_size == chunk)
            places = wanted[rows] - batch.start
            shape = (resolution, resolution, channels)
            noise = np.stack([starts.at(i).standard_normal(shape, dtype=np.float32) for i in batch])
            noise = torch.from_numpy(noise).to(device).permute(0, 3, 1, 2)
            classes = None
            if all_labels is not None:
                classes = np.full(batch_size, all_labels[rows[0]])
                classes[places] = all_labels[rows]
                classes = torch.from_numpy(classes).to(device)
            predict = guided(network, classes, null_label, guidance, autocast, check)
            images = process.sample(predict, noise, sampler, steps, step_generators(seed, batch))[places]
            broken += int((~images.isfinite().flatten(1).all(dim=1)).sum())
            result[rows] = to_uint8(images)
            if progress is not None:
                progress(len(rows))
    if broken:
        logger.warning("%d of %d sampled images have values that are not finite", broken, len(wanted))
    return result


def sample_labels(indices: Sequence[int], seed: int, class_counts: Sequence[int]) -> np.ndarray:
    """Draw each image's class with the classes' frequencies; pure in (seed, index).

    Args:
        indices: which images.
        seed: the images' seed.
        class_counts: examples of each class, not all 0.

    Returns:
        int64 (len(indices),); a class without examples is never drawn.
    """
    last = np.cumsum(class_counts)
    draws = Stream(seed, StreamKey.SAMPLE_LABEL)
    picks = [draws.at(i).integers(last[-1]) for i in indices]
    return np.searchsorted(last, picks, side="right").astype(np.int64)


def guided(
    network: nn.Module,
    labels: Tensor | None,
    null_label: int | None,
    guidance: float,
    autocast: Callable[[], AbstractContextManager],
    check: Callable[[], None] = lambda: None,
) -> Predict:
    """The network as a sampler calls it: output without label + guidance * (with label - without)."""

    def plain(x: Tensor, timestep: Tensor) -> Tensor:
        check()
        with autocast():
            return call_model(network, x, timestep, labels)

    def both(x: Tensor, timestep: Tensor) -> Tensor:
        check()
        all_labels = torch.cat([labels, torch.full_like(labels, null_label)])
        with autocast():
            output = call_model(network, torch.cat([x, x]), torch.cat([timestep, timestep]), all_labels)
        conditional, unconditional = output.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    return plain if guidance == 1 else both


def step_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One host generator per image, for the noise that a stochastic sampler adds on its way."""
    seeds = Stream(seed, StreamKey.SAMPLE_STEPS)
    return [torch.Generator().manual_seed(int(seeds.raw(i, 1)[0] >> np.uint64(1))) for i in indices]


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; every module's own mode is put back after."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
