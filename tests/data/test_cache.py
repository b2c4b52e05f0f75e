import json
import logging
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gnunet.data import cache, load_images
from gnunet.data.sources import ImageFolder
from gnunet.errors import DataError


@pytest.fixture
def folder(tmp_path, write_images):
    return write_images(tmp_path / "images", {"x/a.png": 1, "x/b.png": 2, "y/c.png": 3})


@pytest.fixture
def decoded(monkeypatch):
    """Counts the images that are decoded."""
    calls = []

    def decode_all(*arguments, original=cache._decode_all):
        for image in original(*arguments):
            calls.append(image)
            yield image

    monkeypatch.setattr(cache, "_decode_all", decode_all)
    return calls


def caches(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()]


def test_images_are_decoded_once(folder, load, decoded):
    first, second = load(folder), load(folder)
    assert len(decoded) == 3
    assert first.fingerprint == second.fingerprint
    np.testing.assert_array_equal(first.images, second.images)
    assert isinstance(second.images, np.memmap) and not second.images.flags.writeable


def test_anything_that_decides_pixels_or_labels_decodes_again(folder, load, own_cache, write_images):
    changes = ({}, {"resolution": 4}, {"subset": {"label": "x"}}, {"channels": 3}, {"resolution": (8, 4)},
               {"resize": "pad", "resolution": (8, 4)})  # fmt: skip
    fingerprints = {load(folder, **keys).fingerprint for keys in changes}
    write_images(folder, {"x/a.png": 9})
    fingerprints.add(load(folder).fingerprint)
    assert len(fingerprints) == len(caches(own_cache)) == 7


def test_two_equal_sides_are_a_square(folder, load, own_cache):
    assert load(folder, resolution=(8, 8)).fingerprint == load(folder).fingerprint and len(caches(own_cache)) == 1


def test_files_of_another_size_are_named_or_skipped_without_resizing(folder, load):
    Image.new("L", (8, 6), 5).save(folder / "x/odd.png")
    with pytest.raises(DataError, match=r"odd\.png.* 8 x 6 .*data\.resize none: 8 x 8"):
        load(folder, resize="none")
    assert len(load(folder, resize="none", on_error="skip")) == 3


def test_fingerprint_does_not_depend_on_the_path(folder, load):
    before = load(folder).fingerprint
    assert load(folder.rename(folder.parent / "moved")).fingerprint == before


def test_mapped_images_are_pickled_as_their_path(folder, load):
    table = load(folder)
    pickled = pickle.dumps(table)
    np.testing.assert_array_equal(pickle.loads(pickled).images, table.images)
    assert table.images.tobytes() not in pickled


@pytest.mark.parametrize("file", ["images.bin", "labels.bin", "table.json"])
@pytest.mark.parametrize("damage", ["truncated", "longer", "empty", "missing"])
def test_corrupted_cache_is_rebuilt(folder, load, own_cache, decoded, file, damage):
    intact = load(folder)
    damaged = caches(own_cache)[0] / file
    content = damaged.read_bytes()
    damaged.unlink()  # not in place: the mapped images keep the old file
    if damage != "missing":
        damaged.write_bytes({"truncated": content[:-9], "longer": content + content, "empty": b""}[damage])
    rebuilt = load(folder)
    assert len(decoded) == 6
    assert rebuilt.fingerprint == intact.fingerprint
    np.testing.assert_array_equal(rebuilt.images, intact.images)


SHAPES = [{"shape": shape} for shape in (3, [10**13, 8, 8, 1], [3, -8, -8, 1], [3, 64], "3881")]


@pytest.mark.parametrize("metadata", [*SHAPES, "[]", "[" * 100_000, '{"labels": [3]}'], ids=lambda m: str(m)[:30])
def test_metadata_that_does_not_fit_the_cache(folder, load, own_cache, decoded, little_memory, metadata):
    load(folder)
    file = caches(own_cache)[0] / "table.json"
    if isinstance(metadata, dict):
        metadata = json.dumps(json.loads(file.read_text()) | metadata)
    file.write_text(metadata)
    with little_memory():
        load(folder)
    assert len(decoded) == 6


