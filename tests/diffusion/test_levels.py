"""Noise levels: the training distributions, levels by log-SNR, and their consistency."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gnunet.diffusion import make_process

CONFIGS = [
    dict(kind="ddpm"),
    dict(kind="ddpm", beta_schedule="cosine", prediction_type="v", min_snr_gamma=5.0),
    dict(kind="ddpm", num_train_timesteps=10),
    dict(kind="edm"),
    dict(kind="flow"),
    dict(kind="flow", t_distribution="uniform"),
]
GRID = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
FIELDS = ("alpha", "sigma", "timestep", "weight", "log_snr")


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_levels_are_monotone_consistent_fp32_and_depend_on_their_own_u_alone(config):
    process = make_process(**config)
    level, part = process.noise_level(GRID), process.noise_level(GRID[123:131])
    for name in FIELDS:
        values = getattr(level, name)
        assert values.dtype == torch.float32 and values.shape == (10_000,) and values.isfinite().all(), name
        assert torch.equal(values[123:131], getattr(part, name))
    assert (level.sigma.diff() >= 0).all() and (level.alpha.diff() <= 0).all()
    assert (level.timestep.diff() >= 0).all() and (level.log_snr.diff() <= 0).all()
    implied = 2 * (level.alpha.double().log() - level.sigma.double().log())
    torch.testing.assert_close(level.log_snr.double(), implied, rtol=1e-5, atol=1e-5)


def test_ddpm_takes_every_timestep_equally_often(gaussian_oracle):
    config = dict(kind="ddpm")
    level = make_process(**config).noise_level(GRID)
    assert torch.equal(level.timestep, torch.arange(1000).repeat_interleave(10).float())
    abar = gaussian_oracle(config).abar.numpy()
    np.testing.assert_allclose(level.alpha[::10].numpy(), np.sqrt(abar), rtol=1e-4)
    np.testing.assert_allclose(level.sigma[::10].numpy(), np.sqrt(1 - abar), rtol=1e-3)
    top = torch.tensor([1 - 2.0**-53], dtype=torch.float64)  # times 1000 this rounds to 1000
    assert make_process("ddpm").noise_level(top).timestep == 999


def test_edm_sigma_is_log_normal():
    level = make_process("edm", p_mean=-0.5, p_std=0.8).noise_level(GRID)
    log_sigma = level.sigma.double().log()
    assert log_sigma.mean() == pytest.approx(-0.5, abs=1e-5)
    assert log_sigma.std() == pytest.approx(0.8, rel=1e-3)
    torch.testing.assert_close(level.timestep.double(), log_sigma / 4, rtol=1e-5, atol=1e-6)
    one_sigma = make_process("edm").noise_level(torch.tensor([0.841344746068543], dtype=torch.float64))
    assert one_sigma.sigma.item() == pytest.approx(math.exp(-1.2 + 1.2), rel=1e-6)


def test_flow_times():
    uniform = make_process("flow", t_distribution="uniform").noise_level(GRID)
    torch.testing.assert_close(uniform.timestep, (1000 * GRID).float())
    normal = make_process("flow", t_mean=0.5, t_std=0.7).noise_level(GRID)
    logit = normal.sigma.double().logit()
    assert logit.mean() == pytest.approx(0.5, abs=1e-4) and logit.std() == pytest.approx(0.7, rel=1e-3)
    torch.testing.assert_close(normal.alpha + normal.sigma, torch.ones(10_000))


@settings(max_examples=50, deadline=None)
@given(log_snr=st.floats(-8, 8))
def test_from_log_snr_finds_the_nearest_level(log_snr):
    at = torch.tensor([log_snr], dtype=torch.float64)
    for config in (dict(kind="edm"), dict(kind="flow")):
        assert make_process(**config).from_log_snr(at).log_snr.item() == pytest.approx(log_snr, abs=1e-5)
    for schedule in ("linear", "cosine"):
        process = make_process("ddpm", beta_schedule=schedule)
        found, every = process.from_log_snr(at), process.noise_level(GRID)
        nearest = (every.log_snr.double() - log_snr).abs().min()
        assert (found.log_snr.double() - log_snr).abs() <= nearest + 1e-6


def test_from_log_snr_stays_in_range():
    beyond = torch.tensor([-100.0, 100.0], dtype=torch.float64)
    edm = make_process("edm").from_log_snr(beyond)
    torch.testing.assert_close(edm.sigma, torch.tensor([80.0, 0.002]))
    assert make_process("ddpm").from_log_snr(beyond).timestep.tolist() == [999, 0]
