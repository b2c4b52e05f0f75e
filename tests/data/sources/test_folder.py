import gzip
import os
import struct

import numpy as np
import pytest

from gnunet.data import load_images
from gnunet.errors import DataError


def greys(table) -> list[int]:
    return table.images[:, 0, 0, 0].tolist()


def test_class_subfolders_give_labels(tmp_path, write_images, config):
    write_images(tmp_path, {"dog/b.png": 1, "cat/deep/a.PNG": 2, "dog/a.jpeg": 3, ".git/x.png": 4, "dog/.x.png": 5})
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    table = load_images(**config(tmp_path), channels=1)
    assert table.class_names == ("cat", "dog")
    assert sorted(zip(greys(table), table.labels.tolist(), strict=True)) == [(1, 1), (2, 0), (3, 1)]


def test_flat_folder_has_no_labels(tmp_path, write_images, config):
    write_images(tmp_path, {"b.png": 1, "a.png": 2})
    table = load_images(**config(tmp_path), channels=3)
    assert (table.labels, table.class_names, greys(table)) == (None, (), [2, 1])
    with pytest.raises(DataError, match="class_conditional.*data.label_column"):
        load_images(**config(tmp_path, class_conditional=True), channels=3)


def test_images_beside_subfolders_leave_no_labels(tmp_path, write_images, config):
    assert load_images(**config(write_images(tmp_path, {"a.png": 1, "x/b.png": 2})), channels=1).labels is None


def test_split_subfolders(tmp_path, write_images, config):
    write_images(tmp_path, {"train/x/a.png": 1, "train/y/a.png": 2, "val/x/a.png": 3})
    table = load_images(**config(tmp_path), channels=1)
    assert (greys(table), table.class_names) == ([1, 2], ("x", "y"))
    assert greys(load_images(**config(tmp_path, split="validation"), channels=1)) == [3]
    with pytest.raises(DataError, match="data.split is 'test'.*it has train, validation"):
        load_images(**config(tmp_path, split="test"), channels=1)


def test_linked_folders_are_followed_once(tmp_path, write_images, config):
    folder = write_images(tmp_path / "a", {"x/1.png": 1})
    write_images(tmp_path / "b", {"2.png": 2})
    os.symlink(tmp_path / "b", folder / "y")
    os.symlink(folder, folder / "x" / "loop")
    assert greys(load_images(**config(folder), channels=1)) == [1, 2]


def test_subset_of_a_folder(tmp_path, write_images, config):
    write_images(tmp_path, {"x/a.png": 1, "y/a.png": 2, "z/a.png": 3})
    table = load_images(**config(tmp_path, subset={"label": ["z", "x"]}), channels=1)
    assert (greys(table), table.class_names, table.labels.tolist()) == ([1, 3], ("x", "z"), [0, 1])


def test_folder_without_images(tmp_path, config):
    with pytest.raises(DataError, match="no image files .*no idx files and no .parquet"):
        load_images(**config(tmp_path), channels=1)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    pixels = np.arange(5 * 8 * 8, dtype=np.uint8).reshape(5, 8, 8)
    labels = np.array([7, 0, 7, 9, 0], np.uint8)
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "train-images-idx3-ubyte").write_bytes(idx(pixels))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels[:2] + 1)))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(labels[:2]))
    return folder, pixels, labels


def test_idx_files(mnist, config):
    folder, pixels, labels = mnist
    table = load_images(**config(folder.parent), channels=1)
    np.testing.assert_array_equal(table.images[..., 0], pixels)
    assert table.class_names == ("0", "7", "9")
    assert [int(table.class_names[label]) for label in table.labels] == labels.tolist()
    np.testing.assert_array_equal(
        load_images(**config(folder, split="test"), channels=1).images[..., 0], pixels[:2] + 1
    )
    assert len(load_images(**config(folder, subset={"label": 7}), channels=3)) == 2


def test_idx_split_that_is_not_there(mnist, config):
    with pytest.raises(DataError, match="data.split is 'dev'.*it has test, train"):
        load_images(**config(mnist[0], split="dev"), channels=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(np.zeros((5, 8, 8), np.uint8))[:-1], "320 values announced, 319 there"),
        (b"\0\0\x0d\x03" + bytes(20), "not an idx file of unsigned bytes in 3 dimensions"),
        (idx(np.zeros((4, 8, 8), np.uint8)), "4 images, but .* 5 labels"),
    ],
    ids=["truncated", "floats", "counts differ"],
)
def test_broken_idx_files(mnist, config, content, message):
    (mnist[0] / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_images(**config(mnist[0]), channels=1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(2**32 - 1,) * 3, (2**16, 2**16, 2**32 - 1), (2**20, 2**6, 2**6), (10**6, 30, 30)])
def test_idx_files_that_announce_too_much(mnist, config, little_memory, shape, packed):
    head = b"\0\0\x08\x03" + struct.pack(">3I", *shape)
    (mnist[0] / "train-images-idx3-ubyte").unlink()
    name = "train-images-idx3-ubyte" + (".gz" if packed else "")
    (mnist[0] / name).write_bytes(gzip.compress(head + bytes(640)) if packed else head + bytes(640))
    with little_memory(), pytest.raises(DataError, match=f"{name} is broken: [0-9]* values announced"):
        load_images(**config(mnist[0]), channels=1)


def test_a_packed_idx_file_that_goes_on_is_not_unpacked(mnist, config, little_memory):
    (mnist[0] / "train-images-idx3-ubyte").unlink()
    file = mnist[0] / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", 5, 8, 8) + bytes(2**29), 1))
    with little_memory(), pytest.raises(DataError, match="320 values announced, more there"):
        load_images(**config(mnist[0]), channels=1)


def test_broken_gz(mnist, config):
    file = mnist[0] / "train-labels-idx1-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match="train-labels-idx1-ubyte.gz cannot be read"):
        load_images(**config(mnist[0]), channels=1)
