"""Which data source `data.source` names."""

from pathlib import Path

import gnunet
from gnunet.data.sources import tables
from gnunet.data.sources.base import Source, visible_files
from gnunet.data.sources.folder import IdxFolder, ImageFolder
from gnunet.errors import DataError

NOTO_EMOJI = "noto_emoji"


def open_source(source: str, split: str) -> Source:
    """Open `data.source`: the embedded data, then what lies at that path, then a hub data set.

    Raises:
        DataError: nothing is there, or it cannot be read; the message names what was tried.
    """
    if source == NOTO_EMOJI:
        return _embedded()
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in (".parquet", ".arrow"):
            raise DataError(f"data.source is {source!r}, a file that is neither .parquet nor .arrow")
        return tables.open_table_files(path, [path], split)
    if path.is_dir():
        return _open_folder(path, split)
    if source.startswith((".", "/", "~")) or path.suffix in (".parquet", ".arrow") or source.count("/") > 1:
        raise DataError(f"data.source is {source!r}, but there is no such file or folder (looked at {path.absolute()})")
    return tables.open_hub_dataset(source, split)


def _embedded() -> Source:
    file = Path(gnunet.__file__).parent.parent / "assets" / "noto_emoji" / "noto_emoji.parquet"
    if not file.is_file():
        raise DataError(
            f"the embedded data set is not at {file}: it comes with the repository, not with an installed "
            "package. Run from a clone (pip install -e .), or set data.source to the file's path there"
        )
    return tables.ParquetFiles(NOTO_EMOJI, [file])


def _open_folder(folder: Path, split: str) -> Source:
    if tables.is_saved_dataset(folder):
        return tables.open_saved_dataset(folder, split)
    files = visible_files(folder)
    if table_files := [file for file in files if file.suffix in (".parquet", ".arrow")]:
        return tables.open_table_files(folder, table_files, split)
    if IdxFolder.accepts(files):
        return IdxFolder(folder, split)
    return ImageFolder(folder, split)
