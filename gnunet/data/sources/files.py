"""Files of data sources: which there are, which split they belong to, and whether they have changed."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from gnunet.errors import DataError

SPLITS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "t10k": "test",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
}  # fmt: skip
"""Words in the names of files and folders -> the split that they stand for."""


def visible_files(folder: Path) -> list[Path]:
    """All files below a folder, sorted; links are followed, hidden files and folders left out."""
    files, seen = [], set()
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:  # a link to a folder above
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        paths = (os.path.join(parent, name) for name in names if not name.startswith("."))
        files += [Path(path) for path in paths if os.path.isfile(path)]
    return sorted(files)


def file_fingerprint(files: Iterable[Path]) -> list[list]:
    """Path, size and modification time of each file."""
    stats = [(os.path.abspath(file), file.stat()) for file in files]
    return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def choose_split(name: str, found: Mapping[str | None, list], split: str) -> list:
    """The items of one split of the source `name`, from {split: items}; the key None is for items that name no split.

    Raises:
        DataError: there are items of other splits only.
    """
    if set(found) <= {None}:
        return found.get(None, [])
    wanted = split if split in found else SPLITS.get(split, split)
    if wanted not in found:
        known = ", ".join(sorted(key for key in found if key is not None))
        raise DataError(f"data.split: {name} has no split {split!r}; valid: {known}")
    return found[wanted]
