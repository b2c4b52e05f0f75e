"""Image i is a pure function of (network, sampler settings, seed, i)."""

import logging
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from gnunet.diffusion import ImageSampler, make_process, sample_labels
from gnunet.diffusion.sampling import step_generators
from gnunet.errors import ConfigError
from tests.diffusion.conftest import cumulative_alphas

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # within diffusers

SAMPLERS = [
    (config, sampler)
    for config in (dict(kind="ddpm"), dict(kind="edm"), dict(kind="flow"))
    for sampler in make_process(**config).samplers
]
NULL = 3


class TinyNet(nn.Module):
    """A network with everything that could mix examples: convolution, batch statistics, dropout, classes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.drop = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.5)
        self.out, self.classes = nn.Conv2d(8, 3, 3, padding=1), nn.Embedding(NULL + 1, 8)
        self.norm.running_mean.uniform_(-0.1, 0.1)
        self.batches = []

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        assert not self.training and not torch.is_grad_enabled() and sample.dtype == torch.float32
        self.batches.append(len(sample))
        h = self.norm(self.conv(sample)) + torch.sin(timestep)[:, None, None, None]
        if class_labels is not None:
            h = h + self.classes(class_labels)[:, :, None, None]
        return (self.out(self.drop(torch.nn.functional.silu(h))),)


def draw(indices, config=None, network=None, labels=None, **changes):
    settings = {"size": (8, 8), "channels": 3, "seed": 5, "num_inference_steps": 4, "batch_size": 4} | changes
    sampler = ImageSampler(network or TinyNet(), make_process(**config or {"kind": "flow"}), **settings)
    return sampler.sample(indices, labels)


@pytest.mark.parametrize(("config", "sampler"), SAMPLERS, ids=repr)
def test_images_depend_on_seed_and_index_but_not_on_the_others_requested(config, sampler):
    whole = draw(range(10), config, sampler=sampler)
    assert whole.shape == (10, 8, 8, 3) and whole.dtype == np.uint8
    assert len({image.tobytes() for image in whole}) == 10
    for indices in ([7], [9, 3, 4], [5, 5], range(2, 9), [8, 0, 1]):
        assert np.array_equal(draw(indices, config, sampler=sampler), whole[list(indices)])
    other = draw(range(10), config, sampler=sampler, batch_size=3)
    assert np.abs(other.astype(int) - whole).max() <= 1
    seeded = draw(range(10), config, sampler=sampler, seed=6)
    assert all(not np.array_equal(a, b) for a, b in zip(seeded, whole, strict=True))


def test_step_noise_depends_on_image_and_seed():
    seeds = {g.initial_seed() for seed in (0, 1) for g in step_generators(seed, range(100))}
    assert len(seeds) == 200
    again = step_generators(1, [42])[0]
    assert again.initial_seed() == step_generators(1, range(100))[42].initial_seed()
    zero, noise = lambda x, timestep: torch.zeros_like(x), torch.zeros(2, 1, 8, 8)
    images = make_process("ddpm").sample(zero, noise, "ddpm", 10, step_generators(0, [1, 2]))
    assert not torch.equal(images[0], images[1])


def test_batches_are_full_and_only_those_with_requested_images():
    network = TinyNet()
    draw([1, 9, 2], network=network)
    assert network.batches == [4] * 8  # four steps of two batches


def test_labels_follow_their_images():
    labels = np.array([0, 1, 2, 0, 1, 2])
    whole = draw(range(6), labels=labels)
    for indices in ([4, 1, 5], [1, 3, 2]):
        assert np.array_equal(draw(indices, labels=labels[indices]), whole[indices])
    assert not np.array_equal(draw(range(6), labels=1 - labels % 2), whole)


@pytest.mark.parametrize("guidance_scale", [0.0, 0.5, 1.0, 2.0, 4.0])
def test_guidance_extrapolates_from_the_null_label(guidance_scale):
    class Flat(nn.Module):
        """One Euler step along its velocity ends at a picture whose value is a tenth of the class."""

        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            self.count = len(sample)
            return (sample - class_labels[:, None, None, None] / 10,)

    network, labels = Flat(), [0, 1, 2, 3]
    settings = {"num_inference_steps": 1, "null_label": NULL, "guidance_scale": guidance_scale}
    images = draw(range(4), network=network, labels=labels, **settings)
    assert network.count == (4 if guidance_scale == 1 else 8)
    for image, label in zip(images, labels, strict=True):
        value = (NULL + guidance_scale * (label - NULL)) / 10
        assert np.abs(image - np.rint(127.5 * (min(max(value, -1), 1) + 1))).max() <= 1


@pytest.mark.parametrize(("config", "sampler"), SAMPLERS, ids=repr)
def test_guidance_is_on_in_its_interval_of_noise_to_signal_alone(config, sampler):
    """sigma / alpha by the papers' formulas: sqrt(1 / abar - 1), sigma, t / (1 - t)."""
    abar = cumulative_alphas(config)
    ratio = {
        "ddpm": lambda t: np.sqrt(1 / abar[int(t)] - 1),
        "edm": lambda t: np.exp(4 * t),
        "flow": lambda t: t / (1000 - t) if t < 1000 else np.inf,
    }[config["kind"]]
    guided = {}

    class Watched(TinyNet):
        def forward(self, sample, timestep, **inputs):
            guided[float(timestep[0])] = len(sample) == 8
            return super().forward(sample, timestep, **inputs)

    settings = {"num_inference_steps": 10, "guidance_scale": 2.0, "null_label": NULL, "labels": [0, 1, 2, 0]}
    part = draw(range(4), config, Watched(), sampler=sampler, guidance_interval=(0.3, 5.0), **settings)
    assert guided == {t: 0.3 <= ratio(t) <= 5.0 for t in guided} and {*guided.values()} == {True, False}
    whole = draw(range(4), config, sampler=sampler, **settings)
    assert not np.array_equal(part, whole)
    levels = [ratio(t) for t in guided if ratio(t) < np.inf]
    draw(range(4), config, Watched(), sampler=sampler, guidance_interval=(min(levels), max(levels)), **settings)
    assert all(on for t, on in guided.items() if ratio(t) < np.inf)
    none = draw(range(4), config, Watched(), sampler=sampler, guidance_interval=(1e8, 1e9), **settings)
    assert np.array_equal(none, draw(range(4), config, sampler=sampler, **{**settings, "guidance_scale": 1.0}))


