"""Arrays and images of any depth, from their files to the values that are trained on."""

import io
import shutil
import zlib

import datasets
import numpy as np
import pytest
from PIL import Image

from gnunet.data import decode
from gnunet.data.decode import ArrayCell, decode_array, decode_image, load_array, read_values
from gnunet.errors import DataError
from gnunet.evaluation.image_files import read_sample, write_sample
from gnunet.scaling import Scaling

RNG = np.random.default_rng(0)
VALUES = RNG.normal(5, 100, (8, 12, 5)).astype(np.float32)


def decode_values(cell, channels=5, size=(8, 12), resize="crop"):
    return decode_array(cell, size, channels, resize)


def image_bytes(planes, kind):
    first, *others = map(Image.fromarray, planes)
    file = io.BytesIO()
    first.save(file, kind, **({"save_all": True, "append_images": others} if others else {}))
    return file.getvalue()


PLANES = RNG.integers(0, 2**16, (3, 8, 12), dtype=np.uint16)
FILES = {
    "png 16": (image_bytes(PLANES[:1], "PNG"), PLANES[:1], (".png", "uint16")),
    "tif 16": (image_bytes(PLANES[:1], "TIFF"), PLANES[:1], (".tif", "uint16")),
    "tif pages": (image_bytes(PLANES, "TIFF"), PLANES, (".tif", "uint16")),
    "tif float": (image_bytes(-PLANES.astype(np.float32), "TIFF"), -PLANES.astype(np.float32), (".tif", "float32")),
    "pgm 16": (image_bytes(PLANES[:1], "PPM"), PLANES[:1], (".png", "uint16")),
}


@pytest.mark.parametrize(("content", "planes", "expected"), FILES.values(), ids=FILES)
def test_images_keep_their_depth_and_samples_are_files_like_them(content, planes, expected, tmp_path):
    values, (suffix, dtype, axes) = decode_values(content, len(planes))
    np.testing.assert_array_equal(values, planes.transpose(1, 2, 0))
    assert (suffix, dtype) == expected and values.dtype == np.float32
    scaling = Scaling("float32", (0.0,) * len(planes), (1.0,) * len(planes), suffix, dtype, axes)
    write_sample(tmp_path / f"a{suffix}", values.astype(dtype), scaling)
    again = read_sample(tmp_path / f"a{suffix}", scaling, len(planes))
    np.testing.assert_array_equal(again, values)
    assert again.dtype == dtype


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_8_bits_are_those_of_pictures(mode, channels):
    rgba = Image.fromarray(RNG.integers(0, 256, (9, 13, 4), dtype=np.uint8))
    file = io.BytesIO()
    rgba.convert(mode).save(file, "PNG")
    pixels = decode_image(file.getvalue(), (9, 13), channels)
    values, file_format = decode_values(file.getvalue(), channels, (9, 13))
    np.testing.assert_array_equal(values, pixels)
    assert file_format[:2] == (".png", "uint8")
    if channels == 4 and mode == "RGBA":
        np.testing.assert_array_equal(pixels, np.asarray(rgba))


@pytest.mark.parametrize(
    ("array", "axes"),
    [(VALUES, "HWC"), (VALUES.transpose(2, 0, 1), "CHW"), (VALUES[..., 0], "HW"), (VALUES > 0, "HWC"),
     (VALUES.astype(">i4"), "HWC"), (VALUES.astype(np.float16), "HWC"), (np.asfortranarray(VALUES), "HWC")],
)  # fmt: skip
def test_npy_files_and_samples_like_them(array, axes, tmp_path):
    np.save(tmp_path / "a.npy", array)
    channels = 1 if axes == "HW" else 5
    values, (suffix, dtype, found) = decode_values(ArrayCell(tmp_path / "a.npy"), channels)
    np.testing.assert_array_equal(values.squeeze(), array.transpose(1, 2, 0) if axes == "CHW" else array)
    assert found == axes and np.dtype(dtype) == (np.uint8 if array.dtype == bool else array.dtype.newbyteorder("="))
    scaling = Scaling("float32", (0.0,) * channels, (1.0,) * channels, suffix, dtype, found)
    write_sample(tmp_path / "b.npy", values.astype(dtype), scaling)
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), array)
    np.testing.assert_array_equal(read_sample(tmp_path / "b.npy", scaling, channels), values)


