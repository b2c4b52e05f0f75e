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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(np.zeros((5, 8, 8), np.uint8))[:-1], "images-idx3-ubyte is corrupted"),
        (b"\0\0\x0d\x03" + bytes(20), "images-idx3-ubyte is not an idx file"),
        (idx(np.zeros((4, 8, 8), np.uint8)), "4 images.* 5 labels"),
    ],
    ids=["truncated", "floats", "counts differ"],
)
def test_corrupted_files(mnist, load, content, message):
    (mnist[0] / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(mnist[0])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(2**32 - 1,) * 3, (2**20, 2**6, 2**6)])
def test_headers_that_announce_too_much_take_no_memory(mnist, load, little_memory, shape, packed):
    head = b"\0\0\x08\x03" + struct.pack(">3I", *shape)
    (mnist[0] / "train-images-idx3-ubyte").unlink()
    name = "train-images-idx3-ubyte" + (".gz" if packed else "")
    (mnist[0] / name).write_bytes(gzip.compress(head + bytes(640)) if packed else head + bytes(640))
    with little_memory(), pytest.raises(DataError, match=f"{name} is corrupted"):
        load(mnist[0])


def test_packed_file_longer_than_its_header_says_is_not_unpacked(mnist, load, little_memory):
    (mnist[0] / "train-images-idx3-ubyte").unlink()
    file = mnist[0] / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", 5, 8, 8) + bytes(2**29), 1))
    with little_memory(), pytest.raises(DataError, match="ubyte.gz is corrupted"):
        load(mnist[0])


def test_truncated_gz(mnist, load):
    file = mnist[0] / "train-labels-idx1-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match="train-labels-idx1-ubyte.gz cannot be read"):
        load(mnist[0])
