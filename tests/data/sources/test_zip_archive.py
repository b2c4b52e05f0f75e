import json
import struct
import zipfile

import pytest

from gnunet.data.sources import open_source
from gnunet.errors import DataError
from gnunet.files import atomic_write


@pytest.fixture
def zip_images(tmp_path, write_images):
    """Writes pictures of a single grey value, and other files, to an archive; returns its path."""

    def write(values, others=(), name="images.zip", **keys):
        folder = write_images(tmp_path / name.removesuffix(".zip"), values)
        for file, text in dict(others).items():
            (folder / file).write_text(text)
        with zipfile.ZipFile(tmp_path / name, "w", **keys) as archive:
            for file in (*dict(others), *values):
                archive.write(folder / file, file)
        return tmp_path / name

    return write


LAYOUTS = {
    "class folders": ({"a/1.png": 1, "b/2.png": 2, "b/.3.png": 3, "__MACOSX/b/._2.png": 4}, {}, ("a", "b")),
    "no folder": ({"1.png": 1, "2.png": 2}, {}, ()),
    "one top folder": ({"photos/a/1.png": 1, "photos/b/2.png": 2}, {}, ("a", "b")),
    "one folder of images": ({"photos/1.png": 1, "photos/2.png": 2}, {}, ()),
    "splits": ({"train/a/1.png": 1, "train/b/2.png": 2, "test/a/3.png": 3}, {}, ("a", "b")),
    "splits in a folder": ({"x/train/a/1.png": 1, "x/train/b/2.png": 2, "x/test/a/3.png": 3}, {}, ("a", "b")),
    "metadata": ({"a/1.png": 1, "b/2.png": 2}, {"metadata.csv": "file_name,label\nb/2.png,y\na/1.png,x\n"}, ("x", "y")),
    "EDM": ({"0/1.png": 1, "1/2.png": 2}, {"dataset.json": json.dumps({"labels": [["0/1.png", 3], ["1/2.png", 3]]})},
            ("3",)),
    "EDM without labels": ({"0/1.png": 1, "1/2.png": 2}, {"dataset.json": '{"labels": null}'}, ()),
}  # fmt: skip


@pytest.mark.parametrize(("values", "others", "classes"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(tmp_path, zip_images, load, greys, values, others, classes):
    path = zip_images(values, others, compression=zipfile.ZIP_DEFLATED)
    before = {*tmp_path.rglob("*")}
    table = load(path)
    assert (greys(table), table.class_names) == ([1, 2], classes)
    assert {*tmp_path.rglob("*")} == before  # nothing is extracted
    if "test" in str(values):
        assert greys(load(path, split="test")) == [3]


def test_a_split_that_the_archive_does_not_have(zip_images, load, greys):
    path = zip_images({"test/a/1.png": 1}, name="x.zip")
    with pytest.raises(DataError, match="data.split"):
        load(path)
    assert greys(load(path, split="test")) == [1]


def test_a_changed_archive_is_noticed(zip_images, load, greys):
    assert greys(load(zip_images({"1.png": 1}))) == [1]
    assert greys(load(zip_images({"1.png": 2}))) == [2]


@pytest.mark.parametrize("name", ["../x.png", "/x.png", "a/../../x.png", "..\\x.png", "C:\\x.png", "a/../x.png"])
def test_names_that_leave_the_archive(zip_images, load, name):
    path = zip_images({"1.png": 1})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"")
    with pytest.raises(DataError, match=r"images.zip.*x.png.* leaves"):
        load(path)


def rewrite(path, **fields):
    """Changes fields of the last member in the central directory."""
    content = bytearray(path.read_bytes())
    start = content.rindex(b"PK\x01\x02")
    places = {"flags": ("<H", 8), "method": ("<H", 10), "compressed": ("<L", 20), "size": ("<L", 24)}
    for name, value in fields.items():
        struct.pack_into(places[name][0], content, start + places[name][1], value)
    atomic_write(path, bytes(content))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"flags": 1}, "encrypted"), ({"method": 12}, "by method 12"), ({"size": 2**31 - 1}, "2147483647 bytes"),
        ({"size": 10**6}, "1000000 bytes"), ({"compressed": 10**6}, "overlap"),
    ],
    ids=str,
)  # fmt: skip
def test_members_that_are_not_read(zip_images, load, fields, message):
    path = zip_images({"1.png": 1, "2.png": 2})
    rewrite(path, **fields)
    with pytest.raises(DataError, match=f"images.zip.*{message}" if "compressed" in fields else f"2.png.*{message}"):
        load(path)


def test_duplicate_members(zip_images, load):
    path = zip_images({"1.png": 1})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning):
        archive.writestr("1.png", b"")
    with pytest.raises(DataError, match=r"1.png"):
        load(path)


def test_corrupted_archives(zip_images, load, greys):
    path = zip_images({"1.png": 1, "2.png": 2})
    content = path.read_bytes()
    atomic_write(path, content.replace(b"IDAT", b"IDAT"[::-1], 1))  # of the first: its checksum does not match
    with pytest.raises(DataError, match=r"images.zip/1.png.*CRC"):
        load(path)
    assert greys(load(path, on_error="skip")) == [2]
    atomic_write(path, content[:-30])
    with pytest.raises(DataError, match=r"images.zip"):
        load(path)
    with pytest.raises(DataError, match=r"missing.zip"):
        load(path.with_name("missing.zip"))


def test_archive_without_images(zip_images, load):
    with pytest.raises(DataError, match="no image files"):
        load(zip_images({"1.txt": 1}))


def test_the_central_directory_is_read_once(zip_images, monkeypatch):
    path, opened = zip_images({f"{i}.png": 1 for i in range(20)}), []
    original = zipfile.ZipFile.__init__
    monkeypatch.setattr(zipfile.ZipFile, "__init__", lambda *args: opened.append(args) or original(*args))
    source = open_source(str(path), "train")
    assert len({bytes(source.image(i)) for i in range(20)}) == len(opened) == 1
