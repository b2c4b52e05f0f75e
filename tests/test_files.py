import pytest

from gnunet.files import atomic_directory, atomic_rmtree, atomic_write


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_atomic_write_replaces_and_leaves_no_temporary_file(tmp_path):
    atomic_write(tmp_path / "a", "one")
    atomic_write(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_text() == "two"
    assert names(tmp_path) == ["a"]


def test_atomic_directory_appears_only_when_complete(tmp_path):
    with atomic_directory(tmp_path / "x") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_text("content")
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x" / "sub" / "file").read_text() == "content"
    assert names(tmp_path) == ["x"]


def test_atomic_directory_that_fails_leaves_the_old_one(tmp_path):
    with atomic_directory(tmp_path / "x") as temporary:
        (temporary / "file").write_text("old")
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "x") as temporary:
        (temporary / "file").write_text("new")
        raise RuntimeError
    assert (tmp_path / "x" / "file").read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_leftovers_of_a_crash_are_replaced(tmp_path):
    (tmp_path / ".x.tmp").mkdir()
    (tmp_path / ".x.tmp" / "stale").write_text("stale")
    (tmp_path / ".x.removed").mkdir()
    for content in ("old", "new"):
        with atomic_directory(tmp_path / "x") as temporary:
            (temporary / "file").write_text(content)
    assert names(tmp_path / "x") == ["file"]
    assert (tmp_path / "x" / "file").read_text() == "new"
    atomic_rmtree(tmp_path / "x")
    assert names(tmp_path) == []
