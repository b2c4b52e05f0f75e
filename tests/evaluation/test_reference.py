import json
import logging

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gnunet.data import DecodedImages
from gnunet.errors import DataError
from gnunet.evaluation import features
from gnunet.evaluation.distances import kernel_sums
from gnunet.evaluation.extractors import Preprocessing
from gnunet.evaluation.features import collect_statistics
from gnunet.evaluation.reference import load_reference, reference_statistics

ROWS = np.arange(2, 30)


@pytest.fixture
def table(noise_images):
    return DecodedImages.from_arrays(noise_images(30))


@pytest.fixture
def counted(extractor_of):
    """An extractor that counts the images it was given, in `seen`."""
    seen = []

    def network(images):
        seen.append(len(images))
        return images.flatten(1).float() / 255

    extractor = extractor_of(network)
    object.__setattr__(extractor, "seen", seen)
    return extractor


def equal(a, b):
    return (
        a.statistics.num_images == b.statistics.num_images
        and torch.equal(a.statistics.moments.mean, b.statistics.moments.mean)
        and torch.equal(a.statistics.moments.scatter, b.statistics.moments.scatter)
        and torch.equal(a.statistics.kept, b.statistics.kept)
        and torch.equal(a.kernel_sums, b.kernel_sums)
    )


def test_computed_once(table, counted, tmp_path):
    first = reference_statistics(table, ROWS, counted, tmp_path / "cache")
    assert sum(counted.seen) == len(ROWS)
    second = reference_statistics(table, ROWS, counted, tmp_path / "cache")
    assert sum(counted.seen) == len(ROWS)
    assert equal(first, second)
    [direct] = collect_statistics(lambda r: table.images[ROWS[r.start : r.stop]], len(ROWS), [counted])
    assert torch.equal(direct.moments.scatter, second.statistics.moments.scatter)
    assert torch.equal(second.kernel_sums, kernel_sums(direct.kept))
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_whatever_decides_the_statistics_is_in_the_name(table, extractor_of, noise_images, tmp_path, monkeypatch):
    def network(images):
        return images.flatten(1)[:, :12].float()

    def compute(table, rows, *extractor):
        reference_statistics(table, rows, extractor_of(network, *extractor), tmp_path)
        return len(list(tmp_path.glob("*.safetensors")))

    assert compute(table, ROWS) == 1
    assert compute(DecodedImages.from_arrays(table.images.copy()), ROWS.tolist()) == 1
    assert compute(DecodedImages.from_arrays(noise_images(30, seed=1)), ROWS) == 2
    assert compute(DecodedImages.from_arrays(noise_images(30, size=8)), ROWS) == 3
    assert compute(table, ROWS[:-1]) == 4
    assert compute(table, ROWS[::-1].copy()) == 5
    assert compute(table, ROWS, "other weights") == 6
    assert compute(table, ROWS, "none", Preprocessing(8, (0.0,) * 3, (1.0,) * 3)) == 7
    assert compute(table, ROWS, "none", Preprocessing(8, (0.0,) * 3, (2.0,) * 3)) == 8
    assert compute(table, ROWS) == 8


def test_other_statistics_under_the_name_are_refused(table, counted, tmp_path):
    reference_statistics(table, ROWS, counted, tmp_path)
    [path] = tmp_path.glob("*.safetensors")
    reference_statistics(table, ROWS[1:], counted, tmp_path)
    [other] = set(tmp_path.glob("*.safetensors")) - {path}
    other.rename(path)
    with pytest.raises(DataError, match="statistics of other images or features .*num_images is 27, not 28.*remove"):
        reference_statistics(table, ROWS, counted, tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "empty", "no metadata", "folder"])
