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
    with pytest.raises(DataError, match="data.class_conditional"):
        load(tmp_path, class_conditional=True, channels=3)
    assert load(write_images(tmp_path, {"x/c.png": 2})).labels is None


def test_split_subfolders(tmp_path, write_images, load, greys):
    write_images(tmp_path, {"train/x/a.png": 1, "train/y/a.png": 2, "val/x/a.png": 3})
    table = load(tmp_path)
    assert (greys(table), table.class_names) == ([1, 2], ("x", "y"))
    assert greys(load(tmp_path, split="validation")) == [3]
    with pytest.raises(DataError, match="data.split.*train, validation"):
        load(tmp_path, split="test")


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
    for keys in ({"subset": {"name": "x"}}, {"label_column": "name"}, {"image_column": "name"}):
        with pytest.raises(DataError, match=f"data.{next(iter(keys))}.*'image', 'label'"):
            load(tmp_path, **keys)


def test_folder_without_images(tmp_path, load):
    with pytest.raises(DataError, match=str(tmp_path)):
        load(tmp_path)
