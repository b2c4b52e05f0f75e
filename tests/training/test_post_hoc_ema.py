"""EMAs reconstructed from snapshots against EMAs of the same widths that were kept in training."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import gnunet
from gnunet.__main__ import main
from gnunet.checkpoint.checkpoint import file_sha256
from gnunet.checkpoint.trained_model import load_trained_model
from gnunet.errors import CheckpointError, ConfigError
from gnunet.training import fit
from gnunet.training.ema import power_exponent
from gnunet.training.post_hoc_ema import inner_product, reconstruct, solve_weights
from tests.runs import LITTLE, assert_same_run, fit_until

STDS = (0.05, 0.07, 0.1, 0.15)
EVERY = "--train.ema_snapshot_every"


def profile(std: float, end: float, t: np.ndarray) -> np.ndarray:
    exponent = power_exponent(std)
    return np.where(t <= end, (exponent + 1) * np.minimum(t / end, 1) ** exponent / end, 0.0)


@pytest.mark.parametrize(("std", "end"), [(0.1, 1.0), (0.05, 0.7), (0.25, 0.3)])
def test_inner_products_are_integrals(std, end):
    t = (np.arange(1_000_000) + 0.5) / 1_000_000
    for other, other_end in ((0.1, 1.0), (0.05, 0.9), (0.2, 0.5)):
        expected = np.mean(profile(std, end, t) * profile(other, other_end, t))
        result = inner_product(power_exponent(std), end, power_exponent(other), other_end)
        assert result == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("std", "most"), [(0.05, 1e-6), (0.1, 1e-6), (0.07, 3e-3), (0.15, 1e-2), (0.2, 3e-2)])
def test_two_widths_give_those_between_and_around(std, most):
    profiles = [(width, images) for images in range(500, 10_001, 500) for width in (0.05, 0.1)]
    weights, error = solve_weights(profiles, (std, 10_000))
    t = (np.arange(100_000) + 0.5) / 10
    target = profile(std, 10_000, t)
    combined = sum(weight * profile(*each, t) for weight, each in zip(weights, profiles, strict=True))
    assert error < most and sum(weights) == pytest.approx(1)
    assert np.linalg.norm(combined - target) / np.linalg.norm(target) == pytest.approx(error, rel=2e-2, abs=1e-3)


@pytest.fixture(scope="module")
def tracked(images, tmp_path_factory) -> tuple[Path, dict[float, dict[str, torch.Tensor]]]:
    """A run with snapshots, and EMAs of it in float64; names of norms with running statistics."""
    from tests.conftest import ROOT, flags_in, parse_args

    folder, averages = tmp_path_factory.mktemp("tracked"), {std: {} for std in STDS}

    def track(step):
        for std, average in averages.items():
            decay = (1 - 4 / step.images) ** (power_exponent(std) + 1)
            for name, value in step.session.unet.state_dict().items():
                before = average.get(name, torch.zeros(value.shape, dtype=torch.float64))
                average[name] = decay * before + (1 - decay) * value.double()

    flags = ["--train.batch_size", "4", "--train.total_images", "160", EVERY, "8", "--model.norm.kind", "batch"]
    often = ["--train.checkpoint_every", "0", "--train.sample_every", "0", "--train.validate_every", "0"]
    config = parse_args(flags_in(folder, images)("run", *LITTLE, *flags, *often), default_config=ROOT / "none.yaml")
    fit(config, track)
    return folder / "run", averages


@pytest.fixture
def run(tracked, tmp_path) -> Path:
    return Path(shutil.copytree(tracked[0], tmp_path / "run"))


@pytest.mark.parametrize("std", STDS)
def test_a_reconstruction_agrees_with_an_ema_of_that_width(tracked, tmp_path, std):
    folder, error = gnunet.ema(tracked[0], std, out=tmp_path / "ema")
    result, initial = load_trained_model(folder).network.state_dict(), tracked[1][0.05]
    for name, expected in tracked[1][std].items():
        if "num_batches" not in name:
            # Of float16, and of the profile's error times what training changes.
            atol = 1e-3 * expected.abs().max() + 2 * error * (initial[name] - expected).abs().max() + 1e-6
            torch.testing.assert_close(result[name].double(), expected, rtol=0, atol=float(atol))
    assert error < 0.01


def test_the_command_writes_what_other_commands_open(run, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["ema", "run", "--std", "0.07"]) == 0 and main(["ema", "run", "--std", "0.07", "--images", "80"]) == 0
    assert "run/ema/std-0.07-000000080" in capsys.readouterr().out
    assert json.loads((run / "ema/std-0.07-000000080/gnunet.json").read_text())["images"] == 80
    assert load_trained_model(run / "ema/std-0.07").name == "run-ema-std-0.07"
    card = (run / "ema/std-0.07/README.md").read_text()
    assert "`gnunet ema`" in card and "validation_loss" not in card and "samples.png" not in card
    assert main(["ema", "run", "--std", "0.07"]) == 0  # which replaces it
    assert len(gnunet.sample(run / "ema/std-0.07", 1, num_inference_steps=1)) == 1


def test_what_is_out_of_range_is_rejected(run, finished, tmp_path):
    for given, word in (
        ({"std": 0.5}, "0.28"),
        ({"std": 0.0}, "0.01"),
        ({"std": math.nan}, "0.28"),
        ({"images": 4}, "160"),
    ):
        with pytest.raises(ConfigError, match=word):
            reconstruct(run, **{"std": 0.1, **given})
    (tmp_path / "mine/unet").mkdir(parents=True)
    for source, out, word in ((finished, None, "train.ema_snapshot_every"), (run, tmp_path / "mine", "mine")):
        with pytest.raises(CheckpointError, match=word):
            reconstruct(source, 0.1, out=out)


@pytest.mark.parametrize("damage", ["flipped", "missing", "of another model", "a link"])
def test_a_damaged_or_prepared_snapshot_is_rejected(run, tmp_path, damage):
    file, word = run / "ema/000000080/ema_0.10.safetensors", "000000080"
    if damage == "flipped":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "missing":
        file.unlink()
    elif damage == "of another model":
        save_file({**load_file(file), "conv_in.bias": torch.zeros(9)}, file)
        manifest = json.loads((file.parent / "manifest.json").read_text())
        manifest[file.name] = file_sha256(file)
        (file.parent / "manifest.json").write_text(json.dumps(manifest))
    else:
        (run / "ema").rename(tmp_path / "elsewhere")
        (run / "ema").symlink_to(tmp_path / "elsewhere")
        word = "link"
    with pytest.raises(CheckpointError, match=word):
        reconstruct(run, 0.1)
    assert not list((run / "ema").glob("std*"))


def test_a_run_resumes_to_the_bit(tiny, tmp_path):
    """Also from an earlier checkpoint than the newest, whose later snapshots are removed first."""
    fit(tiny("whole", *LITTLE, EVERY, "16"))
    fit_until(40, tiny("stopped", *LITTLE, EVERY, "8"))
    shutil.rmtree(tmp_path / "stopped/checkpoints/000000048")
    fit(tiny("stopped", *LITTLE, EVERY, "16"))
    names = [sorted(path.name for path in (tmp_path / run / "ema").iterdir()) for run in ("whole", "stopped")]
    assert names[0] == [f"{images:09d}" for images in (16, 32, 48, 64)]
    assert sorted({*names[0], "000000008", "000000024"}) == names[1]
    for name in ("000000008", "000000024"):
        shutil.rmtree(tmp_path / "stopped/ema" / name)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_averages_begin_with_a_run(tiny, tmp_path):
    fit_until(8, tiny("run", *LITTLE))
    with pytest.raises(ConfigError, match="train.ema_snapshot_every: given 16"):
        fit(tiny("run", *LITTLE, EVERY, "16"))
