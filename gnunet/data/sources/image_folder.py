"""A folder or zip archive of image files."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gnunet.data.decode import ArrayCell
from gnunet.data.sources.base import Name, Source, choose_split, file_fingerprint, split_of_file, split_of_folder
from gnunet.data.sources.metadata import MAX_METADATA_BYTES, METADATA_FILES, read_metadata
from gnunet.data.sources.tables import LABEL_COLUMNS, find_column
from gnunet.data.sources.zip_archive import open_zip
from gnunet.errors import DataError, as_data_error, first_few, first_line

IMAGE_SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".avif", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
OTHER_IMAGE_SUFFIXES = (
    ".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".svg", ".svgz", ".psd", ".psb",
    ".ai", ".eps", ".xcf", ".kra", ".ico", ".icns", ".cur", ".tga", ".dds", ".exr", ".hdr", ".pfm", ".pcx", ".sgi",
    ".xbm", ".xpm", ".wmf", ".emf", ".dcm", ".dng", ".raw", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf",
    ".sr2", ".orf", ".rw2", ".raf", ".pef", ".srw", ".rwl", ".3fr", ".iiq", ".x3f", ".dcr", ".kdc", ".erf", ".mrw",
    ".mef",
)  # fmt: skip
"""Suffixes of images in formats that are not read."""
ARRAY_SUFFIXES = (".npy", ".npz")
ALL_IMAGE_SUFFIXES = frozenset((*IMAGE_SUFFIXES, *OTHER_IMAGE_SUFFIXES))
ALL = "all"  # the value of `data.split` with which no folder's name is taken for a split


class ImageFolder(Source):
    """The image files below a folder or in a zip archive, or its .npy and .npz files if these are more. If all of
    them lie in subfolders, the top subfolder's name is the label, in addition to the columns that METADATA_FILES
    in the folders have.

    If folders are named after splits (train, test, val, ...), at the top or below, only the requested split is read;
    the folders in it, or else those around it, are the classes. One such folder beside others may be a class (a train
    among vehicles) or a split: that is an error, unless the split is ALL, which reads everything.
    """

    def __init__(self, path: Path, files: list[Path], split: str) -> None:
        self.name, self._members, self._array_name, above = str(path), None, None, len(path.parts)
        if not path.is_dir():
            self._zip, self._members = open_zip(path)
            files = sorted(self._members)
            # Of the folders that hold everything, those above one of a split's name do not count.
            common = Path(os.path.commonpath({file.parent for file in files} or {path})).parts[above:]
            above += next((i for i, name in enumerate(common) if split_of_folder(name)), len(common))
        suffixes = {file: file.suffix.lower() for file in files}
        images = [file for file, suffix in suffixes.items() if suffix in ALL_IMAGE_SUFFIXES]
        # Not statistics beside images; but not a picture of them beside arrays either.
        arrays = [file for file, suffix in suffixes.items() if suffix in ARRAY_SUFFIXES]
        images = arrays if len(arrays) > len(images) else images
        folders = {file: file.parts[above:-1] for file in images}
        if split != ALL:
            images = self._in_split(images, folders, split)
        parents = {folder for file in {file.parent for file in images} for folder in (file, *file.parents)}
        tables = [file for file in files if file.name in METADATA_FILES and file.parent in parents]
        columns = read_metadata({file: self._read(file) for file in tables}, folders) or {"image": images}
        rows = {file: row for row, file in enumerate(next(iter(columns.values())))}
        named = {value for values in columns.values() for value in values if isinstance(value, Path)}
        is_read = {file: suffixes[file] in (*IMAGE_SUFFIXES, *ARRAY_SUFFIXES) and file in named for file in images}
        self.files: list[Path | None] = [file for file in images if is_read[file] and file in rows]
        self._columns = {name: [values[rows[file]] for file in self.files] for name, values in columns.items()}
        self.unreadable = [file for file in images if not is_read[file]]
        others = [suffixes[file] for file in files if file not in folders and file.name not in METADATA_FILES]
        self.unread = Counter(suffix or "no suffix" for suffix in (*map(suffixes.get, self.unreadable), *others))
        if not self.files:
            found = f"; it has {first_few(self.unreadable)}, of a format that is not read" if self.unreadable else ""
            valid = f"images ({' '.join(IMAGE_SUFFIXES)}), idx files, .npy, .npz, .parquet or .arrow files"
            raise DataError(f"{path} has no image files{found}; valid: {valid}")
        tops = [next(iter(folders[file]), None) for file in self.files]
        if None not in tops and find_column(list(columns), LABEL_COLUMNS) is None:
            self._columns["label"] = tops
        read = [file for file in images if is_read[file]]
        self.fingerprint = file_fingerprint([*read, *tables] if self._members is None else [path])

    def _in_split(self, images: list[Path], folders: dict[Path, tuple[str, ...]], split: str) -> list[Path]:
        """The images of a split; takes its folder, and those above it that all images share, out of `folders`."""
        found: dict[str | None, list] = defaultdict(list)
        depth: dict[Path, int | None] = {}
        for file in images:
            splits = [split_of_folder(name) for name in folders[file]]
            depth[file] = next((i for i, name in enumerate(splits) if name), None)
            found[None if depth[file] is None else splits[depth[file]]].append(file)
        named = [name for name in found if name]
        if not named:  # perhaps names such as DIV2K_train_HR and DIV2K_valid_HR
            loosely: dict[str | None, list] = defaultdict(list)
            for file in images:
                loosely[split_of_file(folders[file][0]) if folders[file] else None].append(file)
            if len(set(loosely) - {None}) > 1:
                found, depth = loosely, {file: 0 for name in loosely if name for file in loosely[name]}
        beside = sorted({folders[file][0] for file in found.get(None, ()) if folders[file]})
        if beside and set(found) != {None} and len(named) < 2:
            own = folders[next(file for name in found if name for file in found[name])]
            other = "" if self._members is not None else f"; or another data.source, such as {Path(self.name, *own)}"
            valid = f"{ALL}, with which each folder is a class{other}"
            given = f"{self.name} has a folder {os.sep.join(own)} beside {first_few(beside)}"
            raise DataError(f"data.split: {given}, which may be a split or a class; valid: {valid}")
        hint = f"; or {ALL}, with which each folder is a class" if set(found) != {None} else ""
        chosen = choose_split(self.name, found, split, hint)
        above = {folders[file][:i] for file, i in depth.items() if i is not None}
        for file in chosen:
            if (i := depth.get(file)) is not None:
                folders[file] = (folders[file][:i] if len(above) > 1 else ()) + folders[file][i + 1 :]
        return chosen

    @classmethod
    def accepts(cls, path: Path, files: list[Path]) -> bool:
        return path.is_dir() or path.suffix.lower() == ".zip"

    def _read(self, file: Path) -> bytes:
        """The content of a metadata file."""
        with as_data_error(file):
            size = os.path.getsize(file) if self._members is None else self._members[file].file_size
            if size > MAX_METADATA_BYTES:
                raise ValueError(f"{size} bytes; valid: at most {MAX_METADATA_BYTES}")
            return file.read_bytes() if self._members is None else self._zip.read(self._members[file])

    def __len__(self) -> int:
        return len(self.files)

    def image(self, row: int) -> Any:
        if (file := self.files[row]) is None:
            return None
        try:
            content = file if self._members is None else self._zip.read(self._members[file])
        except Exception as error:  # of any kind, if the archive is corrupted
            return ValueError(first_line(error))
        return ArrayCell(content, self._array_name) if file.suffix.lower() in ARRAY_SUFFIXES else content

    def labels(self) -> Sequence[Any] | None:
        return self._columns.get(self.label_column or "")

    @property
    def columns(self) -> list[str]:
        return list(self._columns)

    @property
    def image_columns(self) -> list[str]:
        return [name for name, cells in self._columns.items() if all(isinstance(cell, Path | None) for cell in cells)]

    def choose_columns(self, image_column: Name = None, label_column: Name = None, subset: Iterable[str] = ()) -> None:
        if image_column not in self.columns and self.files[0].suffix.lower() == ".npz":
            self._array_name, image_column = image_column, None
        super().choose_columns(image_column, label_column or find_column(self.columns, LABEL_COLUMNS), subset)
        self.files = self._columns[self.image_column]

    def values(self, column: str) -> Sequence[Any]:
        return [str(value) if isinstance(value, Path) else value for value in self._columns[column]]

    def describe_row(self, row: int) -> str:
        return str(self.files[row] or f"what belongs to {self._columns[self.columns[0]][row]}")
