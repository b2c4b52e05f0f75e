"""A folder of image files."""

import os
from collections import Counter, defaultdict
from pathlib import Path

from gnunet.data.sources.base import Source, choose_split, file_fingerprint, split_of_file, split_of_folder
from gnunet.errors import DataError, first_few

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
_ANY_IMAGE_SUFFIX = frozenset((*IMAGE_SUFFIXES, *OTHER_IMAGE_SUFFIXES))
ALL = "all"
"""The value of `data.split` with which no folder's name is taken for a split."""


class ImageFolder(Source):
    """The image files below a folder. If all of them lie in subfolders, the top subfolder's name is the label.

    If folders are named after splits (train, test, val, ...), at the top or below, only the requested split is read;
    the folders in it, or else those around it, are the classes. One such folder beside others may be a class (a train
    among vehicles) or a split: that is an error, unless the split is ALL, which reads everything.
    """

    def __init__(self, path: Path, files: list[Path], split: str) -> None:
        self.name = str(path)
        suffixes = {file: file.suffix.lower() for file in files}
        images = [file for file, suffix in suffixes.items() if suffix in _ANY_IMAGE_SUFFIX]
        above = len(path.parts)
        folders = {file: file.parts[above:-1] for file in images}
        if split != ALL:
            images = self._in_split(images, folders, split)
        self.files = [file for file in images if suffixes[file] in IMAGE_SUFFIXES]
        self.unreadable = [file for file in images if suffixes[file] not in IMAGE_SUFFIXES]
        others = [suffix for suffix in suffixes.values() if suffix not in _ANY_IMAGE_SUFFIX]
        self.unread = Counter(suffix or "no suffix" for suffix in (*map(suffixes.get, self.unreadable), *others))
        if not self.files:
            found = f"; it has {first_few(self.unreadable)}, of a format that is not read" if self.unreadable else ""
            raise DataError(
                f"{path} has no image files ({' '.join(IMAGE_SUFFIXES)}), no idx files and no .parquet or .arrow files"
                f"{found}"
            )
        tops = [next(iter(folders[file]), None) for file in self.files]
        self._labels = None if None in tops else tops
        self.fingerprint = file_fingerprint(self.files)

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
            raise DataError(
                f"data.split: {self.name} has a folder {os.sep.join(own)} beside {first_few(beside)}, which may be a "
                f"split or a class; valid: {ALL}, with which each folder is a class; or another data.source, such as "
                f"{Path(self.name, *own)}"
            )
        hint = f"; or {ALL}, with which each folder is a class" if set(found) != {None} else ""
        chosen = choose_split(self.name, found, split, hint)
        above = {folders[file][:i] for file, i in depth.items() if i is not None}
        for file in chosen:
            if (i := depth.get(file)) is not None:
                folders[file] = (folders[file][:i] if len(above) > 1 else ()) + folders[file][i + 1 :]
        return chosen

    @classmethod
    def accepts(cls, path: Path, files: list[Path]) -> bool:
        return path.is_dir()

    def __len__(self) -> int:
        return len(self.files)

    def image(self, row: int) -> Path:
        return self.files[row]

    def labels(self) -> list[str | None] | None:
        return self._labels

    def describe_row(self, row: int) -> str:
        return str(self.files[row])


def is_image_name(file: Path) -> bool:
    """Whether a file is an image by its name, of a format that is read or of another."""
    return file.suffix.lower() in _ANY_IMAGE_SUFFIX