def test_torn_file_is_computed_anew(table, counted, tmp_path, damage):
    first = reference_statistics(table, ROWS, counted, tmp_path)
    [path] = tmp_path.glob("*.safetensors")
    content = path.read_bytes()
    if damage == "no metadata":
        save_file(load_file(path), path)
    else:
        path.write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])
    if damage == "folder":
        path.unlink()
        path.mkdir()  # cannot be mended, but does no harm
    second = reference_statistics(table, ROWS, counted, tmp_path)
    assert sum(counted.seen) == 2 * len(ROWS) and equal(first, second)
    if damage != "folder":
        assert path.read_bytes() == content


def without_last_row(tensors, name):
    return {**tensors, name: tensors[name][:-1].contiguous()}


def with_nan(tensors, name):
    tensors[name].view(-1)[-1] = torch.nan
    return tensors


def in_half_precision(tensors, name):
    return {**tensors, name: tensors[name].half()}


@pytest.mark.parametrize("alter", [without_last_row, with_nan, in_half_precision])
@pytest.mark.parametrize("name", ["mean", "scatter", "kept", "kernel_sums"])
def test_numbers_that_cannot_be_are_computed_anew(table, counted, tmp_path, alter, name):
    first = reference_statistics(table, ROWS, counted, tmp_path)
    [path] = tmp_path.glob("*.safetensors")
    content = path.read_bytes()
    with safe_open(path, "pt") as file:
        about = file.metadata()
    save_file(alter(load_file(path), name), path, about)
    second = reference_statistics(table, ROWS, counted, tmp_path)
    assert sum(counted.seen) == 2 * len(ROWS) and equal(first, second)
    assert path.read_bytes() == content


@pytest.mark.parametrize("about", ["", "[]", "7", "[" * 100_000])
def test_a_description_that_is_none_is_computed_anew(table, counted, tmp_path, about):
    first = reference_statistics(table, ROWS, counted, tmp_path)
    [path] = tmp_path.glob("*.safetensors")
    save_file(load_file(path), path, {"about": about})
    assert equal(first, reference_statistics(table, ROWS, counted, tmp_path))
    assert sum(counted.seen) == 2 * len(ROWS)


def test_folder_that_cannot_be_written(table, counted, tmp_path, caplog):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        reference = reference_statistics(table, ROWS, counted, tmp_path / "file" / "cache")
    assert "cannot be kept in" in caplog.text and reference.statistics.num_images == 28


@pytest.mark.parametrize("cached", ["nowhere", "at one process", "everywhere"])
def test_processes_agree_whatever_each_has_cached(table, counted, tmp_path, launch, cached):
    alone = reference_statistics(table, ROWS, counted, tmp_path / "0")
    [path] = (tmp_path / "0").glob("*.safetensors")
    for rank in (1, 2):
        (tmp_path / str(rank)).mkdir()
        if cached == "everywhere":
            (tmp_path / str(rank) / path.name).write_bytes(path.read_bytes())
    if cached == "nowhere":
        path.unlink()
    counted.seen.clear()

    def work(processes):
        folder = tmp_path / str(processes.rank)
        return reference_statistics(table, ROWS, counted, folder, processes=processes)

    assert all(equal(found, alone) for found in launch(3, work))
    assert bool(counted.seen) == (cached != "everywhere")
    assert all((tmp_path / str(rank) / path.name).is_file() for rank in range(3))


def test_size_of_the_file_is_bounded(table, counted, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "KEPT", 5)
    reference = reference_statistics(table, ROWS, counted, tmp_path)
    assert reference.statistics.kept.shape == (5, 48) and reference.statistics.num_images == 28
    [path] = tmp_path.glob("*.safetensors")
    tensors = load_file(path)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "mean": (48,), "scatter": (48, 48), "kept": (5, 48), "kernel_sums": (5,),
    }  # fmt: skip


def test_absent_file(tmp_path):
    assert load_reference(tmp_path / "none.safetensors", {}) is None
    save_file({"mean": torch.zeros(1)}, tmp_path / "foreign.safetensors", {"about": json.dumps({})})
    assert load_reference(tmp_path / "foreign.safetensors", {}) is None