def test_resizing_is_antialiased_in_float():
    ramp = np.linspace(-1e4, 1e4, 64, dtype=np.float32)
    array = np.broadcast_to(ramp[None, :, None], (64, 64, 2)).copy()
    array[..., 1] = np.indices((64, 64)).sum(axis=0) % 2 * 1e4
    values, _ = decode_values(array, 2, (16, 16))
    np.testing.assert_allclose(values[8, 3:-3, 0], ramp.reshape(16, 4).mean(axis=1)[3:-3], rtol=1e-3)
    np.testing.assert_allclose(values[2:-2, 2:-2, 1], 5e3, rtol=0.01)  # not the squares of some pixels
    padded, _ = decode_values(array[:32] + [7, 0], 2, (16, 16), "pad")
    np.testing.assert_allclose(padded[0, :, 0], (array[:32, :, 0] + 7).mean(), rtol=1e-3)
    with pytest.raises(ValueError, match="64 x 64"):
        decode_values(array, 2, (16, 16), "none")


@pytest.mark.parametrize(
    ("cell", "channels", "named"),
    [
        (VALUES, 4, r"\(8, 12, 5\).* 4 channels"),
        (VALUES[..., 0], 3, r"\(8, 12\).* 3 channels"),
        (np.zeros((5, 8, 5)), 5, "both"),
        (np.zeros((2, 3, 4, 5)), 5, r"\(2, 3, 4, 5\)"),
        (np.where(VALUES > 0, np.inf, VALUES), 5, "infinite"),
        (np.array([[1 + 2j]]), 1, "complex"),
        (image_bytes(PLANES, "TIFF"), 2, "3 pages.*2"),
        (image_bytes([np.zeros((4, 4, 3), np.uint8)], "PNG"), 5, "3 channels.*5"),
        ([[1.0, float("nan")]], 1, "NaN"),
        (VALUES.astype(np.longdouble), 5, "float128"),
        (image_bytes([np.zeros((4, 4), np.uint8), np.zeros((9, 11), np.uint8)], "TIFF"), 2, "11 x 9 pixels"),
        (np.zeros((10, 10), np.uint8), 1, "10 x 10 values"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(cell, channels, named, monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 98)
    with pytest.raises(ValueError, match=named):
        decode_values(cell, channels)


def test_colour_of_16_bits_is_not_read_as_8():
    def chunk(kind, content):
        body = kind + content
        return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    size = (4).to_bytes(4, "big") * 2 + bytes([16, 2, 0, 0, 0])
    png = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(4 * 25))) + chunk(b"IEND", b"")
    )
    assert decode_image(png, 4, 3).shape == (4, 4, 3)
    with pytest.raises(ValueError, match="16 bits"):
        decode_values(png, 3, (4, 4))


def test_npz_files(tmp_path):
    np.savez(tmp_path / "two.npz", a=VALUES, b=VALUES + 1)
    np.savez_compressed(tmp_path / "one.npz", VALUES)
    np.testing.assert_array_equal(load_array(ArrayCell(tmp_path / "one.npz")), VALUES)
    np.testing.assert_array_equal(load_array(ArrayCell(tmp_path / "two.npz", "b")), VALUES + 1)
    for name in (None, "c"):
        with pytest.raises(ValueError, match="a, b.*data.image_column"):
            load_array(ArrayCell(tmp_path / "two.npz", name))


