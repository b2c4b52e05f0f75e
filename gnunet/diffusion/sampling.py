"""Sampling, and inpainting by RePaint: image i of a checkpoint is a pure function of (checkpoint, settings, seed, i).

All noise of image i, initial and per step, is drawn on the host from streams keyed by (seed, i). Its bits may
still depend on the shape of the batch that it is computed in, since libraries choose algorithms by shape; so
batches always have the same size. Batch c holds images c * batch_size to (c + 1) * batch_size - 1; those among
them that are not in `indices` are computed and discarded.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from gnunet.diffusion.process import ModelFn, NoiseLevel, Process, call_model
from gnunet.errors import ConfigError
from gnunet.random_streams import Stream, StreamKey
from gnunet.scaling import PICTURES, Scaling

logger = logging.getLogger(__name__)

ROUNDING = 1e-5  # relative error of the noise level that a network's timestep says, which is fp32


@dataclass(frozen=True)
class ImageSampler:
    """A network and how images are sampled from it; settings as the keys of the config's `sampling`."""

    network: nn.Module  # called as network(x, timestep, class_labels=labels, return_dict=False)[0]
    process: Process
    size: tuple[int, int]  # of what is sampled, as channels: images, or latents, of which `decode` makes images
    channels: int
    seed: int
    num_inference_steps: int
    batch_size: int  # images per batch; an image's bits depend on this and on its own index alone
    sampler: str | None = None  # one of process.samplers; None means the first
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance (Ho & Salimans, 2022) or, with a guide, autoguidance. With other values than 1
    and no guide the network runs on batches of 2 * batch_size, the second half with null_label and, if
    can_drop_condition, zeros."""
    guidance_interval: Sequence[float] | None = None
    """Lowest and highest sigma / alpha with guidance (Kynkäänniemi et al., 2024); None is all."""
    guide: nn.Module | None = None
    """A weaker network, in eval mode, whose output stands for the one without labels (Karras et al., 2024)."""
    null_label: float | None = None
    """A dropped label, or each number of it; guidance needs it, a condition that training has dropped, or a guide."""
    can_drop_condition: bool = False
    num_estimates: int | None = None  # of steps of which `sample` also returns the estimates of x0
    jumps: Mapping[str, int] = field(default_factory=dict)  # jump_length and resample of `repaint`
    scaling: Scaling = PICTURES  # of the data, by which images become its values
    decode: Callable[[Tensor], Tensor] | None = None  # latents to images in [-1, 1]
    device: torch.device | str = "cpu"
    autocast: Callable[[], AbstractContextManager] = nullcontext
    check: Callable[[], None] = lambda: None  # called before each forward pass; what it raises ends the sampling

    def sample(
        self, indices: Sequence[int], labels: np.ndarray | Sequence[int] | None = None,
        condition: Tensor | None = None, known: Tensor | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Sample the images with the given indices, (len(indices), H, W, C), uint8 or of the data's own dtype.

        With num_estimates, (len(indices), n, H, W, C): the network's estimates at so many steps, or all if there are
        fewer, evenly spaced from the first; the last is the image.

        The network runs in eval mode, without gradients; its modes are restored. A warning counts the images with
        values that are not finite.

        Args:
            indices: at least one, each 0 or more, in any order.
            labels: each image's, int64 (len(indices),), or float32, also (len(indices), D); None for a network without.
            condition: fp32 (len(indices), channels, H, W), what is concatenated to the network's input, or None.
            known: fp32 (len(indices), C + 1, H, W) from which `repaint` samples in place of the sampler, or None.

        Raises:
            ConfigError: no such sampler, too many steps for it, or guidance without labels and a null label.
        """
        steps = self.num_inference_steps
        sampler = self.process.resolve_sampler(self.sampler, steps)
        can_drop = self.can_drop_condition or (labels is not None and self.null_label is not None)
        if self.guidance_scale != 1 and self.guide is None and not can_drop:
            valid = "1, or any with a guide, since the model was not trained with dropped labels or conditions"
            raise ConfigError(f"sampling.guidance_scale: {self.guidance_scale} given; valid: {valid}")
        requested = np.asarray(indices, dtype=np.int64)
        initial_noise = Stream(self.seed, StreamKey.SAMPLE_NOISE)
        shape = (*self.size, self.channels)
        shown = np.unique(np.linspace(0, steps - 1, self.num_estimates or 1).round())[:-1].tolist()  # before the image
        result: dict[int, np.ndarray] = {}
        num_nonfinite = 0
        # The same algorithms in every process that samples, whatever a trainer has chosen for its own speed.
        with eval_mode(self.network), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            for number in np.unique(requested // self.batch_size).tolist():
                batch = range(number * self.batch_size, (number + 1) * self.batch_size)
                rows = np.flatnonzero(requested // self.batch_size == number)  # of labels, condition and known
                positions = requested[rows] - batch.start  # in the batch
                noise = np.stack([initial_noise.at(i).standard_normal(shape, dtype=np.float32) for i in batch])
                x = torch.from_numpy(noise).to(self.device).permute(0, 3, 1, 2)
                filled = np.full(self.batch_size, rows[0])
                filled[positions] = rows
                classes, seen, kept = (
                    None if each is None else torch.as_tensor(each)[filled].to(self.device)
                    for each in (labels, condition, known)
                )
                model_fn, generators = self.model_fn(classes, seen), step_generators(self.seed, batch)
                estimates: dict[int, Tensor] = {}
                if shown:
                    model_fn = recording(self.process, model_fn, shown, estimates)
                if kept is None:
                    images = self.process.sample(model_fn, x, sampler, steps, generators)
                else:
                    images = repaint(self.process, model_fn, x, kept, generators, steps=steps, **self.jumps)
                pictures = []
                for each in (*estimates.values(), images):
                    images = (each if self.decode is None else self.decode(each))[positions]
                    pictures.append(self.scaling.from_network(images))
                num_nonfinite += int((~images.isfinite().flatten(1).all(dim=1)).sum())
                made = pictures[-1] if self.num_estimates is None else np.stack(pictures, axis=1)
                result.update(zip(requested[rows].tolist(), made, strict=True))
        if num_nonfinite:
            logger.warning("%d of %d sampled images have values that are not finite", num_nonfinite, len(requested))
        return np.stack([result[index] for index in requested.tolist()])

    def model_fn(self, labels: Tensor | None, condition: Tensor | None) -> ModelFn:
        """The network with guidance: other + guidance_scale * (its output - other), where other is the guide's output,
        or its own without what can be dropped; outside of guidance_interval the network alone."""
        null_label = labels if labels is None or self.null_label is None else torch.full_like(labels, self.null_label)
        null_condition = torch.zeros_like(condition) if condition is not None and self.can_drop_condition else condition
        pairs = ((labels, null_label), (condition, null_condition))

        def model_fn(x: Tensor, timestep: Tensor) -> Tensor:
            self.check()
            with self.autocast():
                if not self.is_guided(timestep):
                    return call_model(self.network, x, timestep, labels, condition)
                if self.guide is not None:
                    networks = (self.network, self.guide)
                    output, other = (call_model(each, x, timestep, labels, condition) for each in networks)
                else:
                    both = (None if given is None else torch.cat([given, null]) for given, null in pairs)
                    outputs = call_model(self.network, torch.cat([x, x]), torch.cat([timestep, timestep]), *both)
                    output, other = outputs.chunk(2)
            return other + self.guidance_scale * (output - other)

        return model_fn

    def is_guided(self, timestep: Tensor) -> bool:
        """Whether there is guidance at a timestep, the same for all images, (N,)."""
        if self.guidance_scale == 1 or self.guidance_interval is None:
            return self.guidance_scale != 1
        level, (low, high) = self.process.from_timestep(timestep[:1].cpu()), self.guidance_interval
        return low * (1 - ROUNDING) <= float(level.sigma / level.alpha) <= high * (1 + ROUNDING)


def recording(process: Process, model_fn: ModelFn, shown: Sequence[int], estimates: dict[int, Tensor]) -> ModelFn:
    """`model_fn` that adds its estimates of x0 to `estimates` at the levels numbered `shown`, from noise to image; of
    several at one level, as by Heun's method and RePaint, the last."""
    numbers: dict[float, int] = {}

    def model_fn_recording(x: Tensor, timestep: Tensor) -> Tensor:
        output = model_fn(x, timestep)
        if (number := numbers.setdefault(float(timestep[0]), len(numbers))) in shown:
            level = process.from_timestep(timestep.cpu()).to(x.device)
            noisy = x / process.network_input(torch.ones_like(x), level)  # which scales each image by a number
            estimates[number] = process.predict_x0(output, noisy, level).clamp(-process.clip, process.clip)
        return output

    return model_fn_recording


def sample_labels(indices: Sequence[int], seed: int, class_counts: Sequence[int]) -> np.ndarray:
    """Draw each image's class, int64 (len(indices),), with the frequencies of `class_counts`, which are not all 0.

    A pure function of (seed, index); a class without examples is never drawn.
    """
    upper = np.cumsum(class_counts)
    stream = Stream(seed, StreamKey.SAMPLE_LABEL)
    draws = [stream.at(i).integers(upper[-1]) for i in indices]
    return np.searchsorted(upper, draws, side="right").astype(np.int64)


def step_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One host generator per image, for the noise that a stochastic sampler adds in its steps."""
    seeds = Stream(seed, StreamKey.SAMPLE_STEPS)
    return [torch.Generator().manual_seed(int(seeds.raw(i, 1)[0] >> np.uint64(1))) for i in indices]


def repaint_positions(steps: int, jump_length: int, resample: int) -> list[int]:
    """The levels that are visited, from `steps` (noise) to 0 (the image).

    Level 1 and every jump_length-th above it are reached `resample` times: all but the last time, noise is added again
    up to jump_length levels above (Sec. 4.2 of the paper, whose Algorithm 1 has jumps of length 1).
    """
    jumps = dict.fromkeys(range(1, steps - jump_length + 1, jump_length), resample - 1)
    positions = [steps]
    while positions[-1] > 0:
        positions.append(positions[-1] - 1)
        if jumps.get(positions[-1], 0):
            jumps[positions[-1]] -= 1
            positions.append(positions[-1] + jump_length)
    return positions


def repaint(
    process: Process, model_fn: ModelFn, noise: Tensor, known: Tensor, generators: Sequence[torch.Generator], *,
    steps: int, jump_length: int, resample: int,
) -> Tensor:  # fmt: skip
    """Sample images, fp32 (N, C, H, W), that are `known` where it is known, by RePaint (Lugmayr et al., 2022).

    Ancestral sampling over the `steps` levels of `process.levels`, for any alpha and sigma. Where the image is known,
    it is replaced after each step by the known image with noise of the level (Eq. 8).

    `noise` is standard normal, fp32 (N, C, H, W); `known` fp32 (N, C + 1, H, W), images in the network's values and 1
    where they are known, 0 elsewhere; `generators` are of the host, one per image, for the noise of each step.
    """
    known, is_known = known[:, :-1], known[:, -1:] > 0
    levels = process.levels(steps)
    count = len(levels.sigma)
    alphas, sigmas = [1.0, *levels.alpha.tolist()[::-1]], [0.0, *levels.sigma.tolist()[::-1]]

    def draw() -> Tensor:
        return torch.stack([torch.randn(noise.shape[1:], generator=each) for each in generators]).to(noise.device)

    x = sigmas[-1] * noise
    for now, following in pairwise(repaint_positions(count, min(jump_length, count), resample)):
        low, high = min(now, following), max(now, following)
        ratio = alphas[high] / alphas[low]
        added = max(sigmas[high] ** 2 - (ratio * sigmas[low]) ** 2, 0.0)  # variance from the lower to the higher level
        if following > now:
            x = ratio * x + math.sqrt(added) * draw()
            continue
        level = NoiseLevel(*(each[count - now].expand(len(x)).to(x.device) for each in vars(levels).values()))
        x0 = process.predict_x0(model_fn(process.network_input(x, level), level.timestep), x, level)
        x0 = x0.clamp(-process.clip, process.clip)
        keep, total = ratio * sigmas[low] ** 2, sigmas[high] ** 2
        mean = (keep * x + alphas[low] * added * x0) / total
        x = mean + sigmas[low] * math.sqrt(added / total) * draw()
        x = torch.where(is_known, alphas[low] * known + sigmas[low] * draw(), x)
    return x


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; every module's own mode is restored after."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
