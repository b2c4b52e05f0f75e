"""Processes from and to diffusers' schedulers, through the JSON that is saved with a model."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    ScoreSdeVeScheduler,
)

from gnunet.diffusion import make_process, process_from_config, process_from_scheduler
from gnunet.diffusion.factory import check_scheduler
from gnunet.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # within diffusers

CONFIGS = [
    dict(kind="ddpm"),
    dict(kind="ddpm", beta_schedule="cosine", prediction_type="v"),
    dict(kind="ddpm", num_train_timesteps=100, beta_end=0.1, prediction_type="sample"),
    dict(kind="edm", sigma_data=0.7, sigma_min=0.01, sigma_max=50.0, rho=5.0),
    dict(kind="flow", shift=3.0),
    dict(kind="flow", prediction_type="sample"),
]
U = (torch.arange(64, dtype=torch.float64) + 0.5) / 64


def assert_same_levels(one, other):
    for name in ("alpha", "sigma", "timestep", "weight", "log_snr"):
        assert torch.equal(getattr(one.noise_level(U), name), getattr(other.noise_level(U), name)), name


def generators(count):
    return [torch.Generator().manual_seed(i) for i in range(count)]


def reloaded(scheduler, folder):
    scheduler.save_pretrained(folder)
    return type(scheduler).from_pretrained(folder)


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_round_trip(config, tmp_path, gaussian_oracle):
    process = make_process(**config)
    again = process_from_scheduler(reloaded(process.export_scheduler(), tmp_path))
    assert_same_levels(process, again)
    assert type(again) is type(process) and again.samplers == process.samplers
    oracle, noise = gaussian_oracle(config), torch.randn(2, 1, 4, 4)
    for sampler in process.samplers:
        ours, theirs = (p.sample(oracle.model_fn, noise, sampler, 5, generators(2)) for p in (process, again))
        assert torch.equal(ours, theirs), sampler


def test_edm_and_flow_options():
    edm = process_from_scheduler(EDMDPMSolverMultistepScheduler(sigma_data=0.8))
    assert edm.kind == "edm" and edm.sigma_data == 0.8
    flow = process_from_scheduler(FlowMatchEulerDiscreteScheduler(num_train_timesteps=500, shift=2.0))
    assert flow.noise_level(torch.tensor([0.5], dtype=torch.float64)).timestep == 250 and flow.shift == 2.0


@pytest.mark.parametrize(
    "cls", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler]
)
def test_schedulers_over_betas(cls, tmp_path):
    """Each class has other defaults for what its config leaves out."""
    for schedule, theirs in (("linear", "linear"), ("cosine", "squaredcos_cap_v2")):
        scheduler = cls(beta_start=1e-4, beta_end=0.02, beta_schedule=theirs, prediction_type="v_prediction")
        process = process_from_scheduler(reloaded(scheduler, tmp_path))
        assert_same_levels(process, make_process("ddpm", beta_schedule=schedule, prediction_type="v"))


def test_options_of_a_saved_sampler_do_not_leak_into_ours():
    saved = EulerDiscreteScheduler(
        beta_start=1e-4, beta_end=0.02, use_karras_sigmas=True, timestep_spacing="leading", steps_offset=1
    )
    ours, plain = process_from_scheduler(saved), make_process("ddpm")
    for sampler in plain.samplers:
        assert torch.equal(ours.scheduler(sampler, 7).timesteps, plain.scheduler(sampler, 7).timesteps)
        if hasattr(plain.scheduler(sampler, 7), "sigmas"):
            assert torch.equal(ours.scheduler(sampler, 7).sigmas, plain.scheduler(sampler, 7).sigmas)


def test_defaults_and_custom_betas():
    """google/ddpm-cifar10-32 has DDPM's betas; betas given as numbers have no name for the other classes."""
    cifar = DDPMScheduler(beta_start=1e-4, beta_end=0.02, variance_type="fixed_large", clip_sample=True)
    assert_same_levels(process_from_scheduler(cifar), make_process("ddpm"))
    assert process_from_scheduler(cifar).scheduler("ddpm", 10).variance_type == "fixed_large"
    assert_same_levels(process_from_scheduler(DDPMScheduler()), make_process("ddpm"))

    betas = np.linspace(0.01, 0.6, 40) ** 1.5
    process = process_from_scheduler(DDPMScheduler(num_train_timesteps=40, trained_betas=betas.tolist()))
    level = process.noise_level((torch.arange(40, dtype=torch.float64) + 0.5) / 40)
    np.testing.assert_allclose(level.alpha.square().numpy(), np.cumprod(1 - betas), rtol=1e-5)
    for sampler in process.samplers:
        scheduler = process.scheduler(sampler, 5)
        np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), np.cumprod(1 - betas), rtol=1e-5)
    sigmoid = DDPMScheduler(beta_schedule="sigmoid")
    assert process_from_scheduler(sigmoid).scheduler("heun", 5).sigmas.isfinite().all()


