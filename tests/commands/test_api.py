"""The Python interface, as the README shows it."""

import numpy as np
import pytest

import gnunet
from gnunet.errors import ConfigError

EXAMPLE = """
import gnunet

config = gnunet.load_config("noto_portraits32", overrides={"train.total_images": 50_000})
run = gnunet.train(config, callback=lambda step: print(step.images, step.loss))
images = gnunet.sample(run, num_images=8, seed=1)
scores = gnunet.evaluate(run, num_images=256, metrics=["kid_efficientnet_lite0"])
"""


def test_example_trains_samples_and_evaluates(tiny_flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GNUNET_CACHE", str(tmp_path / "cache"))
    _, file, _, source, _, cache, *_ = tiny_flags("run")
    small = {"train.total_images": 32, "data.source": source, "data.cache_dir": cache, "run_dir": str(tmp_path / "run")}
    example = EXAMPLE.replace("noto_portraits32", file).replace("num_images=256", "num_images=8")
    names: dict = {}
    exec(example.replace('{"train.total_images": 50_000}', repr(small)), names)
    steps = [line.split() for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()]
    assert [int(images) for images, _ in steps] == [8, 16, 24, 32]
    assert all(np.isfinite(float(loss)) for _, loss in steps)
    assert names["run"] == tmp_path / "run"
    assert names["images"].shape == (8, 16, 16, 3) and names["images"].dtype == np.uint8
    assert names["scores"].keys() == {"kid_efficientnet_lite0"} and np.isfinite(
        names["scores"]["kid_efficientnet_lite0"]
    )


def test_sample_gives_the_first_images_whatever_their_number(finished):
    few, many = gnunet.sample(finished, 3, classes=["dark"]), gnunet.sample(finished, 6, classes=["dark"])
    assert np.array_equal(few, many[:3])
    with pytest.raises(ConfigError, match="'grey'.*dark, light"):
        gnunet.sample(finished, 1, classes=["grey"])
    with pytest.raises(TypeError, match="step_count"):
        gnunet.sample(finished, 1, step_count=3)