@pytest.mark.parametrize("labels", [None, [0, 1, 2, 1]])
def test_autoguidance_extrapolates_from_the_guide(labels):
    """guide + scale * (network - guide), for pictures of the values 0.3 and 0.1, which take one Euler step."""

    class Flat(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            assert len(sample) == 4 and (class_labels is None) == (labels is None)
            return (sample - self.value,)

    settings = {"num_inference_steps": 1, "labels": labels, "guidance_scale": 2.5}
    images = draw(range(4), network=Flat(0.3), guide=Flat(0.1), **settings)
    assert np.abs(images - np.rint(127.5 * (0.1 + 2.5 * (0.3 - 0.1) + 1))).max() <= 1
    off = draw(range(4), network=Flat(0.3), guide=Flat(0.1), guidance_interval=(0.1, 10.0), **settings)  # t = 1
    assert np.abs(off - np.rint(127.5 * 1.3)).max() <= 1


@pytest.mark.parametrize(("config", "sampler"), SAMPLERS, ids=repr)
def test_estimates_are_those_of_the_steps(config, sampler, gaussian_oracle):
    """Of an ideal network for a single image, all are this image; of another, the last are the samples."""
    images = draw(range(6), config, gaussian_oracle(config, mean=0.1, std=0.0), sampler=sampler, num_estimates=3)
    assert images.shape == (6, 3, 8, 8, 3) and np.abs(images - np.rint(127.5 * 1.1)).max() <= 1
    found = draw([5, 1], config, sampler=sampler, num_estimates=10)
    assert found.shape == (2, 4, 8, 8, 3) and not (found[:, 0] == found[:, 1]).all()
    assert np.array_equal(found[:, -1], draw([5, 1], config, sampler=sampler))
    np.testing.assert_array_equal(draw([5, 1], config, sampler=sampler, num_estimates=2), found[:, [0, 3]])
    np.testing.assert_array_equal(draw([5], config, sampler=sampler, num_estimates=1)[:, 0], found[:1, -1])


@pytest.mark.parametrize(("config", "sampler"), SAMPLERS, ids=repr)
def test_guidance_without_a_class_changes_nothing(config, sampler):
    plain = draw(range(4), config, sampler=sampler, labels=[NULL] * 4)
    guided = draw(range(4), config, sampler=sampler, labels=[NULL] * 4, null_label=NULL, guidance_scale=3.0)
    assert np.abs(plain.astype(int) - guided).max() <= 1


@pytest.mark.parametrize(
    ("options", "key"),
    [({"guidance_scale": 2.0}, "guidance_scale"), ({"guidance_scale": 2.0, "labels": [0]}, "guidance_scale")]
    + [({"sampler": "ddim"}, "sampler")],
)
def test_options_that_are_not_valid(options, key):
    with pytest.raises(ConfigError, match=f"sampling.{key}"):
        draw([0], **options)


def test_training_modes_are_restored():
    network = TinyNet()
    network.norm.eval()
    draw([0], network=network)
    assert network.training and not network.norm.training and network.conv.training
    network.out = None  # fails in the middle
    with pytest.raises(TypeError):
        draw([0], network=network)
    assert network.training and not network.norm.training


@pytest.mark.parametrize(("config", "sampler"), SAMPLERS, ids=repr)
def test_autocast_covers_the_network_alone(config, sampler):
    entered = []

    @contextmanager
    def autocast():
        entered.append(True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield

    low, high = (draw(range(4), config, sampler=sampler, **kwargs) for kwargs in ({"autocast": autocast}, {}))
    assert len(entered) == {"heun": 7}.get(sampler, 4)
    assert 0 < np.abs(low.astype(int) - high).max() < 40


def test_nonfinite_images_are_counted(caplog):
    class Broken(nn.Module):
        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            output = sample.clone()
            output[1] = torch.nan
            return (output,)

    with caplog.at_level(logging.WARNING):
        images = draw([0, 1, 2], network=Broken())
    assert "1 of 3" in caplog.text
    assert (images[1] == 128).all() and not (images[0] == 128).all()
    caplog.clear()
    draw([0, 2], network=Broken())
    assert not caplog.text


def test_labels_have_class_frequencies():
    counts = [0, 300, 0, 100, 600, 0]
    labels = sample_labels(range(4000), 1, counts)
    assert labels.dtype == np.int64
    shares = np.bincount(labels, minlength=6) / 4000
    np.testing.assert_allclose(shares, np.array(counts) / 1000, atol=0.03)
    assert set(labels) == {1, 3, 4}
    assert np.array_equal(sample_labels([17, 3], 1, counts), labels[[17, 3]])
    assert not np.array_equal(sample_labels(range(100), 2, counts), labels[:100])
    assert sample_labels([], 1, counts).shape == (0,)
