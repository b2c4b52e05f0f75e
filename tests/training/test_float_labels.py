"""Training on labels that are numbers or vectors: the same promises as for classes."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

import gnunet
from gnunet.checkpoint.trained_model import load_trained_model
from gnunet.commands import sample
from gnunet.commands.api import given_labels
from gnunet.data import FloatLabels
from gnunet.errors import CheckpointError, ConfigError, DataError
from gnunet.training import fit
from gnunet.training.session import load_run_data
from tests.runs import assert_same_run, fit_until

VALUES = [3.0 + number / 10 for number in range(20)]


@pytest.fixture
def source(tmp_path):
    """20 pictures with the column `age`, from 3 to 4.9, and vectors."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    (tmp_path / "pictures").mkdir()
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / f"pictures/{number:02d}.png")
    columns = {"file_name": [f"{number:02d}.png" for number in range(20)], "age": VALUES}
    columns["vector"] = [np.eye(32)[number].tolist() for number in range(20)]
    pq.write_table(pa.table(columns), tmp_path / "pictures/metadata.parquet")
    return tmp_path / "pictures"


def flags(source, column, kind):
    keys = {"data.source": source, "data.label_column": column, "model.class_embed_type": kind}
    return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


@pytest.mark.parametrize(("column", "kind"), [("age", "timestep"), ("vector", "identity")])
def test_a_run_resumes_to_the_bit_and_samples_by_value(tiny, source, tmp_path, capfd, column, kind):
    more = [*flags(source, column, kind), "--data.label_dropout", "0.3", "--train.total_images", "32"]
    fit(tiny("whole", *more))
    fit_until(24, tiny("halves", *more))
    fit(tiny("halves", *more))
    assert_same_run(tmp_path / "halves", tmp_path / "whole")

    run, exported = (load_trained_model(tmp_path / name) for name in ("whole", "whole/model"))
    assert run.float_labels == exported.float_labels and run.null_label == exported.null_label is not None
    given = np.array([3.0, 5.5]) if kind == "timestep" else np.eye(32)[[3, 30]]
    made = gnunet.sample(tmp_path / "whole", 6, labels=given, guidance_scale=2.0, cpu=True)
    np.save(tmp_path / "given.npy", given)
    words = [str(value) for value in given] if kind == "timestep" else [str(tmp_path / "given.npy")]
    settings = ["--guidance_scale", "2", "--num_inference_steps", "4", "--batch_size", "4", "--num_images", "6"]
    command = [str(tmp_path / "whole/model"), "--labels", *words, "--out", str(tmp_path / "out"), *settings, "--cpu"]
    for _ in range(2):  # the second time, all is there
        assert sample.main(command) == 0, capfd.readouterr()
    files = [np.array(Image.open(tmp_path / f"out/{number:06d}.png")) for number in range(6)]
    np.testing.assert_array_equal(files, made)
    record = json.loads((tmp_path / "out/samples.json").read_text())
    assert record["settings"]["labels"] == given.tolist()
    assert record["labels"] == (np.resize(given, 6).tolist() if kind == "timestep" else None)

    stock = UNet2DModel.from_pretrained(tmp_path / "whole/model/unet")
    x, labels = torch.randn(2, 3, 16, 16), torch.from_numpy(run.float_labels.to_network(given))
    with torch.no_grad():
        ours, theirs = (network(x, 0.5, class_labels=labels).sample for network in (run.network, stock))
        other = stock(x, 0.5, class_labels=labels.flip(0)).sample
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (other - theirs).abs().max() > 1e-4

    file = tmp_path / "whole/model/gnunet.json"
    values = json.loads(file.read_text())
    for wrong in ({"values": [1.0]}, {"values": [[1.0]]}, {"values": [2.0, 1.0]}, {"values": ["a"]}, {"values": []}, 3):
        file.write_text(json.dumps({**values, "labels": {"can_drop": True, **wrong} if wrong != 3 else 3}))
        with pytest.raises(CheckpointError, match="labels"):
            load_trained_model(tmp_path / "whole/model")


def test_labels_for_the_network_and_for_samples():
    known = FloatLabels.of(np.array([2.0, 6.0, 4.0, 3.0]), can_drop=True)
    assert known.to_network(np.array([2.0, 6.0])).tolist() == [0, 1000] and known.null == -1000
    assert known.check(["2", 7.9]).tolist() == [2, 7.9]
    for wrong in ([-0.1], [8.1], [float("nan")], [], ["a"], [[2.0]], 3):
        with pytest.raises(ConfigError, match="numbers from 0 to 8"):
            given_labels(SimpleNamespace(float_labels=known), None, wrong)
    drawn = known.draw(range(400), seed=1)
    assert [(drawn == value).sum() for value in (2, 3, 4, 6)] == [100] * 4  # as often as in training
    assert (known.draw([399, 5], seed=1) == drawn[[399, 5]]).all()
    assert known.names(drawn[:2]) == ["2", "2"] and known.names(np.linspace(2, 6, 17))[-1] == "5.25 to 6"

    vectors = FloatLabels.of(np.eye(3), can_drop=True)
    assert vectors.null == 0 and vectors.to_network(np.eye(3)).tolist() == np.eye(3).tolist()
    for wrong in ([[0.0, 0, 0]], [[1.0, 2]], [1.0]):
        with pytest.raises(ConfigError, match=r"vectors of \(3,\)"):
            vectors.check(wrong)
    for labels, error in ((np.eye(3) - np.eye(3)[0], "null label"), (np.ones(3), "two different")):
        with pytest.raises(DataError, match=error):
            FloatLabels.of(labels, can_drop=True)


@pytest.mark.parametrize(
    ("values", "kind", "error"),
    [
        (["a"] * 20, "timestep", r"00\.png.*'a'.*class_embed_type"),
        ([*VALUES[:19], float("inf")], "timestep", r"19\.png.*inf"),
        ([*VALUES[:19], None], "timestep", r"19\.png.*None"),
        ([[1.0, 2.0]] * 20, "identity", r"00\.png.* 2 values.* 32 "),
        ([[1.0] * 32] * 20, "timestep", r"00\.png"),
        (VALUES, None, r"00\.png.*float.*model\.class_embed_type"),
    ],
)
def test_labels_that_do_not_fit(tiny, source, values, kind, error):
    columns = {"file_name": [f"{number:02d}.png" for number in range(20)], "label": values}
    pq.write_table(pa.table(columns), source / "metadata.parquet")
    with pytest.raises(DataError, match=error):
        fit(tiny("run", "--data.source", str(source), "--model.class_embed_type", kind or "null"))


def test_whole_numbers_are_numbers_and_labels_need_their_key(tiny, source, run):
    (source / "metadata.parquet").unlink()
    rows = [{"file_name": f"{number:02d}.png", "label": number % 3} for number in range(20)]
    (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = tiny("other", "--data.source", str(source), "--model.class_embed_type", "timestep")
    assert load_run_data(config).table.float_labels.values[::7] == [0.0, 1.0, 2.0]
    with pytest.raises(ConfigError, match="class_embed_type.*class_conditional"):
        tiny("other", "--model.class_embed_type", "timestep", "--data.class_conditional", "false")
    with pytest.raises(ConfigError, match="--labels"):
        gnunet.sample(run, 1, labels=[5.0], cpu=True)
