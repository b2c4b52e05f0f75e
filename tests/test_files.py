import os

import pytest
import torch
from safetensors.torch import save_file

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


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_permissions_are_those_of_the_umask(tmp_path, umask):
    """Also those of safetensors files, which are created for their owner alone."""
    (private := tmp_path.parent / f"private{umask}").touch(0o600)
    before = os.umask(umask)
    try:
        atomic_write(tmp_path / "file", "content")
        with atomic_directory(tmp_path / "x") as temporary:
            (temporary / "sub").mkdir()
            save_file({"weight": torch.zeros(1)}, temporary / "sub" / "weights")
            (temporary / "link").symlink_to(private)
    finally:
        os.umask(before)
    assert private.stat().st_mode & 0o777 == 0o600
    modes = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if not path.is_symlink()}
    assert modes == {path: (0o777 if path.is_dir() else 0o666) & ~umask for path in modes}
    assert len(modes) == 4


def test_files_of_others_stay_in_a_directory(tmp_path):
    old, outside = tmp_path / "x", tmp_path / "outside"
    for name in ("own", "sub/own", "README.md", ".git/objects/00", "sub/notes"):
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        (old / name).write_text("old " + name)
    outside.write_text("outside")
    (old / "link").symlink_to(outside)
    (old / "dangling").symlink_to("nowhere")
    os.mkfifo(old / "pipe")
    for _ in range(2):
        with atomic_directory(old, keep_others=True) as temporary:
            (temporary / "sub").mkdir()
            for name in ("own", "sub/own", "sub/new"):
                (temporary / name).write_text("new " + name)
    contents = {str(path.relative_to(old)): path.read_text() for path in old.rglob("*") if path.is_file()}
    assert contents == {
        "own": "new own", "sub/own": "new sub/own", "sub/new": "new sub/new", "README.md": "old README.md",
        ".git/objects/00": "old .git/objects/00", "sub/notes": "old sub/notes", "link": "outside",
    }  # fmt: skip
    assert (old / "link").is_symlink() and os.readlink(old / "dangling") == "nowhere" and (old / "pipe").is_fifo()
    assert names(tmp_path) == ["outside", "x"]


@pytest.mark.parametrize(("existing", "written"), [("a/b", "a"), ("a", "a/b"), (None, "a")])
def test_what_is_of_another_kind_is_in_the_way(tmp_path, existing, written):
    """A file where a directory is to be written, or the reverse."""
    occupied = tmp_path / "x" / existing if existing else tmp_path / "x"
    occupied.parent.mkdir(parents=True, exist_ok=True)
    occupied.write_text("old")
    with pytest.raises(OSError) as raised, atomic_directory(tmp_path / "x", keep_others=True) as temporary:
        (temporary / written).parent.mkdir(exist_ok=True)
        (temporary / written).write_text("new")
    assert str(raised.value.filename).startswith((str(tmp_path / "x"), str(tmp_path / ".x.tmp")))
    assert occupied.read_text() == "old" and names(tmp_path) == ["x"]
