import logging

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gnunet.evaluation import features
from gnunet.evaluation.distances import kernel_sums
from gnunet.evaluation.extractors import Preprocessing
from gnunet.evaluation.features import collect_statistics
from gnunet.evaluation.reference import reference_statistics
from tests.tables import make_table

ROWS = np.arange(1, 29)


@pytest.fixture
def table(noise_images):
    return make_table(noise_images(30))


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
        a.moments.count == b.moments.count
        and torch.equal(a.moments.mean, b.moments.mean)
        and torch.equal(a.moments.scatter, b.moments.scatter)
        and torch.equal(a.subset, b.subset)
        and torch.equal(a.kernel_sums, b.kernel_sums)
    )


def test_statistics_are_computed_once(table, counted, tmp_path):
    first = reference_statistics(table, ROWS, counted, tmp_path / "cache")
    assert sum(counted.seen) == len(ROWS)
    second = reference_statistics(table, ROWS, counted, tmp_path / "cache")
    assert sum(counted.seen) == len(ROWS)
    assert equal(first, second)
    [direct] = collect_statistics(lambda r: table.images[ROWS[r.start : r.stop]], len(ROWS), [counted])
    assert torch.equal(direct.moments.scatter, second.moments.scatter)
    assert torch.equal(second.kernel_sums, kernel_sums(direct.subset))
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_file_name_depends_on_all_that_decides_the_statistics(table, extractor_of, noise_images, tmp_path):
    def network(images):
        return images.flatten(1)[:, :12].float()

    def compute(table, rows, *extractor):
        reference_statistics(table, rows, extractor_of(network, *extractor), tmp_path)
        return len(list(tmp_path.glob("*.safetensors")))

    assert compute(table, ROWS) == 1
    assert compute(make_table(table.images.copy()), ROWS.tolist()) == 1
    assert compute(make_table(noise_images(30, seed=1)), ROWS) == 2
    assert compute(make_table(noise_images(30, size=8)), ROWS) == 3
    assert compute(table, ROWS[:-1]) == 4
    assert compute(table, ROWS[::-1].copy()) == 5
    assert compute(table, ROWS, "other weights") == 6
    assert compute(table, ROWS, "none", Preprocessing(8, (0.0,) * 3, (1.0,) * 3)) == 7
    assert compute(table, ROWS, "none", Preprocessing(8, (0.0,) * 3, (2.0,) * 3)) == 8
    assert compute(table, ROWS) == 8


CHANGES = {
    "short mean": lambda tensors: {"mean": tensors["mean"][:3]},
    "scalar mean": lambda tensors: {"mean": tensors["mean"].sum()},
    "flat scatter": lambda tensors: {"scatter": tensors["scatter"][0].contiguous()},
    "fewer in the subset": lambda tensors: {"subset": tensors["subset"][1:].contiguous()},
    "fp32 moments": lambda tensors: {"mean": tensors["mean"].float()},
    "integer sums": lambda tensors: {"kernel_sums": tensors["kernel_sums"].long()},
    "not a number": lambda tensors: {"kernel_sums": tensors["kernel_sums"] * torch.nan},
    "one more": lambda tensors: {"more": torch.zeros(1)},
}


@pytest.mark.parametrize(
    "damage", ["truncated", "empty", "no metadata", "no tensor", "other rows", "directory", *CHANGES]
)
def test_file_that_cannot_be_used_is_recomputed(table, counted, tmp_path, damage):
    first = reference_statistics(table, ROWS, counted, tmp_path)
    [path] = tmp_path.glob("*.safetensors")
    content = path.read_bytes()
    if damage == "no metadata":
        save_file(load_file(path), path)
    elif damage in CHANGES:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        save_file({**load_file(path), **CHANGES[damage](load_file(path))}, path, metadata)
    elif damage == "no tensor":
        save_file({"mean": torch.zeros(1)}, path)
    elif damage == "other rows":
        reference_statistics(table, ROWS[1:], counted, tmp_path)
        [other] = set(tmp_path.glob("*.safetensors")) - {path}
        other.rename(path)
    elif damage == "directory":
        path.unlink()
        path.mkdir()  # cannot be replaced, but does no harm
    else:
        path.write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])
    counted.seen.clear()
    assert equal(first, reference_statistics(table, ROWS, counted, tmp_path))
    assert sum(counted.seen) == len(ROWS)
    if damage != "directory":
        assert path.read_bytes() == content


def test_directory_that_cannot_be_written_only_warns(table, counted, tmp_path, caplog):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        reference = reference_statistics(table, ROWS, counted, tmp_path / "file" / "cache")
    assert "cannot write" in caplog.text and reference.moments.count == 28


@pytest.mark.parametrize("cached", ["nowhere", "on one rank", "everywhere"])
def test_ranks_agree_whatever_each_has_cached(table, counted, tmp_path, launch, cached):
    single = reference_statistics(table, ROWS, counted, tmp_path / "0")
    [path] = (tmp_path / "0").glob("*.safetensors")
    for rank in (1, 2):
        (tmp_path / str(rank)).mkdir()
        if cached == "everywhere":
            (tmp_path / str(rank) / path.name).write_bytes(path.read_bytes())
    if cached == "nowhere":
        path.unlink()
    counted.seen.clear()

    def work(processes):
        return reference_statistics(table, ROWS, counted, tmp_path / str(processes.rank), processes=processes)

    assert all(equal(found, single) for found in launch(3, work))
    assert bool(counted.seen) == (cached != "everywhere")
    assert all((tmp_path / str(rank) / path.name).is_file() for rank in range(3))


def test_file_size_is_bounded(table, counted, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "MAX_SUBSET", 5)
    reference = reference_statistics(table, ROWS, counted, tmp_path)
    assert reference.subset.shape == (5, 48) and reference.moments.count == 28
    [path] = tmp_path.glob("*.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in load_file(path).items()} == {
        "mean": (48,), "scatter": (48, 48), "subset": (5, 48), "kernel_sums": (5,),
    }  # fmt: skip