def test_headers_that_announce_too_much_and_objects(tmp_path, little_memory, monkeypatch):
    np.savez_compressed(tmp_path / "bomb.npz", np.zeros((2**12, 2**10)))
    monkeypatch.setattr(decode, "MAX_FILE_BYTES", 2**24)
    with (tmp_path / "sparse.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (2**31, 1, 1)})
        file.truncate(2**34 + file.tell())  # takes no space
    with (tmp_path / "short.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (2**50,)})
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", np.array([{}]))
    with little_memory():
        for name in ("bomb.npz", "sparse.npy", "short.npy", "objects.npy", "objects.npz"):
            with pytest.raises((ValueError, OSError, OverflowError)):
                read_values(ArrayCell(tmp_path / name), 1)
            if name != "sparse.npy":
                with pytest.raises((ValueError, OSError, OverflowError, MemoryError)):
                    read_values(ArrayCell((tmp_path / name).read_bytes()), 1)


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(["a/0.npy", "a/1.npy", "b/2.npy"]):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "set" / name, (VALUES[:, :8] + i).transpose(2, 0, 1).astype(np.float64))
    return tmp_path / "set"


KEYS = {"channels": 5, "normalization": "range"}


def test_folder_of_arrays(folder, load):
    table = load(folder, **KEYS)
    np.testing.assert_array_equal(table.images[2], VALUES[:, :8] + 2)
    assert table.labels.tolist() == [0, 0, 1] and table.class_names == ("a", "b")
    assert (table.scaling.suffix, table.scaling.file_dtype, table.scaling.axes) == (".npy", "float64", "CHW")
    low, high = VALUES[:, :8].min((0, 1)), VALUES[:, :8].max((0, 1)) + 2
    np.testing.assert_allclose(table.scaling.offset, (low + high) / 2, rtol=1e-5)
    np.testing.assert_allclose(table.scaling.scale, (high - low) / 2, rtol=1e-5)
    shutil.make_archive(str(folder), "zip", folder)
    assert load(folder.with_suffix(".zip"), **KEYS).fingerprint == table.fingerprint
    # Another normalization is another cache of the same content, and a changed file a new one.
    other = load(folder, **{**KEYS, "normalization": "mean_std"})
    assert other.fingerprint == table.fingerprint and other.scaling != table.scaling
    assert load(folder, **KEYS).stored.filename == table.stored.filename
    np.save(folder / "a/0.npy", VALUES[:, :8] * 2)
    changed = load(folder, **KEYS)
    assert changed.fingerprint != table.fingerprint and changed.scaling.scale != table.scaling.scale


def test_a_few_arrays_beside_images_are_not_read_nor_a_picture_beside_arrays(folder, load, write_images):
    write_images(folder, {"preview.png": 3})
    assert load(folder, **KEYS).unread == {".png": 1}
    write_images(folder, {f"{i}.png": i for i in range(5)})
    table = load(folder, channels=3)
    assert len(table) == 6 and table.unread == {".npy": 3}


def test_folder_of_npz(tmp_path, load):
    for i in range(2):
        np.savez(tmp_path / f"{i}.npz", x=VALUES[:, :8] + i, y=VALUES[:, :8, 0])
    np.testing.assert_array_equal(load(tmp_path, image_column="x", **KEYS).images[1], VALUES[:, :8] + 1)
    shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path)
    for source in (tmp_path, tmp_path / "set.zip"):
        assert load(source, image_column="y", **{**KEYS, "channels": 1}).images.shape == (2, 8, 8, 1)
    with pytest.raises(DataError, match=r"0.npz.*x, y.*data.image_column"):
        load(tmp_path, **KEYS)


def test_files_that_differ_are_named(folder, load):
    np.save(folder / "a/1.npy", VALUES[:, :8, :4])
    with pytest.raises(DataError, match=r"1\.npy.*\(8, 8, 4\).* 5 channels.*0\.npy"):
        load(folder, **KEYS)
    np.save(folder / "b/2.npy", np.where(VALUES[:, :8] > 200, np.nan, VALUES[:, :8]))
    table = load(folder, on_error="skip", **KEYS)
    assert len(table) == 1 and table.skipped == 2 and np.isfinite(table.scaling.offset).all()


def test_files_of_several_kinds_get_samples_that_hold_all(folder, load):
    for i, dtype in enumerate((np.int16, np.int32, np.uint8)):
        np.save(folder / f"a/{i}.npy", VALUES[:, :8].astype(dtype))
    scaling = load(folder, **KEYS).scaling
    assert (scaling.suffix, scaling.file_dtype, scaling.axes) == (".npy", "float64", "CHW")  # not that of any file


def test_floats_without_normalization_say_what_to_set(folder, load):
    with pytest.raises(DataError, match=r"0\.npy.*data\.normalization"):
        load(folder, channels=3)


def test_columns_of_arrays(tmp_path, load):
    values = [VALUES[:, :8] + i for i in range(3)]
    features = datasets.Features({"x": datasets.Array3D((8, 8, 5), "float32")})
    data = datasets.Dataset.from_dict({"x": values}, features)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    lists = datasets.Dataset.from_dict({"x": [value.tolist() for value in values]})
    lists.to_parquet(tmp_path / "lists.parquet")
    for name in ("a.parquet", "saved", "lists.parquet"):
        table = load(tmp_path / name, image_column="x", **KEYS)
        np.testing.assert_array_equal(table.images, np.stack(values))
        assert (table.scaling.suffix, table.scaling.file_dtype) == (".npy", "float32")


def test_arrays_beyond_the_limit_are_skipped(folder, load, monkeypatch):
    np.save(folder / "a/1.npy", np.zeros((5, 10, 10)))
    monkeypatch.setattr(decode, "MAX_PIXELS", 99)
    assert load(folder, on_error="skip", **KEYS).skipped == 1


def test_padding_is_the_mean_of_values_whose_sum_is_no_float32():
    values, _ = decode_values(np.full((32, 64, 1), 1e37, np.float32), 1, (16, 16), "pad")
    np.testing.assert_allclose(values, 1e37, rtol=1e-6)
