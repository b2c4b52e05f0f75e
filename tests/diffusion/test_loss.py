"""Training losses against float64 formulas from the papers, and against those of an ideal network."""

import numpy as np
import pytest
import torch
from torch import nn

from gnunet.diffusion import make_process
from gnunet.models.embeddings import LossLogVariance

PREDICTION_TYPES = ("epsilon", "v", "sample")
FLOWS = [dict(kind="flow"), dict(kind="flow", prediction_type="sample")]
PROCESSES = [*(dict(kind="ddpm", prediction_type=p) for p in PREDICTION_TYPES), dict(kind="edm"), *FLOWS]


class Echo(nn.Module):
    """Outputs a fixed function of its input, and remembers what it was called with."""

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        self.x, self.timestep, self.labels, self.return_dict = sample, timestep, class_labels, return_dict
        return (0.3 * sample - 0.1,)


@pytest.fixture
def examples():
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (16, 3, 4, 4)).astype(np.float32)
    noise = rng.standard_normal((16, 3, 4, 4)).astype(np.float32)
    return images, noise, (np.arange(16) + 0.5) / 16  # u


def column(values):
    return np.asarray(values, np.float64)[:, None, None, None]


def losses(config, examples, network=None):
    images, noise, u = examples
    process = make_process(**config)
    level = process.noise_level(torch.from_numpy(u))
    loss = process.loss_and_objective(network or Echo(), torch.from_numpy(images), torch.from_numpy(noise), level)[0]
    assert loss.dtype == torch.float32 and loss.shape == (16,)
    return loss.numpy()


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddpm_loss(schedule, prediction_type, gamma, examples, gaussian_oracle):
    config = dict(kind="ddpm", beta_schedule=schedule, prediction_type=prediction_type, min_snr_gamma=gamma)
    images, noise, u = examples
    abar = gaussian_oracle(config).abar.numpy()[np.floor(u * 1000).astype(int)]
    a, s = column(np.sqrt(abar)), column(np.sqrt(1 - abar))
    x = a * images + s * noise
    target = {"epsilon": noise, "v": a * noise - s * images, "sample": images}[prediction_type]
    snr = abar / (1 - abar)
    scale = {"epsilon": snr, "v": snr + 1, "sample": 1}[prediction_type]
    weight = 1 if gamma is None else np.minimum(snr, gamma) / scale
    expected = weight * ((0.3 * x - 0.1 - target) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(losses(config, examples), expected, rtol=1e-3)


def test_min_snr_loss_does_not_depend_on_the_prediction_type(gaussian_oracle, examples):
    configs = [dict(kind="ddpm", prediction_type=p, min_snr_gamma=5.0) for p in PREDICTION_TYPES]
    first, *others = [losses(config, examples, gaussian_oracle(config)) for config in configs]
    for other in others:
        np.testing.assert_allclose(first, other, rtol=2e-3)


def test_edm_loss(examples):
    config = dict(kind="edm", p_mean=-1.0, p_std=1.4, sigma_data=0.6)
    images, noise, _ = examples
    level = make_process(**config).noise_level(torch.from_numpy(examples[2]))
    sigma, data = column(level.sigma), 0.6
    x = images + sigma * noise
    c_skip = data**2 / (sigma**2 + data**2)
    c_out = sigma * data / np.sqrt(sigma**2 + data**2)
    c_in = 1 / np.sqrt(sigma**2 + data**2)
    denoised = c_skip * x + c_out * (0.3 * c_in * x - 0.1)
    weight = (sigma**2 + data**2) / (sigma * data) ** 2
    expected = (weight * (denoised - images) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(losses(config, examples), expected, rtol=1e-4)


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_flow_loss(distribution, examples):
    config = dict(kind="flow", t_distribution=distribution)
    images, noise, u = examples
    level = make_process(**config).noise_level(torch.from_numpy(u))
    t = column(level.timestep) / 1000
    x = (1 - t) * images + t * noise
    expected = ((0.3 * x - 0.1 - (noise - images)) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(losses(config, examples), expected, rtol=1e-4)


def test_flow_loss_of_images_is_that_of_velocities(examples):
    """Above t = 0.05 it is |v - (noise - x0)|^2 of v = (x - prediction) / t; below, 400 |prediction - x0|^2."""
    images, noise, _ = examples
    t = np.linspace(0.01, 0.99, 16)
    config = dict(kind="flow", t_distribution="uniform", prediction_type="sample")
    x = column(1 - t) * images + column(t) * noise
    prediction = 0.3 * x - 0.1
    velocity_error = ((x - prediction) / column(t) - (noise - images)) ** 2
    expected = np.where(column(t) < 0.05, 400 * (prediction - images) ** 2, velocity_error).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(losses(config, (images, noise, t)), expected, rtol=1e-4)


@pytest.mark.parametrize("config", PROCESSES, ids=repr)
def test_ideal_network_has_the_least_loss(config, gaussian_oracle):
    """For pixels of N(mean, s^2) the error left in x0 is s^2 sigma^2 / (alpha^2 s^2 + sigma^2)."""
    process, oracle = make_process(**config), gaussian_oracle(config, mean=0.1, std=0.3)
    rng = np.random.default_rng(1)
    images = torch.from_numpy((0.1 + 0.3 * rng.standard_normal((64, 1, 48, 48))).astype(np.float32))
    noise = torch.from_numpy(rng.standard_normal(images.shape).astype(np.float32))
    level = process.noise_level((torch.arange(64, dtype=torch.float64) + 0.5) / 64)
    a, s = level.alpha.double(), level.sigma.double()
    left = 0.09 * s**2 / (a**2 * 0.09 + s**2)

    x = a.float()[:, None, None, None] * images + s.float()[:, None, None, None] * noise
    error = (process.denoise(oracle, x, level) - images).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(error.double(), left, rtol=0.15, atol=0)

    # The error in what the loss is of, as a multiple of the error in x0.
    scale = {
        "epsilon": (a / s) ** 2, "v": 1 / s**2, "sample": torch.ones(64).double(),
        "edm": (0.25 + s**2) / (0.25 * s**2), "flow": 1 / s**2,
    }[config["prediction_type"] if config["kind"] == "ddpm" else config["kind"]]  # fmt: skip
    loss = process.loss_and_objective(oracle, images, noise, level)[0]
    torch.testing.assert_close(loss.double(), scale * left, rtol=0.15, atol=0)


@pytest.mark.parametrize("config", PROCESSES, ids=repr)
def test_network_call(config):
    process, network = make_process(**config), Echo()
    level = process.noise_level(torch.tensor([0.2, 0.7], dtype=torch.float64))
    labels = torch.tensor([3, 1])
    images, noise = torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4)
    process.loss_and_objective(network, images, noise, level, labels)
    assert torch.equal(network.labels, labels) and network.return_dict is False
    assert torch.equal(network.timestep, level.timestep)
    assert network.x.dtype == torch.float32
    process.loss_and_objective(network, images, noise, level)
    assert network.labels is None


@pytest.mark.parametrize("config", PROCESSES, ids=repr)
def test_learned_weighting(config, examples):
    """The objective is loss / exp(u) + u, which is least where exp(u) is the expected loss."""

    class Weighted(Echo):
        def forward(self, sample, timestep, class_labels=None, return_dict=True, log_snr=None):
            return *super().forward(sample, timestep, class_labels, return_dict), u(log_snr)

    images, noise, levels = map(torch.from_numpy, examples)
    process, u = make_process(**config), LossLogVariance()
    level = process.noise_level(levels)
    plain = process.loss_and_objective(Echo(), images, noise, level)[0]

    def objective():
        loss, objective = process.loss_and_objective(Weighted(), images, noise, level, log_snr=level.log_snr)
        assert torch.equal(loss, plain)
        u.zero_grad()
        objective.sum().backward()
        return objective

    assert torch.equal(objective(), plain)  # u is 0 at first
    with torch.no_grad():
        u.weight[0] = plain.mean().log()  # the same for all levels
    objective()
    assert u.weight.grad[0].abs() < 1e-4 and u.weight.grad[1:].abs().max() > 0.1
    nn.init.normal_(u.weight)
    torch.testing.assert_close(objective(), plain / u(level.log_snr).exp() + u(level.log_snr))
    assert u(level.log_snr).diff().abs().min() > 0  # of each level


@pytest.mark.parametrize("config", PROCESSES, ids=repr)
def test_only_the_network_runs_in_low_precision(config):
    """With a bf16 network the loss moves by its rounding alone, at the highest and the lowest noise."""

    class Pointwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            self.output = self.conv(sample)
            return (self.output,)

    torch.manual_seed(0)
    process, network = make_process(**config), Pointwise()
    level = process.noise_level(torch.tensor([0.001, 0.999], dtype=torch.float64))
    images, noise = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = process.loss_and_objective(network, images, noise, level)[0]
    assert network.output.dtype == torch.bfloat16 and loss.dtype == torch.float32
    target = process.target(images, noise, level)
    assert target.dtype == torch.float32
    expected = level.weight * (network.output.float() - target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.sum().backward()
    assert network.conv.weight.grad.abs().sum() > 0


def test_edm_target_is_accurate_at_low_noise():
    """(x0 - c_skip * x) / c_out as it stands would be off by 1e-2 here."""
    process = make_process("edm")
    level = process.from_log_snr(torch.full((4,), 12.0, dtype=torch.float64))
    images, noise = torch.rand(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    x0, n, sigma = images.double(), noise.double(), level.sigma.double()[:, None, None, None]
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    expected = (x0 - c_skip * (x0 + sigma * n)) / c_out
    torch.testing.assert_close(process.target(images, noise, level).double(), expected, rtol=1e-5, atol=1e-6)
