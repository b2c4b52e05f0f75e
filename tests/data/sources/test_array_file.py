import zipfile

import numpy as np
import pytest

from gnunet.errors import DataError

VALUES = np.random.default_rng(0).normal(40, 7, (6, 8, 8, 5)).astype(np.float32)
LABELS = [3, 3, 7, 7, 3, 7]


@pytest.fixture
def load_arrays(load):
    return lambda file, **keys: load(file, **{"channels": 5, "normalization": "mean_std", **keys})


@pytest.mark.parametrize("layout", ["HWC", "CHW", "HW", "Fortran"])
def test_one_npy_file(tmp_path, load_arrays, layout):
    array = {
        "HWC": VALUES,
        "CHW": VALUES.transpose(0, 3, 1, 2),
        "HW": VALUES[..., 0].astype(">f8"),
        "Fortran": np.asfortranarray(VALUES),
    }[layout]
    np.save(tmp_path / "all.npy", array)
    expected = VALUES[..., :1] if layout == "HW" else VALUES
    table = load_arrays(tmp_path / "all.npy", channels=expected.shape[-1])
    np.testing.assert_array_equal(table.images, expected)
    assert table.images.dtype == np.float32
    scaling = table.scaling
    np.testing.assert_allclose(scaling.offset, expected.mean((0, 1, 2), dtype=float))
    np.testing.assert_allclose(scaling.scale, 2 * expected.std((0, 1, 2), dtype=float))
    axes, dtype = (layout if layout != "Fortran" else "HWC"), "float64" if layout == "HW" else "float32"
    assert (scaling.suffix, scaling.axes, scaling.file_dtype) == (".npy", axes, dtype)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_file_with_splits_and_labels(tmp_path, load, save):
    """The names that MedMNIST and Keras' mnist.npz have; pictures of 8 bits need no normalization."""
    pixels = np.arange(6 * 64, dtype=np.uint8).reshape(6, 8, 8)
    labels = np.array(LABELS, np.uint8)[:, None]
    save(
        tmp_path / "med.npz", train_images=pixels, train_labels=labels, val_images=pixels[:2], val_labels=labels[:2],
        test_images=pixels[3:5], test_labels=labels[3:5],
    )  # fmt: skip
    table = load(tmp_path / "med.npz", class_conditional=True, subset={"train_labels": 7})
    np.testing.assert_array_equal(table.images[..., 0], pixels[[2, 3, 5]])
    table = load(tmp_path / "med.npz", split="test")
    np.testing.assert_array_equal(table.images[..., 0], pixels[3:5])
    assert [table.class_names[label] for label in table.labels] == ["7", "3"]
    assert table.images.dtype == np.uint8 and table.scaling.is_pictures
    np.savez(tmp_path / "k.npz", x_train=pixels, y_train=labels[:, 0], x_test=pixels[:1], y_test=labels[:1, 0], ids=[5])
    assert load(tmp_path / "k.npz").labels.tolist() == [0, 0, 1, 1, 0, 1]
    assert len(load(tmp_path / "k.npz", split="test")) == 1


def test_names_of_arrays_are_columns(tmp_path, load_arrays):
    file = tmp_path / "a.npz"
    np.savez(file, x=VALUES, other=VALUES[:, :, :, 0], y=np.array(LABELS), names=np.array(list("abcdef")), z=VALUES[0])
    with pytest.raises(DataError, match="image_column"):
        load_arrays(file)
    assert load_arrays(file, image_column="x").labels is None  # y or names?
    table = load_arrays(file, image_column="x", label_column="names", class_conditional=False)
    assert table.class_names == tuple("abcdef")
    for keys, named in {
        ("x", "z"): r"z.*\(8, 8, 5\).*valid: \(6,\)",
        ("q", "y"): "data.image_column",
        ("x", "w"): "label_col",
    }.items():
        with pytest.raises(DataError, match=named):
            load_arrays(file, image_column=keys[0], label_column=keys[1])


@pytest.mark.parametrize(
    ("array", "named"),
    [
        (VALUES[..., :4], r"\(8, 8, 4\).*5 channels"),
        (VALUES[0], r"shape \(8, 5\)"),
        (np.zeros((6, 5, 8, 5), np.float32), "both its first and its last"),
        (np.where(VALUES[2, 3, 4, 1] == VALUES, np.nan, VALUES), "row 2|image 2.*NaN"),
        (np.full((2, 8, 8, 5), 1e300), "infinite"),
        (np.zeros((0, 8, 8, 5)), "image_column"),
        (np.zeros((2, 8, 8, 5), complex), "complex"),
        (np.array([{"a": 1}] * 3), "cannot be read"),
    ],
    ids=["channels", "no rows", "ambiguous", "nan", "overflow", "empty", "complex", "objects"],
)
def test_bad_arrays_are_named(tmp_path, load_arrays, array, named):
    np.save(tmp_path / "bad.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=named) as caught:
        load_arrays(tmp_path / "bad.npy")
    assert "bad.npy" in str(caught.value)


def test_columns_of_other_lengths_and_headers_that_announce_too_much(tmp_path, load):
    np.savez(tmp_path / "a.npz", train_images=np.zeros((6, 8, 8)), test_labels=np.arange(3))
    with pytest.raises(DataError, match=r"test_labels.*\(3,\).*valid: \(6,\)"):
        load(tmp_path / "a.npz", subset={"test_labels": 1})
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive, archive.open("x.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (2**50, 8, 8)})
    with pytest.raises(DataError, match=r"b\.npz.*x announces"):
        load(tmp_path / "b.npz")


def test_damaged_files(tmp_path, load_arrays):
    for name, save in {"a.npy": np.save, "b.npz": np.savez_compressed}.items():
        save(tmp_path / name, VALUES)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(DataError, match=name):
            load_arrays(tmp_path / name)
        (tmp_path / name).write_bytes(b"not an array")
        with pytest.raises(DataError, match=name):
            load_arrays(tmp_path / name)