def test_zero_terminal_snr():
    process = process_from_scheduler(
        DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    )
    last = process.noise_level(U[-1:] + 1 / 128 - 1e-6)
    assert last.timestep == 999 and last.alpha == 0 and last.sigma == 1 and last.log_snr == -torch.inf
    assert process.samplers == ("ddim", "ddpm", "dpm++", "euler")

    def predict(x, timestep):  # the v of a point mass at 0.5
        level = process.noise_level((timestep.double() + 0.5) / 1000)
        alpha, sigma = level.alpha[:, None, None, None], level.sigma[:, None, None, None]
        return alpha * (x - alpha * 0.5) / sigma - sigma * 0.5

    for sampler in process.samplers:
        images = process.sample(predict, torch.randn(1, 1, 4, 4), sampler, 10, [torch.Generator()])
        torch.testing.assert_close(images, torch.full_like(images, 0.5), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("scheduler", "key"),
    [
        (DDPMScheduler(prediction_type="flow"), "prediction_type"),
        (DDPMScheduler(variance_type="learned_range"), "variance_type"),
        (EDMEulerScheduler(prediction_type="v_prediction"), "EDMEulerScheduler.prediction_type"),
        (EDMEulerScheduler(sigma_schedule="exponential"), "sigma_schedule"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting"),
        (ScoreSdeVeScheduler(), "scheduler: ScoreSdeVeScheduler"),
        (IPNDMScheduler(), "scheduler: IPNDMScheduler"),
        (CogVideoXDDIMScheduler(), "snr_shift_scale"),
        (DDPMScheduler(num_train_timesteps=100), "num_train_timesteps: 100 with beta_end 0.02"),
        (DDIMScheduler(num_train_timesteps=100), "DDIMScheduler.num_train_timesteps"),
        (DDPMScheduler(trained_betas=[1e-4] * 1000), "betas"),
        (DDPMScheduler(rescale_betas_zero_snr=True), "prediction_type: epsilon"),
        (EDMEulerScheduler(sigma_max=1.0), "sigma_max: 1 "),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_unsupported_schedulers(scheduler, key):
    with pytest.raises(ConfigError, match=key):
        process_from_scheduler(scheduler)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_train_timesteps", 10**12), ("beta_end", float("nan")), ("beta_end", -(10**400)), ("sigmas", {"a": 1}),
        ("trained_betas", [0.1] * 100_001), ("trained_betas", [[0.1]]), ("beta_schedule", "x" * 10_000),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_scheduler_configs_that_would_take_unbounded_memory(key, value):
    with pytest.raises(ConfigError, match=f"{key}: .*valid"):
        check_scheduler({"_class_name": "DDPMScheduler", key: value})


@pytest.mark.parametrize("cls", [HeunDiscreteScheduler, KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler])
def test_options_of_sampling_in_a_config_cost_no_time(cls):
    """Karras sigmas of 100,000 timesteps take these schedulers minutes."""
    config = {"_class_name": cls.__name__, "num_train_timesteps": 100_000, "use_karras_sigmas": True}
    config |= {"prediction_type": "v_prediction"}  # epsilon says nothing of the image at so many
    assert process_from_config(config).num_train_timesteps == 100_000
    with pytest.raises(ConfigError, match="num_train_timesteps"):
        process_from_config(config | {"num_train_timesteps": 10**9})


@pytest.mark.parametrize(
    "scheduler",
    [DDPMScheduler(), DPMSolverMultistepScheduler(), EDMEulerScheduler(), FlowMatchEulerDiscreteScheduler()]
    + [DDPMScheduler(num_train_timesteps=100_000), DDPMScheduler(trained_betas=[0.1] * 1000)],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_saved_scheduler_configs_pass(scheduler, tmp_path):
    scheduler.save_pretrained(tmp_path)
    check_scheduler(json.loads((tmp_path / "scheduler_config.json").read_text()))


SHORT = dict(kind="ddpm", num_train_timesteps=40, beta_end=0.3)
STOCK_LOOPS = [
    *((SHORT | dict(prediction_type=p), "ddpm", {"num_inference_steps": 40}) for p in ("epsilon", "v", "sample")),
    (dict(kind="edm"), "euler", {"num_inference_steps": 40}),
    (dict(kind="flow", shift=3.0), "euler", {"sigmas": np.linspace(1, 1 / 40, 40)}),
]


@pytest.mark.parametrize(("config", "sampler", "timesteps"), STOCK_LOOPS, ids=repr)
def test_exported_schedulers_in_stock_loops(config, sampler, timesteps, gaussian_oracle):
    """The loops of diffusers' pipelines give what our samplers give, noise for noise."""
    process, oracle = make_process(**config), gaussian_oracle(config)
    scheduler = process.export_scheduler()
    scheduler.set_timesteps(**timesteps)
    noise, random = torch.randn(3, 1, 8, 8), generators(3)
    x = noise * scheduler.init_noise_sigma if config["kind"] == "edm" else noise
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(x, t) if config["kind"] == "edm" else x
        x = scheduler.step(oracle(model_input, t.float().expand(3))[0], t, x, generator=random).prev_sample
    ours = process.sample(oracle.model_fn, noise, sampler, 40, generators(3))
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-4 if config["kind"] == "ddpm" else 0)
