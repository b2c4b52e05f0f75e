import logging
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gnunet.data import cache, load_images
from gnunet.errors import DataError


@pytest.fixture
def folder(tmp_path, write_images):
    return write_images(tmp_path / "images", {"x/a.png": 1, "x/b.png": 2, "y/c.png": 3})


@pytest.fixture
def decoded(monkeypatch):
    """Counts the images that are decoded."""
    calls = []
    original = cache.decode.decode_image
    monkeypatch.setattr(cache.decode, "decode_image", lambda *a: calls.append(a) or original(*a))
    return calls


class Marker:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def caches(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()]


def test_decodes_once(folder, config, decoded):
    first, second = load_images(**config(folder), channels=1), load_images(**config(folder), channels=1)
    assert len(decoded) == 3
    assert first.fingerprint == second.fingerprint
    np.testing.assert_array_equal(first.images, second.images)
    assert isinstance(second.images, np.memmap) and not second.images.flags.writeable


def test_anything_that_decides_pixels_or_labels_decodes_anew(folder, config, own_cache, write_images):
    fingerprints = {load_images(**config(folder), channels=1).fingerprint}
    for keys in ({"resolution": 4}, {"subset": {"label": "x"}}):
        fingerprints.add(load_images(**config(folder, **keys), channels=1).fingerprint)
    fingerprints.add(load_images(**config(folder), channels=3).fingerprint)
    write_images(folder, {"x/a.png": 9})
    fingerprints.add(load_images(**config(folder), channels=1).fingerprint)
    assert len(fingerprints) == len(caches(own_cache)) == 5


def test_fingerprint_does_not_depend_on_where_the_data_lies(folder, config):
    before = load_images(**config(folder), channels=1).fingerprint
    assert load_images(**config(folder.rename(folder.parent / "moved")), channels=1).fingerprint == before


@pytest.mark.parametrize("file", ["images.npy", "labels.npy", "table.json"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_torn_cache_is_rebuilt(folder, config, own_cache, decoded, file, damage):
    whole = load_images(**config(folder), channels=1)
    torn = caches(own_cache)[0] / file
    content = torn.read_bytes()
    torn.unlink()  # not in place: the mapped table keeps the old file
    if damage != "missing":
        torn.write_bytes(content[: len(content) - 5 if damage == "truncated" else 0])
    rebuilt = load_images(**config(folder), channels=1)
    assert len(decoded) == 6
    assert rebuilt.fingerprint == whole.fingerprint
    np.testing.assert_array_equal(rebuilt.images, whole.images)


@pytest.mark.parametrize("file", ["images.npy", "labels.npy"])
@pytest.mark.parametrize(
    "content",
    ["pickle", "objects", {"shape": (10**13,)}, {"shape": (3, 10**12, 8, 1), "descr": "|u1"}, {"shape": (-1,)}],
    ids=str,
)
def test_hostile_cache_is_rebuilt(folder, config, own_cache, decoded, tmp_path, little_memory, file, content):
    """Nothing in a cache is unpickled, and no memory taken for what a header only says."""
    whole = load_images(**config(folder), channels=1)
    torn = caches(own_cache)[0] / file
    torn.unlink()
    evil = np.array([Marker(tmp_path / "marker")], object)
    with open(torn, "wb") as out:
        if content == "pickle":
            pickle.dump(evil[0], out)
        elif content == "objects":
            np.save(out, evil, allow_pickle=True)
        else:
            np.lib.format.write_array_header_1_0(out, {"descr": "<i8", "fortran_order": False, **content})
    with little_memory():
        rebuilt = load_images(**config(folder), channels=1)
    assert len(decoded) == 6 and rebuilt.fingerprint == whole.fingerprint
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, '{"shape": 3}', '{"has_labels": true}', "{}"])
def test_descriptions_of_a_cache_that_are_none(folder, config, own_cache, decoded, text):
    load_images(**config(folder), channels=1)
    (caches(own_cache)[0] / "table.json").write_text(text)
    load_images(**config(folder), channels=1)
    assert len(decoded) == 6


