"""Training on arrays: the same promises as for pictures."""

import json

import numpy as np
import pytest
from PIL import Image

import gnunet
from gnunet.checkpoint.trained_model import load_trained_model
from gnunet.commands import evaluate, sample
from gnunet.errors import CheckpointError, ConfigError, DataError
from gnunet.training import fit
from tests.runs import assert_same_run, fit_until

ARRAYS = ["--data.normalization", "mean_std", "--data.class_conditional", "false", "--model.in_channels", "5"]


@pytest.fixture
def source(tmp_path):
    values = np.random.default_rng(0).normal([0, 10, -3, 1000, 2], [1, 5, 0.01, 100, 0], (20, 16, 16, 5))
    np.save(tmp_path / "arrays.npy", values.transpose(0, 3, 1, 2).astype(np.float16))
    return tmp_path / "arrays.npy"


def test_a_run_on_arrays_resumes_to_the_bit_and_its_samples_are_arrays(tiny, source, tmp_path, capfd):
    flags = ["--data.source", str(source), *ARRAYS, "--train.total_images", "40"]
    fit(tiny("whole", *flags))
    fit_until(16, tiny("halves", *flags))
    fit(tiny("halves", *flags))
    assert_same_run(tmp_path / "halves", tmp_path / "whole")
    assert Image.open(tmp_path / "whole/samples/000000040.png").mode == "RGB"

    made = gnunet.sample(tmp_path / "whole", 6, cpu=True)
    assert made.dtype == np.float16 and made.shape == (6, 16, 16, 5)
    assert (made[..., 4] == 2).all()  # a constant channel, but for what float16 holds
    for name in ("whole", "whole/model"):
        out = ["--out", str(tmp_path / f"out-{name[-1]}"), "--cpu", "--num_images", "6"]
        options = ["--num_inference_steps", "4", "--batch_size", "4"]
        assert sample.main([str(tmp_path / name), *out, *options]) == 0, capfd.readouterr()
    for folder in ("out-e", "out-l"):
        files = sorted((tmp_path / folder).glob("*.npy"))
        arrays = np.stack([np.load(file) for file in files])
        assert arrays.dtype == np.float16
        np.testing.assert_array_equal(arrays.transpose(0, 2, 3, 1), made)

    # A file that is broken or of another kind is written again, the others are not.
    files[1].write_bytes(files[1].read_bytes()[:-1])
    np.save(files[2], arrays[2].astype(np.float32))
    before = files[0].stat().st_mtime_ns
    assert sample.main([str(tmp_path / name), *out, *options]) == 0, capfd.readouterr()
    np.testing.assert_array_equal(np.stack([np.load(file) for file in files]), arrays)
    assert files[0].stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="validation_loss"):
        gnunet.evaluate(tmp_path / "whole", cpu=True)
    assert evaluate.main([str(tmp_path / "whole"), "--validation_loss", "--cpu", "--out", str(tmp_path / "loss")]) == 0

    state = tmp_path / "whole/model/gnunet.json"
    for change in ({"scale": [1.0] * 4 + [0.0]}, {"offset": [0.0] * 4}):
        values = json.loads(state.read_text())
        values["scaling"] |= change
        state.write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match="gnunet.json.*scal"):
            load_trained_model(tmp_path / "whole/model")


def test_other_statistics_are_another_run(tiny, source):
    flags = ["--data.source", str(source), *ARRAYS, "--train.total_images", "24"]
    fit(tiny("run", *flags))
    values = np.load(source)
    np.save(source, values + 1)
    with pytest.raises(DataError, match="data.source"):
        fit(tiny("run", *flags))


def test_arrays_to_enlarge_and_to_inpaint(tiny, source, tmp_path):
    flags = ["--data.source", str(source), *ARRAYS, "--train.total_images", "8"]
    fit(tiny("run", *flags, "--data.condition.kind", "low_resolution"))
    fit(tiny("plain", *flags))
    for name in ("large", "small", "masked"):
        (tmp_path / name).mkdir()
    values, mask = np.load(source)[:2].astype(np.float32), np.zeros((16, 16), np.uint8)
    mask[4:12, :9] = 255
    for number, array in enumerate(values):
        np.save(tmp_path / f"large/{number}.npy", array)
        np.save(tmp_path / f"small/{number}.npy", array.reshape(5, 8, 2, 8, 2).mean((2, 4), dtype=np.float64))
        np.save(tmp_path / f"masked/{number}.npy", array)
        Image.fromarray(mask).save(tmp_path / f"masked/{number}_mask.png")
    large, small = (
        gnunet.sample(tmp_path / "run", 2, conditions=tmp_path / name, cpu=True) for name in ("large", "small")
    )
    np.testing.assert_array_equal(large, small)
    assert not np.array_equal(large, gnunet.sample(tmp_path / "run", 2, cpu=True))
    made = gnunet.sample(tmp_path / "plain", 2, inpaint=tmp_path / "masked", resample=1, cpu=True)
    kept = np.broadcast_to((mask == 0)[..., None], made.shape)
    np.testing.assert_array_equal(made[kept], values.transpose(0, 2, 3, 1).astype(np.float16)[kept])
    assert (made != values.transpose(0, 2, 3, 1).astype(np.float16))[..., :4][~kept[..., :4]].mean() > 0.5
    np.save(tmp_path / "large/1.npy", values[1, :4])
    with pytest.raises(DataError, match=r"1\.npy.*5 channels"):
        gnunet.sample(tmp_path / "run", 2, conditions=tmp_path / "large", cpu=True)
    Image.fromarray(mask[:8]).save(tmp_path / "masked/0_mask.png")
    with pytest.raises(DataError, match=r"0\.npy.*16 x 16.*16 x 8"):
        gnunet.sample(tmp_path / "plain", 2, inpaint=tmp_path / "masked", resample=1, cpu=True)
