"""The Python interface: the README's example, and several precisions in one process."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import gnunet
import python_api
from gnunet.checkpoint.trained_model import load_trained_model
from gnunet.commands.api import class_labels
from gnunet.config import Config
from gnunet.errors import ConfigError

README = Path(__file__).parents[2] / "README.md"


def readme_example() -> str:
    [example] = [
        block
        for block in re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
        if "gnunet.train(" in block
    ]
    return example


def test_readme_example_trains_samples_and_evaluates(tiny_flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GNUNET_CACHE", str(tmp_path / "cache"))
    _, file, _, source, _, cache, *_ = tiny_flags("run")
    load_config = gnunet.load_config

    def load_tiny(name: str, overrides: dict) -> Config:
        load_config(name, overrides=overrides)  # what the README names is valid
        small = {"train.total_images": 32, "data.source": source, "data.cache_dir": cache}
        return load_config(file, overrides={**overrides, **small, "run_dir": str(tmp_path / "run")})

    monkeypatch.setattr(gnunet, "load_config", load_tiny)
    names: dict = {}
    exec(readme_example().replace("num_images=256", "num_images=8"), names)
    steps = [line.split() for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()]
    assert [int(images) for images, _ in steps] == [8, 16, 24, 32]
    assert all(np.isfinite(float(loss)) for _, loss in steps)
    assert names["run"] == tmp_path / "run"
    assert names["images"].shape == (8, 16, 16, 3) and names["images"].dtype == np.uint8
    [(metric, value)] = names["scores"].items()
    assert metric == "kid_efficientnet_lite0" and np.isfinite(value)


def test_one_process_trains_and_samples_at_several_precisions(tiny, finished):
    expected = gnunet.sample(finished, 2)
    sampled = []

    def callback(step):
        if step.images == 8:
            sampled.append(gnunet.sample(finished, 2))  # a run at fp32 while another trains at bf16
        assert step.session.accelerator.mixed_precision == "bf16"

    mine = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision="no")
    short = ("--train.total_images", "16", "--train.sample_every", "0", "--train.validate_every", "0")
    run = gnunet.train(tiny("bf16", "--train.mixed_precision", "bf16", *short), callback)
    assert gnunet.sample(run, 1).shape == (1, 16, 16, 3)
    gnunet.train(tiny("fp32", *short))
    assert np.array_equal(sampled, [expected])
    assert np.array_equal(gnunet.sample(finished, 2), expected)
    assert mine.mixed_precision == "no"


def test_sample_gives_the_first_images_whatever_their_number(finished):
    few, many = gnunet.sample(finished, 3, classes=["dark"]), gnunet.sample(finished, 6, classes=["dark"])
    assert np.array_equal(few, many[:3])


def test_bad_values_are_refused_as_by_the_commands(finished):
    bad_classes = ("dark", ["grey"], [], ["²"], [-1], [2], ["1e3"])
    bad = [{"classes": classes} for classes in bad_classes] + [{"guidance_scale": w} for w in (-1.0, math.nan, 1e9)]
    bad += [{"num_images": n} for n in (0, -1, 1.5, True, "3", 10**12)] + [{"seed": s} for s in (-1, 2**64, 0.5)]
    for setting in [*bad, {"weights": "best"}, {"batch_size": 0}, {"num_inference_steps": 10**9}, {"sampler": "x"}]:
        with pytest.raises(ConfigError, match=next(iter(setting))):
            gnunet.sample(finished, **setting)
    with pytest.raises(TypeError, match="step_count"):
        gnunet.sample(finished, 1, step_count=3)
    bad = [{"num_images": 0}, {"repeat": 0}, {"nearest": -1}, {"resolution": 0}, {"metrics": "fid"}, {"seed": -1}]
    bad += [{"metrics": []}, {"metrics": [1]}, {"extractors": "x"}, {"split": "test"}]
    for setting in bad:
        with pytest.raises(ConfigError, match=next(iter(setting))):
            gnunet.evaluate(finished, **setting)


def test_class_without_a_training_image_is_refused(finished):
    model = load_trained_model(finished)
    assert class_labels(replace(model, class_counts=[3, 5]), ["light"]).tolist() == [1]
    assert class_labels(replace(model, class_names=["1", "0"]), ["0", 1]).tolist() == [1, 0]  # by name before by number
    for name in ("light", 1):
        with pytest.raises(ConfigError, match=f"classes: given '{name}'.*'dark'"):
            class_labels(replace(model, class_counts=[3, 0]), [name])


def test_the_script_of_the_python_interface(tiny_flags, tmp_path):
    _, file, _, source, _, cache, *_ = tiny_flags("run")
    keys = {"data.source": source, "data.cache_dir": cache, "train.total_images": 32}
    [value] = python_api.main(str(tmp_path / "run"), file, num_images=8, **keys).values()
    assert np.isfinite(value)
    for name, count in (("gnunet", 8), ("diffusers", 4)):
        assert Image.open(tmp_path / f"run/{name}.png").size == (16 * count, 16)