def test_killed_decode_leaves_nothing_behind(folder, config, own_cache, monkeypatch):
    def killed(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "_build", killed)
    with pytest.raises(KeyboardInterrupt):
        load_images(**config(folder), channels=1)
    assert caches(own_cache) == []
    monkeypatch.undo()
    monkeypatch.setenv("GNUNET_CACHE", str(own_cache))
    name = next(own_cache.glob("*.lock")).name.removesuffix(".lock")
    (own_cache / f"{name}.tmp-left").mkdir()  # by a process that was killed outright
    load_images(**config(folder), channels=1)
    assert [path.name for path in caches(own_cache)] == [name]


def _load(start, results, config):
    start.wait()
    built = []
    build = cache._build
    cache._build = lambda *arguments, **keywords: built.append(1) or build(*arguments, **keywords)
    table = load_images(**config, channels=1)
    results.put((len(built), table.images[:, 0, 0, 0].tolist(), table.fingerprint))


def test_processes_at_once_decode_once(folder, config, own_cache):
    fork = multiprocessing.get_context("fork")
    start, results = fork.Barrier(4), fork.Queue()
    processes = [fork.Process(target=_load, args=(start, results, config(folder))) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join(timeout=600)
    assert sorted(built for built, *_ in found) == [0, 0, 0, 1]
    assert all(rest == [[1, 2, 3], found[0][2]] for _, *rest in found)
    assert len(caches(own_cache)) == 1


def test_where_the_cache_is(tmp_path, monkeypatch):
    assert cache.cache_folder(str(tmp_path)) == tmp_path
    monkeypatch.setenv("GNUNET_CACHE", str(tmp_path / "g"))
    assert cache.cache_folder(None) == tmp_path / "g"
    monkeypatch.delenv("GNUNET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache.cache_folder(None) == tmp_path / "x" / "gnunet"


def test_cache_that_cannot_be_written(folder, config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written.*GNUNET_CACHE"):
        load_images(**config(folder, cache_dir=str(tmp_path / "file" / "cache")), channels=1)


def test_progress(folder, config):
    seen = []
    load_images(**config(folder), channels=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_broken_image_stops(folder, config, own_cache):
    (folder / "x" / "b.png").write_bytes((folder / "x" / "a.png").read_bytes()[:40])
    with pytest.raises(DataError, match="x/b.png cannot be decoded: .*data.on_error to skip"):
        load_images(**config(folder), channels=1)
    assert caches(own_cache) == []


def test_broken_image_is_left_out_and_counted(folder, config, caplog):
    (folder / "x" / "b.png").write_bytes(b"")
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            table = load_images(**config(folder, on_error="skip"), channels=1)
        assert "left out 1 broken images" in caplog.text and "b.png" in caplog.text
        assert (table.skipped, len(table), table.labels.tolist()) == (1, 2, [0, 1])
        assert table.images[:, 0, 0, 0].tolist() == [1, 3]
        caplog.clear()
    with pytest.raises(DataError, match="b.png cannot be decoded"):
        load_images(**config(folder, on_error="raise"), channels=1)


def test_broken_row_is_named(tmp_path, config):
    pq.write_table(pa.table({"image": [[[0] * 8] * 8, None]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet row 1 cannot be decoded: no image"):
        load_images(**config(tmp_path), channels=1)


def test_nothing_usable(tmp_path, config):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(DataError, match="no usable image; the first: .*a.png"):
        load_images(**config(tmp_path, on_error="skip"), channels=1)
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has no row"):
        load_images(**config(tmp_path / "a.parquet"), channels=1)


def test_a_source_that_cannot_be_read_is_not_called_a_full_cache(folder, config, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error", "a.png")

    monkeypatch.setattr("gnunet.data.cache.islice", fail)
    with pytest.raises(DataError, match="the data set cannot be read: .*a.png"):
        load_images(**config(folder), channels=1)
