import pytest

from gnunet.files import atomic_directory, atomic_rmtree, atomic_write


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_write_file_replaces_whole_and_leaves_nothing_else(tmp_path):
    atomic_write(tmp_path / "a", "one")
    atomic_write(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_text() == "two"
    assert names(tmp_path) == ["a"]


def test_new_folder_appears_only_when_whole(tmp_path):
    with atomic_directory(tmp_path / "x") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_text("content")
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x" / "sub" / "file").read_text() == "content"
    assert names(tmp_path) == ["x"]


def test_new_folder_that_fails_leaves_the_old_one(tmp_path):
    with atomic_directory(tmp_path / "x") as temporary:
        (temporary / "file").write_text("old")
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "x") as temporary:
        (temporary / "file").write_text("new")
        raise RuntimeError
    assert (tmp_path / "x" / "file").read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_leftovers_of_a_crash_are_in_nobodys_way(tmp_path):
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
