import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from gnunet.errors import CheckpointError
from gnunet.scaling import PICTURES, Scaling

DATA = np.random.default_rng(0).normal([3, -500, 1e-3], [1, 100, 1e-5], (50, 4, 6, 3)).astype(np.float32)


def network(scaling, images):
    return scaling.to_network(torch.from_numpy(images).permute(0, 3, 1, 2))


@pytest.mark.parametrize("normalization", ["range", "mean_std"])
def test_statistics_of_each_channel(normalization):
    scaling = Scaling.fit(DATA, normalization, file_dtype="float32")
    x = network(scaling, DATA).transpose(0, 1).flatten(1).double()
    if normalization == "range":
        assert torch.allclose(x.amin(1), -torch.ones(3).double()) and torch.allclose(x.amax(1), torch.ones(3).double())
    else:
        assert torch.allclose(
            x.mean(1), torch.zeros(3).double(), atol=1e-4
        )  # of float32, at 100 standard deviations from 0
        assert torch.allclose(x.std(1, correction=0), torch.full((3,), 0.5).double(), rtol=1e-3)
    np.testing.assert_allclose(scaling.from_network(network(scaling, DATA)), DATA, rtol=1e-4, atol=1e-8)
    assert Scaling.from_dict(json.loads(json.dumps(scaling.as_dict())), 3, "here") == scaling


@pytest.mark.parametrize("normalization", ["range", "mean_std"])
@pytest.mark.parametrize("value", [0.0, 0.1, -7e30, 1e-42])
def test_constant_channels_are_0_and_come_back(normalization, value):
    data = np.full((5, 2, 2, 1), value, np.float32)
    scaling = Scaling.fit(data, normalization, file_dtype="float32")
    x = network(scaling, data)
    assert x.abs().max() < 1e-6
    np.testing.assert_array_equal(scaling.from_network(x), data)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int64", "uint64"])
def test_integers_are_rounded_and_clipped(dtype):
    scaling = Scaling("float32", (100.0,), (50.0,), file_dtype=dtype)
    x = torch.tensor([0.0, 0.005, 0.011, -1e30, 1e30, torch.nan]).view(1, 1, 1, 6)
    *exact, low, high, nan = scaling.from_network(x).ravel().tolist()
    limits = np.iinfo(dtype)
    assert exact == [100, 100, 101] and nan == 0 and low == max(limits.min, -(2**53)) and high == min(limits.max, 2**53)
    assert np.isfinite(dataclasses.replace(scaling, file_dtype="float16").from_network(x).ravel()[:5]).all()


def test_pictures_of_arrays():
    scaling = Scaling("float32", (10.0,) * 5, (2.0,) * 5)
    values = np.full((1, 1, 1, 5), 10.0, np.float32)
    values[..., :4] += [-2, 2, 1, 100]
    assert scaling.to_pictures(values).ravel().tolist() == [0, 255, 191]
    two = Scaling("float32", (0.0,) * 2, (1.0,) * 2)
    assert two.to_pictures(np.float32([1, -1]).reshape(1, 1, 1, 2)).ravel().tolist() == [255, 0, 0]
    one = Scaling("float32", (0.0,), (1.0,))
    assert one.to_pictures(np.float32([1, np.nan]).reshape(1, 1, 2, 1)).ravel().tolist() == [255, 128]


def test_transparent_pictures_are_composed_on_white_as_pillow_does():
    rgba = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 4), dtype=np.uint8)
    image = Image.alpha_composite(Image.new("RGBA", (64, 64), "white"), Image.fromarray(rgba[0]))
    np.testing.assert_array_equal(PICTURES.to_pictures(rgba)[0], np.asarray(image.convert("RGB")))


VALID = {"dtype": "float32", "offset": [0.0, 1.0], "scale": [1.0, 2.0], "suffix": ".npy", "file_dtype": "float32"}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"scale": [1.0, 0.0]}, "scale.1"),
        ({"scale": [-1.0, 1.0]}, "scale.0"),
        ({"scale": [1e-60, 1.0]}, "scale.0"),
        ({"offset": [float("nan"), 0.0]}, "offset.0"),
        ({"offset": [float("inf"), 0.0]}, "offset.0"),
        ({"scale": [1.0]}, "channels"),
        ({"offset": [0.0] * 3, "scale": [1.0] * 3}, "3 channels"),
        ({"dtype": "uint8"}, "channels"),
        ({"suffix": "/../../x.npy"}, "suffix"),
        ({"file_dtype": "object"}, "file_dtype"),
        ({"axes": "CWH"}, "axes"),
    ],
)
def test_untrusted_scaling_is_refused(changed, named):
    assert Scaling.from_dict(VALID, 2, "state.json").offset == (0.0, 1.0)
    with pytest.raises(CheckpointError, match=f"state.json.*{named}"):
        Scaling.from_dict({**VALID, **changed}, 2, "state.json")


@pytest.mark.parametrize("values", [None, [1], "x", {}])
def test_pictures_have_1_3_or_4_channels(values):
    if values in (None, {}):
        assert Scaling.from_dict(values, 4, "state.json") == PICTURES
    with pytest.raises(CheckpointError, match="state.json"):
        Scaling.from_dict(values, 5, "state.json")
