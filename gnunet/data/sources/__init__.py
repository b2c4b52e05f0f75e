"""Data sources: what `data.source` may name."""

import logging
import os
from pathlib import Path
from typing import Any

from gnunet.data.sources.array_file import ArrayFile
from gnunet.data.sources.base import Source
from gnunet.data.sources.idx import IdxFolder
from gnunet.data.sources.image_folder import ALL_IMAGE_SUFFIXES, ARRAY_SUFFIXES, ImageFolder
from gnunet.data.sources.metadata import METADATA_FILES
from gnunet.data.sources.tables import ArrowFiles, ParquetFiles, SavedDataset, open_hub_dataset
from gnunet.errors import DataError, did_you_mean_path, expand, may_be_on_hub
from gnunet.files import packaged

log = logging.getLogger(__name__)

SOURCES: list[type[Source]] = [SavedDataset, ParquetFiles, ArrowFiles, IdxFolder, ArrayFile, ImageFolder]
"""The kinds of files and folders; the first that accepts a path reads it."""

NOTO_EMOJI = "noto_emoji"


def open_source(source: str, split: str, **columns: Any) -> Source:
    """Open `data.source`: the embedded data set, a file or folder at that path, or a data set of the hub. `columns` are
    arguments of `Source.choose_columns`.

    Raises:
        DataError: there is no such source, split or column, or it cannot be read.
    """
    path = packaged("assets/noto_emoji/noto_emoji.parquet") if source == NOTO_EMOJI else expand(source)
    if source == NOTO_EMOJI and not path.is_file():
        raise DataError(
            f"data.source: the embedded data set is not at {path}; reinstall gnunet, or give that of a copy"
        )
    if path.is_file() or path.is_dir():
        opened = _open_path(path, split)
    else:
        missing = f"{source!r} is not a file or folder (in {Path.cwd()}){did_you_mean_path(path)}"
        suffixes = (".parquet", ".arrow", ".zip", *ARRAY_SUFFIXES)
        is_name = may_be_on_hub(source) if "/" in source else not source.startswith((".", "~"))
        if not is_name or source.endswith(suffixes):
            raise DataError(f"data.source: {missing}")
        log.warning("data.source: %s; asking the Hugging Face hub", missing)
        opened = open_hub_dataset(source, split)
    opened.choose_columns(**columns)
    return opened


def _open_path(path: Path, split: str) -> Source:
    """The source at the path of a file or folder."""
    files = visible_files(path) if path.is_dir() else [path]
    images = [file for file in files if file.suffix.lower() in ALL_IMAGE_SUFFIXES]
    described = images or [file for file in files if file.suffix.lower() in ARRAY_SUFFIXES]
    candidates = [file for file in files if file.name not in METADATA_FILES] if described else files
    for cls in SOURCES:
        if cls.accepts(path, candidates):
            if path.is_dir() and cls is not ImageFolder and images:
                others = [file for file in files if cls.accepts(path, [file])] or files
                given = f"{path} has images, such as {images[0]}, and {others[0]}, which is read as {cls.__name__}"
                raise DataError(f"data.source: {given}; valid: a folder with one of these, or the path of a table")
            return cls(path, files, split)
    raise DataError(f"data.source: {path} given; valid: a folder, or a .zip, .parquet, .arrow, .npy or .npz file")


def visible_files(folder: Path) -> list[Path]:
    """All files below a folder, sorted; links are followed, hidden files and folders left out.

    A folder that can be reached in several ways counts once, under its own path if that is below `folder`.
    """
    files, seen, linked = [], set(), [str(folder)]
    for root in linked:  # which grows
        for parent, subfolders, names in os.walk(root):
            if (real := os.path.realpath(parent)) in seen:
                subfolders.clear()
                continue
            seen.add(real)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            linked += [path for name in subfolders if os.path.islink(path := os.path.join(parent, name))]
            paths = (os.path.join(parent, name) for name in names if not name.startswith("."))
            files += [Path(path) for path in paths if os.path.isfile(path)]
    return sorted(files)
