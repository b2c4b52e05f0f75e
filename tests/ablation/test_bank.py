"""What is computed of a validation set alone, against closed forms and simulation."""

import numpy as np
import pytest
import torch

from gnunet.ablation.bank import bank_name, bank_of, training_weights, trivial_errors
from gnunet.ablation.records import metric_value, outcome_of
from gnunet.data.validation import ValidationSet
from gnunet.diffusion import make_process
from gnunet.distributed.accelerator import make_accelerator
from gnunet.training.session import build_session
from tests.tables import make_table


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "flow"}, {"kind": "flow", "prediction_type": "sample"}, {"kind": "edm"},
        {"kind": "ddpm"}, {"kind": "ddpm", "prediction_type": "v"},
    ],
    ids=str,
)  # fmt: skip
def test_weighted_errors_are_the_loss_of_training(settings):
    """Of a network whose output is 0, over levels as training draws them and over a uniform grid of log-SNR."""
    process = make_process(**settings)
    images = torch.randn(1, 1, 4, 4)
    noise = torch.randn(4000, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    level = process.noise_level(((torch.arange(4000) + 0.5) / 4000).double())

    def network(x, timestep, class_labels, return_dict):
        return (torch.zeros_like(x),)

    trained, _ = process.loss_and_objective(network, images.expand(4000, -1, -1, -1), noise, level)
    inside = level.log_snr.abs() < 8
    log_snr = np.linspace(-8, 8, 4001)[:-1] + 0.002
    density, factor = training_weights(process, log_snr)
    level = process.from_log_snr(torch.from_numpy(log_snr))
    x = process.add_noise(images.expand(4000, -1, -1, -1), noise, level)
    errors = (process.denoise(network, x, level) - images).square().mean((1, 2, 3)) * (1 + level.log_snr.exp())
    weighted = float((errors.double().numpy() * density * factor).sum() / density.sum())
    assert weighted == pytest.approx(float(trained[inside].mean()), rel=0.03)
    assert density.sum() * 16 / 4000 == pytest.approx(float(inside.float().mean()), abs=0.02)


def test_the_linear_filter_is_the_best_for_gaussian_images():
    """Images of two independent pixels with known variances, as many as make the covariance nearly exact."""
    rng = np.random.default_rng(0)
    spread = np.array([[30.0, 6.0]])
    pixels = np.clip(128 + spread[:, :, None] * rng.standard_normal((4000, 1, 2, 1)), 0, 255).astype(np.uint8)
    table, process = make_table(pixels), make_process(kind="flow")
    val_set = ValidationSet(table, np.arange(4000), num_examples=4000, num_bins=1, log_snr_min=1.0, log_snr_max=1.0001)
    images = table.to_network(torch.from_numpy(pixels).permute(0, 3, 1, 2)).double()
    found = {name: errors.mean() for name, errors in trivial_errors(images, process, val_set).items()}
    snr = np.e
    variances = images.var((0, 1, 2)).numpy()
    mean_of = {"wiener": variances, "scalar": np.full(2, variances.mean())}
    # With gain g a pixel's error is (1 - g)^2 of its variance and g^2 of the noise's, 1 / SNR in units of the image.
    for name, assumed in mean_of.items():
        gain = assumed / (assumed + 1 / snr)
        expected = ((1 - gain) ** 2 * variances + gain**2 / snr).mean() * (1 + snr)
        assert found[name] == pytest.approx(expected, rel=0.05)
    assert found["mean"] == pytest.approx(variances.mean() * (1 + snr), rel=0.05)
    assert found["identity"] == pytest.approx((1 + snr) / snr, rel=0.05)
    assert found["wiener"] < found["scalar"] < min(found["mean"], found["identity"])


def test_it_is_the_same_for_all_seeds_and_collapse_is_told_by_it(tiny):
    runs = [tiny(f"run{seed}", "--seed", str(seed)) for seed in (0, 1)]
    sessions = [build_session(run, make_accelerator(run)) for run in runs]
    assert bank_of(sessions[0]) == bank_of(sessions[1]) and bank_name(sessions[0]) == bank_name(sessions[1])
    bank = bank_of(sessions[0])
    scalar = np.array(bank["predictors"]["scalar"])
    assert all(len(errors) == 16 for errors in bank["predictors"].values())

    def record(errors: np.ndarray) -> dict:
        found = {"running": errors.tolist(), "precise": None, "batch": None}
        return {"outcome": "complete", "bank": bank, "errors": found}

    assert outcome_of(record(scalar)) == "collapsed" and outcome_of(record(0.99 * scalar)) == "complete"
    assert metric_value(record(scalar), "validation_loss") == pytest.approx(scalar.reshape(-1, 4).mean(), rel=1e-6)


def test_another_draw_is_another_set_of_the_same_images(tiny):
    first, second = (tiny(f"run{i}", "--validation.draw", str(i)) for i in (0, 1))
    sets = [build_session(run, make_accelerator(run)).val_set for run in (first, second)]
    assert (sets[0].rows == sets[1].rows).all() and sets[0].fingerprint != sets[1].fingerprint
    assert not np.allclose(sets[0].log_snr, sets[1].log_snr)
