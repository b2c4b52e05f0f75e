"""A folder of image files."""

from pathlib import Path

from gnunet.data.sources.base import SPLITS, Source, choose_split, file_fingerprint
from gnunet.errors import DataError

IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif",
    ".ppm", ".pgm", ".pbm",
)  # fmt: skip


class ImageFolder(Source):
    """The image files below a folder. If all of them lie in subfolders, the top subfolder's name is the label.

    If all top subfolders are named after splits (train, test, val, ...), that of the requested split is read, and the
    folders in it are the classes.
    """

    def __init__(self, path: Path, files: list[Path], split: str) -> None:
        self.name = str(path)
        self.files = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        if not self.files:
            raise DataError(
                f"{path} has no image files ({' '.join(IMAGE_SUFFIXES)}), no idx files and no .parquet or .arrow files"
            )
        tops = self._top_folders(path)
        if all(top is not None and top.lower() in SPLITS for top in tops):
            found: dict[str | None, list] = {SPLITS[top.lower()]: [top] for top in tops if top}
            path = path / choose_split(self.name, found, split)[0]
            self.files = [file for file in self.files if path in file.parents]
            tops = self._top_folders(path)
        self._labels = None if None in tops else tops
        self.fingerprint = file_fingerprint(self.files)

    def _top_folders(self, folder: Path) -> list[str | None]:
        """The subfolder of `folder` that each file lies in; None for one in `folder` itself."""
        parts = (file.relative_to(folder).parts for file in self.files)
        return [part[0] if len(part) > 1 else None for part in parts]

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
