"""Ideal networks, written in float64 from the papers' formulas and not from gnunet's."""

import math

import numpy as np
import pytest
import torch
from torch import nn


def cumulative_alphas(config):
    """abar_t of Ho et al. (2020) or Nichol & Dhariwal (2021), float64 (T,)."""
    count = config.get("num_train_timesteps", 1000)
    if config.get("beta_schedule", "linear") == "linear":
        betas = np.linspace(1e-4, config.get("beta_end", 0.02), count)
    else:
        f = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    return np.cumprod(1 - betas)


class GaussianOracle(nn.Module):
    """The ideal network for images whose pixels are independent N(mean, std^2); std 0 is a point mass.

    Its input (scaled noisy image, timestep) and output are those of a network trained with the process.
    """

    def __init__(self, config, mean=0.1, std=0.25):
        super().__init__()
        self.config, self.mean, self.std = config, mean, std
        self.calls = 0
        self.abar = torch.from_numpy(cumulative_alphas(config))  # of ddpm

    def posterior_mean(self, x, alpha, sigma):
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return self.mean + gain * (x - alpha * self.mean)

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        assert sample.dtype == timestep.dtype == torch.float32 and timestep.shape == (len(sample),)
        self.calls += 1
        x, time = sample.double(), timestep.double()[:, None, None, None]
        output = getattr(self, self.config["kind"])(x, time)
        return (output.float(),)

    def model_fn(self, x, timestep):
        return self(x, timestep)[0]

    def ddpm(self, x, time):
        assert (time == time.round()).all()
        abar = self.abar[time.long()]
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        image = self.posterior_mean(x, alpha, sigma)
        noise = (x - alpha * image) / sigma
        predictions = {"epsilon": noise, "sample": image, "v": alpha * noise - sigma * image}
        return predictions[self.config.get("prediction_type", "epsilon")]

    def edm(self, x, time):
        sigma, data = (4 * time).exp(), self.config.get("sigma_data", 0.5)
        x = x * (sigma**2 + data**2).sqrt()
        c_skip = data**2 / (sigma**2 + data**2)
        c_out = sigma * data / (sigma**2 + data**2).sqrt()
        return (self.posterior_mean(x, 1.0, sigma) - c_skip * x) / c_out

    def flow(self, x, time):
        t = time / 1000
        image = self.posterior_mean(x, 1 - t, t)
        return image if self.config.get("prediction_type") == "sample" else (x - image) / t


@pytest.fixture
def gaussian_oracle():
    return GaussianOracle


@pytest.fixture(autouse=True)
def single_threaded():
    """Thousands of tiny operations: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
