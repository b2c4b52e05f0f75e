"""Noise levels: the training distributions, levels by log-SNR, and their consistency."""

import math
import re

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from gnunet.config import load_config
from gnunet.diffusion import make_process, process_from_scheduler
from gnunet.errors import ConfigError

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


@pytest.mark.parametrize("config", [*CONFIGS, dict(kind="flow", shift=3.0, prediction_type="sample")], ids=repr)
def test_networks_timestep_says_the_level(config):
    process = make_process(**config)
    level = process.noise_level(GRID)
    again = process.from_timestep(level.timestep)
    for name in FIELDS:
        torch.testing.assert_close(getattr(again, name), getattr(level, name), rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (dict(kind="ddpm", num_train_timesteps=100), "num_train_timesteps"),
        (dict(kind="ddpm", num_train_timesteps=50), "num_train_timesteps"),
        (dict(kind="ddpm", beta_end=1e-3), "num_train_timesteps"),
        (dict(kind="edm", sigma_max=1.0), "sigma_max"),
        (dict(kind="edm", p_mean=-5.0, p_std=0.3), "p_mean"),
        (dict(kind="edm", p_mean=5.0, p_std=0.3), "p_mean"),
        (dict(kind="edm", p_mean=1e300), "p_mean"),
        (dict(kind="flow", t_mean=-5.0), "t_mean"),
        (dict(kind="flow", t_mean=5.0), "t_mean"),
        (dict(kind="flow", t_std=0.01), "t_mean"),
    ],
    ids=str,
)
def test_sampling_must_not_start_or_pass_where_training_has_not_been(settings, key):
    assert make_process(**settings).untrained_levels()[0] == key
    with pytest.raises(ConfigError, match=f"^diffusion.{key}: .*valid"):
        load_config({"diffusion": settings})


def test_advice_for_a_short_linear_schedule_is_right():
    """Each alternative that the error names."""
    _, _, valid = make_process("ddpm", num_train_timesteps=100).untrained_levels()
    found = re.search(r"at least (\d+); or beta_end at least ([\d.]+); or beta_schedule cosine", valid)
    steps, beta_end = int(found[1]), float(found[2])
    for changes in ({"num_train_timesteps": steps}, {"beta_end": beta_end}, {"beta_schedule": "cosine"}):
        assert make_process("ddpm", **{"num_train_timesteps": 100, **changes}).untrained_levels() is None
    for changes in ({"num_train_timesteps": steps - 5}, {"beta_end": beta_end - 0.01}):
        assert make_process("ddpm", **{"num_train_timesteps": 100, **changes}).untrained_levels()


@pytest.mark.parametrize(
    "settings",
    [
        *(dict(kind=kind) for kind in ("ddpm", "edm", "flow")),
        dict(kind="ddpm", beta_schedule="cosine", num_train_timesteps=10),
        dict(kind="edm", p_mean=-0.4, p_std=1.0), dict(kind="edm", p_mean=1.0, p_std=1.6, sigma_max=700.0),
        dict(kind="edm", sigma_max=14.6), dict(kind="flow", t_mean=-0.5, t_std=0.6), dict(kind="flow", shift=6.0),
    ],
    ids=str,
)  # fmt: skip
def test_published_settings_are_valid(settings):
    """EDM2's, SVD's, k-diffusion's for Stable Diffusion, SD3's and others'."""
    assert make_process(**settings).untrained_levels() is None
    stable_diffusion = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert process_from_scheduler(stable_diffusion).kind == "ddpm"