def test_killed_decode_leaves_nothing_behind(folder, load, own_cache, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(cache, "_build", killed)
        load(folder)
    assert caches(own_cache) == []
    name = next(own_cache.glob("*.lock")).name.removesuffix(".lock")
    (own_cache / f".{name}.tmp").mkdir()  # by a process that was killed outright
    load(folder)
    assert [path.name for path in caches(own_cache)] == [name]


def _load(start, results, folder):
    start.wait()
    built = []
    build = cache._build
    cache._build = lambda *arguments: built.append(1) or build(*arguments)
    table = load_images(str(folder), resolution=8, channels=1)
    results.put((len(built), table.images[:, 0, 0, 0].tolist(), table.fingerprint))


def test_concurrent_processes_decode_once(folder, own_cache):
    fork = multiprocessing.get_context("fork")
    start, results = fork.Barrier(4), fork.Queue()
    processes = [fork.Process(target=_load, args=(start, results, folder)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join(timeout=600)
    assert sorted(built for built, *_ in found) == [0, 0, 0, 1]
    assert all(rest == [[1, 2, 3], found[0][2]] for _, *rest in found)
    assert len(caches(own_cache)) == 1


def test_cache_directory(tmp_path, monkeypatch):
    assert cache.cache_folder(str(tmp_path)) == tmp_path
    monkeypatch.setenv("GNUNET_CACHE", str(tmp_path / "g"))
    assert cache.cache_folder(None) == tmp_path / "g"
    monkeypatch.delenv("GNUNET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache.cache_folder(None) == tmp_path / "x" / "gnunet"


def test_cache_that_cannot_be_written(folder, load, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="GNUNET_CACHE"):
        load(folder, cache_dir=str(tmp_path / "file" / "cache"))


def test_source_that_cannot_be_read_is_not_reported_as_a_full_cache(folder, load, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error", "a.png")

    monkeypatch.setattr(ImageFolder, "image", fail)
    with pytest.raises(DataError, match="the data set cannot be read: .*a.png"):
        load(folder)


@pytest.mark.parametrize("limit", ["MAX_PENDING", "MAX_PENDING_BYTES"])
def test_images_keep_their_order_and_progress_counts_them(folder, load, greys, monkeypatch, limit):
    monkeypatch.setattr(cache, limit, 0)
    seen = []
    table = load(folder, progress=lambda done, total: seen.append((done, total)))
    assert greys(table) == [1, 2, 3] and seen == [(1, 3), (2, 3), (3, 3)]


def test_corrupted_image_is_an_error_unless_skipped(folder, load, greys, own_cache, caplog):
    (folder / "x" / "b.png").write_bytes((folder / "x" / "a.png").read_bytes()[:40])
    with pytest.raises(DataError, match="x/b.png cannot be decoded: .*data.on_error"):
        load(folder)
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            table = load(folder, on_error="skip")
        assert "1 corrupted" in caplog.text and "b.png" in caplog.text
        assert (table.skipped, table.labels.tolist(), greys(table)) == (1, [0, 1], [1, 3])
        caplog.clear()
    with pytest.raises(DataError, match="b.png cannot be decoded"):
        load(folder)


def test_all_corrupted_images_are_counted_and_the_first_named(tmp_path, write_images, load, monkeypatch):
    monkeypatch.setattr(cache, "MAX_REPORTED", 2)
    write_images(tmp_path, {"a.png": 1})
    for name in "bcd":
        (tmp_path / f"{name}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="3 corrupted.*b.png.*c.png.*1 more.*data.on_error"):
        load(tmp_path)


def test_classes_whose_images_are_all_skipped_are_left_out(folder, load):
    (folder / "x" / "b.png").unlink()
    (folder / "x" / "a.png").write_bytes(b"no image")
    table = load(folder, on_error="skip")
    assert (table.class_names, table.labels.tolist()) == (("y",), [0])


def test_a_class_for_each_image(tmp_path, write_images, load):
    write_images(tmp_path, {"x/1.png": 1, "y/1.png": 2, "z/1.png": 3})
    assert load(tmp_path).num_classes == 3
    with pytest.raises(DataError, match="each of the 3 images.*data.label_column"):
        load(tmp_path, class_conditional=True)


def test_wrong_labels_are_found_before_images_are_decoded(tmp_path, load, monkeypatch):
    pq.write_table(pa.table({"image": [[[0] * 8] * 8] * 2, "label": ["a", None]}), tmp_path / "a.parquet")
    monkeypatch.setattr(cache, "_build", lambda *_: pytest.fail("decodes"))
    with pytest.raises(DataError, match="row 1 has no label"):
        load(tmp_path, class_conditional=True)


@pytest.mark.parametrize("how", ["written over", "replaced", "files swapped", "folders swapped"])
def test_files_of_equal_names_sizes_and_dates_are_decoded_again(tmp_path, load, greys, how):
    """Bitmaps of one size are files of one size."""
    files = [tmp_path / "images" / name / "1.bmp" for name in "xy"]

    def write(file: Path, value: int) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), value).save(file)
        os.utime(file, (10**9, 10**9))

    for i, file in enumerate(files):
        write(file, i)
    assert greys(load(tmp_path / "images")) == [0, 1]
    if how == "written over":
        write(files[1], 0), write(files[0], 1)
    elif how == "replaced":
        for i, file in enumerate(files):
            write(tmp_path / "new.bmp", 1 - i)
            (tmp_path / "new.bmp").rename(file)
    else:
        a, b = files if how == "files swapped" else [file.parent for file in files]
        a.rename(tmp_path / "aside"), b.rename(a), (tmp_path / "aside").rename(b)
    assert greys(load(tmp_path / "images")) == [1, 0]


def test_corrupted_row_is_named(tmp_path, load):
    pq.write_table(pa.table({"image": [[[0] * 8] * 8, None]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet row 1 cannot be decoded"):
        load(tmp_path)


def test_no_usable_image(tmp_path, load):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(DataError, match="a.png"):
        load(tmp_path, on_error="skip")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet"):
        load(tmp_path / "a.parquet")
