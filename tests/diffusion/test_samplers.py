"""Every sampler of every process, driven by networks that know the answer.

A point mass shows wrong ends (the first step not at full noise, the last not clean), an off-by-one, a wrong
prediction type; a Gaussian shows a wrong schedule in between, since every level's error adds to its width.
"""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from gnunet.diffusion import PROCESSES, make_process, process_from_scheduler
from gnunet.diffusion.edm import edm_heun, edm_sigmas
from gnunet.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("error", "ignore:__array__ implementation")  # within diffusers

CONFIGS = [
    *(
        dict(kind="ddpm", beta_schedule=schedule, prediction_type=prediction_type)
        for schedule in ("linear", "cosine")
        for prediction_type in ("epsilon", "v", "sample")
    ),
    dict(kind="edm"),
    dict(kind="flow"),
    dict(kind="flow", shift=3.0),
    dict(kind="flow", prediction_type="sample"),
]
COMBINATIONS = [(config, sampler) for config in CONFIGS for sampler in make_process(**config).samplers]


def generators(count):
    return [torch.Generator().manual_seed(i) for i in range(count)]


def sample(config, sampler, steps, oracle, count=16):
    noise = torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    noise = (noise - noise.mean()) / noise.std()  # so that the tolerances need no room for chance
    return make_process(**config).sample(oracle.model_fn, noise, sampler, steps, generators(count))


@pytest.mark.parametrize("steps", [1, 7, 50, 61])
@pytest.mark.parametrize(("config", "sampler"), COMBINATIONS, ids=repr)
def test_lands_on_a_point_mass(config, sampler, steps, gaussian_oracle):
    images = sample(config, sampler, steps, gaussian_oracle(config, mean=-0.7, std=0.0), count=2)
    assert images.dtype == torch.float32
    rounding = 1e-5 if steps > 1 else 1e-2  # one step stands on an estimate from pure noise, in fp32
    torch.testing.assert_close(images, torch.full_like(images, -0.7), rtol=0, atol=rounding)


# Relative error of the width at 100 steps, by the order of the method; see test_error_falls_with_steps.
WIDTH = {"ddpm": 0.12, "ddim": 0.06, "dpm++": 0.02, "euler": 0.06, "heun": 0.02}


@pytest.mark.parametrize(("config", "sampler"), COMBINATIONS, ids=repr)
def test_turns_noise_into_the_gaussian(config, sampler, gaussian_oracle):
    images = sample(config, sampler, 100, gaussian_oracle(config, mean=0.1, std=0.25))
    assert images.mean() == pytest.approx(0.1, abs=0.01)
    assert images.std() == pytest.approx(0.25, rel=WIDTH[sampler])


@pytest.mark.parametrize("config", [dict(kind="ddpm"), dict(kind="edm"), dict(kind="flow")], ids=repr)
def test_error_falls_with_steps(config, gaussian_oracle):
    """By about the factor of a first-order method at least, for every sampler."""
    oracle = gaussian_oracle(config, std=0.25)
    for sampler in make_process(**config).samplers:
        few, many = (abs(sample(config, sampler, steps, oracle).std() - 0.25) for steps in (25, 200))
        chance = 5e-3 if sampler == "ddpm" else 2e-3
        assert many < max(few / 4, chance), sampler


@pytest.mark.parametrize(
    "config", [dict(kind="flow"), dict(kind="flow", prediction_type="sample", shift=3.0)], ids=repr
)
def test_an_error_of_the_network_is_not_multiplied(config, gaussian_oracle):
    oracle, error = gaussian_oracle(config), 0.02 * torch.randn(1, 1, 16, 16)
    noise = torch.randn(2, 1, 16, 16)
    for sampler in ("euler", "heun"):
        process = make_process(**config)
        right, wrong = (
            process.sample(lambda x, t, e=e: oracle.model_fn(x, t) + e, noise, sampler, 8, generators(2))
            for e in (0, error)
        )
        assert (wrong - right).std() < 0.06, sampler


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_ancestral_sampling_over_all_timesteps(variance_type, gaussian_oracle):
    schedule = make_process("ddpm").export_scheduler()
    schedule = type(schedule).from_config(schedule.config, variance_type=variance_type)
    process, oracle = process_from_scheduler(schedule), gaussian_oracle(dict(kind="ddpm"), std=0.25)
    images = process.sample(oracle.model_fn, torch.randn(16, 1, 16, 16), "ddpm", 1000, generators(16))
    assert oracle.calls == 1000
    assert images.mean() == pytest.approx(0.1, abs=0.02) and images.std() == pytest.approx(0.25, rel=0.04)


