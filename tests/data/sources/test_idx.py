import gzip
import struct

import numpy as np
import pytest

from gnunet.errors import DataError


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


def test_idx_files(mnist, load):
    folder, pixels, labels = mnist
    table = load(folder.parent)
    np.testing.assert_array_equal(table.images[..., 0], pixels)
    assert table.class_names == ("0", "7", "9")
    assert [int(table.class_names[label]) for label in table.labels] == labels.tolist()
    np.testing.assert_array_equal(load(folder, split="test").images[..., 0], pixels[:2] + 1)
    assert len(load(folder, subset={"label": 7}, channels=3)) == 2


def test_split_that_does_not_exist(mnist, load):
    with pytest.raises(DataError, match="data.split.*test, train"):
        load(mnist[0], split="dev")


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte.gz"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, idx(np.zeros((5, 8, 8), np.uint8))[:-1], f"{IMAGES} is corrupted"),
        (IMAGES, b"\0\0\x0d\x03" + bytes(20), f"{IMAGES} is not an idx file"),
        (IMAGES, idx(np.zeros((4, 8, 8), np.uint8)), "4 images.* 5 labels"),
        (LABELS, gzip.compress(idx(np.zeros(5, np.uint8)))[:-9], f"{LABELS} cannot be read"),
    ],
    ids=["truncated", "floats", "counts differ", "truncated gz"],
)
def test_corrupted_files(mnist, load, name, content, message):
    (mnist[0] / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(mnist[0])


LONG, HUGE = (2**20, 2**6, 2**6), (2**32 - 1,) * 3


@pytest.mark.parametrize(
    ("shape", "size", "suffix"),
    [(LONG, 640, ""), (LONG, 640, ".gz"), (HUGE, 640, ""), (HUGE, 640, ".gz"), ((5, 8, 8), 2**29, ".gz")],
)
def test_files_that_are_not_as_long_as_they_say_take_no_memory(mnist, load, little_memory, shape, size, suffix):
    content = b"\0\0\x08\x03" + struct.pack(">3I", *shape) + bytes(size)
    (mnist[0] / IMAGES).unlink()
    file = mnist[0] / f"{IMAGES}{suffix}"
    file.write_bytes(gzip.compress(content, 1) if suffix else content)
    del content
    with little_memory(), pytest.raises(DataError, match=f"{file.name} is corrupted"):
        load(mnist[0])
