import os

import pytest

from gnunet.errors import DataError


def test_class_subfolders_give_labels(tmp_path, write_images, load, greys):
    write_images(tmp_path, {"dog/b.png": 1, "cat/deep/a.PNG": 2, "dog/a.jpeg": 3, ".git/x.png": 4, "dog/.x.png": 5})
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    table = load(tmp_path)
    assert table.class_names == ("cat", "dog")
    assert sorted(zip(greys(table), table.labels.tolist(), strict=True)) == [(1, 1), (2, 0), (3, 1)]


def test_images_outside_of_subfolders_have_no_labels(tmp_path, write_images, load, greys):
    write_images(tmp_path, {"b.png": 1, "a.png": 2})
    table = load(tmp_path, channels=3)
    assert (table.labels, table.class_names, greys(table)) == (None, (), [2, 1])
    with pytest.raises(DataError, match="data.class_conditional.*a folder for each class"):
        load(tmp_path, class_conditional=True, channels=3)
    assert load(write_images(tmp_path, {"x/c.png": 2})).labels is None


def test_split_subfolders(tmp_path, write_images, load, greys):
    write_images(tmp_path, {"train/x/a.png": 1, "train/y/a.png": 2, "val/x/a.png": 3})
    table = load(tmp_path)
    assert (greys(table), table.class_names) == ([1, 2], ("x", "y"))
    assert greys(load(tmp_path, split="validation")) == [3]
    with pytest.raises(DataError, match="data.split.*train, validation"):
        load(tmp_path, split="test")


BESIDE = {
    "a stray picture": (["train/x/1.png", "train/y/2.png", "test/x/3.png", "4.png"], "xy"),
    "another folder": (["train/x/1.png", "train/y/2.png", "test/x/3.png", "raw/4.png"], "xy"),
    "a hidden folder": (["train/x/1.png", "train/y/2.png", ".cache/3.png"], "xy"),
    "upper case": (["TRAIN/x/1.png", "Train/y/2.png", "TEST/x/3.png"], "xy"),
    "years": (["train2017/1.png", "train2017/2.png", "val2017/3.png"], ""),
    "further words": (["train_images/1.png", "trainset/2.png", "images_val/3.png", "Test-data/4.png"], ""),
    "long names": (["A_train_HR/1.png", "A_train_HR/2.png", "A_valid_HR/3.png", "4.png"], ""),
    "below a folder": (["images/train/x/1.png", "images/train/y/2.png", "images/eval/x/3.png", "raw/4.png"], "xy"),
    "below classes": (["x/train/good/1.png", "y/train/good/2.png", "x/test/bad/3.png"], "xy"),
    "splits as classes": (["train/train/1.png", "train/car/2.png", "test/train/3.png"], ("car", "train")),
}


@pytest.mark.parametrize(("files", "classes"), BESIDE.values(), ids=BESIDE)
def test_only_the_split_is_read(tmp_path, write_images, load, greys, files, classes):
    table = load(write_images(tmp_path, {file: int(file[-5]) for file in files}))
    assert sorted(greys(table)) == [1, 2] and table.class_names == tuple(classes)


@pytest.mark.parametrize(
    "files",
    [
        ["train/1.png", "raw/2.png"], ["train/1.png", "car/2.png", "bus/3.png"], ["test/1.png", "cat/x/2.png"],
        ["cat/valid/1.png", "cat/other/2.png"], ["A_train_HR/1.png", "A_test_HR/2.png", "raw/3.png"],
    ],
    ids=str,
)  # fmt: skip
def test_a_split_or_a_class(tmp_path, write_images, load, greys, files):
    """One folder with a split's name beside others may be either."""
    write_images(tmp_path, {file: int(file[-5]) for file in files})
    with pytest.raises(DataError, match="data.split.*valid: all"):
        load(tmp_path)
    table = load(tmp_path, split="all")
    assert sorted(greys(table)) == [*range(1, len(files) + 1)]
    assert table.class_names == tuple(sorted({file.split("/")[0] for file in files}))


def test_split_of_a_folder_without_splits(tmp_path, write_images, load, greys):
    folder = write_images(tmp_path / "test", {"x/1.png": 1})
    for split in ("train", "training", "test", "all"):
        assert greys(load(folder, split=split)) == [1]
    for split in ("validation", "tset", "tran"):
        with pytest.raises(DataError, match=f"data.split.*{split}.*valid: test, train"):
            load(folder, split=split)
    with pytest.raises(DataError, match="valid: train"):
        load(folder / "x", split="test")


def test_links_to_folders_inside_do_not_hide_them(tmp_path, write_images, load, greys):
    write_images(tmp_path, {"train/x/1.png": 1, "test/x/2.png": 2})
    for name in ("a_link", "z_link"):
        os.symlink(tmp_path / "train", tmp_path / name)
    assert greys(load(tmp_path)) == [1]


def test_images_of_other_formats_are_an_error_unless_skipped(tmp_path, write_images, load, greys):
    write_images(tmp_path, {"a.png": 1, "b.HEIC": 2, "c.cr2": 3, "README": 4, "notes.txt": 5})
    with pytest.raises(DataError, match="2 images .*b.HEIC.*c.cr2.*data.on_error"):
        load(tmp_path)
    table = load(tmp_path, on_error="skip")
    assert (greys(table), dict(table.unread)) == ([1], {".heic": 1, ".cr2": 1, ".txt": 1, "no suffix": 1})
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match="no image files.*b.HEIC"):
        load(tmp_path, on_error="skip")


@pytest.mark.parametrize("other", ["a.parquet", "x/a.parquet", "a.arrow", "state.json", "train-images-idx3-ubyte"])
def test_images_beside_other_data(tmp_path, write_images, load, other):
    write_images(tmp_path, {"x/1.png": 1, other: 2})
    with pytest.raises(DataError, match=f"data.source.*1.png.*{other}"):
        load(tmp_path)


def test_linked_folders_are_followed_once(tmp_path, write_images, load, greys):
    folder = write_images(tmp_path / "a", {"x/1.png": 1})
    write_images(tmp_path / "b", {"2.png": 2})
    os.symlink(tmp_path / "b", folder / "y")
    os.symlink(folder, folder / "x" / "loop")
    assert greys(load(folder)) == [1, 2]


def test_subset_of_classes(tmp_path, write_images, load, greys):
    write_images(tmp_path, {"x/a.png": 1, "y/a.png": 2, "z/a.png": 3})
    table = load(tmp_path, subset={"label": ["z", "x"]})
    assert (greys(table), table.class_names, table.labels.tolist()) == ([1, 3], ("x", "z"), [0, 1])
    for keys in ({"subset": {"name": "x"}}, {"label_column": "name"}):
        with pytest.raises(DataError, match=f"data.{next(iter(keys))}.*'image', 'label'"):
            load(tmp_path, **keys)


def test_folder_without_images(tmp_path, load):
    with pytest.raises(DataError, match=str(tmp_path)):
        load(tmp_path)