@pytest.mark.parametrize("steps", [1, 2, 10, 100, 1000])
def test_ddim_is_diffusers_ddim_where_steps_divide(steps, gaussian_oracle):
    """Without clipping the two differ by rounding alone, on a schedule whose ends are in range of both."""
    config = dict(kind="ddpm", prediction_type="v")
    oracle = gaussian_oracle(config, std=0.25)
    theirs = DDIMScheduler.from_config(
        make_process(**config).export_scheduler().config, clip_sample=False, timestep_spacing="trailing"
    )
    theirs.set_timesteps(steps)
    start = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) / 2
    x = start
    for t in theirs.timesteps:
        x = theirs.step(oracle(x, t.float().expand(2))[0], t, x).prev_sample
    ours = make_process(**config).sample(oracle.model_fn, start, "ddim", steps, generators(2))
    torch.testing.assert_close(ours, x, rtol=0, atol=2e-4)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "euler", "heun"])
def test_ddpm_timesteps_fall_from_the_top_for_every_step_count(sampler, schedule):
    process = make_process("ddpm", num_train_timesteps=130, beta_schedule=schedule)
    top = 129 if sampler == "ddpm" or schedule == "linear" else 128
    for steps in range(1, 131):
        timesteps = list(dict.fromkeys(process.scheduler(sampler, steps).timesteps.int().tolist()))
        assert timesteps[0] == top
        assert all(a > b for a, b in zip(timesteps[:-1], timesteps[1:], strict=True))
        assert timesteps[-1] >= 0
        assert len(timesteps) == min(steps, top + 1)


def test_estimates_are_clipped_in_ddpm_only(gaussian_oracle):
    for config, sampler in COMBINATIONS:
        images = sample(config, sampler, 10, gaussian_oracle(config, mean=1.5, std=0.0), count=2)
        expected = 1.0 if config["kind"] == "ddpm" else 1.5
        torch.testing.assert_close(images, torch.full_like(images, expected), rtol=0, atol=1e-4)


def test_default_samplers():
    defaults = {kind: process().resolve_sampler(None, 50) for kind, process in PROCESSES.items()}
    assert defaults == {"ddpm": "ddim", "edm": "heun", "flow": "euler"}
    assert make_process("edm").resolve_sampler("heun", 5000) == "heun"


@pytest.mark.parametrize(
    ("kind", "sampler", "steps", "key"),
    [
        ("edm", "ddim", 50, "sampling.sampler"),
        ("flow", "dpm++", 50, "sampling.sampler"),
        ("ddpm", None, 1001, "sampling.num_inference_steps"),
        ("flow", "heun", 0, "sampling.num_inference_steps"),
    ],
)
def test_samplers_and_steps_that_a_process_lacks(kind, sampler, steps, key):
    with pytest.raises(ConfigError, match=key):
        make_process(kind).scheduler(sampler, steps)


def test_edm_sigmas():
    sigmas = edm_sigmas(18, 0.002, 80.0, 7.0)
    assert len(sigmas) == 19 and sigmas[0] == pytest.approx(80) and sigmas[17] == pytest.approx(0.002)
    assert sigmas[18] == 0 and (np.diff(sigmas) < 0).all()
    assert edm_sigmas(1, 0.002, 80.0, 7.0) == pytest.approx([80.0, 0.0])


def test_edm_heun_is_of_second_order():
    """For N(0, s^2) the ODE keeps x / sqrt(s^2 + sigma^2) constant."""
    calls, s = [], 0.5

    def denoise(x, sigma):
        calls.append(sigma)
        return x * s**2 / (s**2 + sigma**2)

    errors = []
    for steps in (16, 32, 64, 128):
        sigmas = np.linspace(2.0, 0.1, steps + 1).tolist()
        x = edm_heun(denoise, torch.ones(1, dtype=torch.float64), sigmas)
        errors.append(abs(x.item() - 2.0 * ((s**2 + 0.1**2) / (s**2 + 2.0**2)) ** 0.5))
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    np.testing.assert_allclose(orders, 2, atol=0.1)

    calls.clear()
    edm_heun(denoise, torch.ones(1, dtype=torch.float64), edm_sigmas(18, 0.002, 80.0, 7.0))
    assert len(calls) == 35  # the paper's count for 18 steps
