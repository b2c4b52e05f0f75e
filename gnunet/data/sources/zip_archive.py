"""Zip archives, read in place: nothing is extracted."""

import os
import zipfile
from pathlib import Path, PurePosixPath

from gnunet.data.decode import MAX_FILE_BYTES
from gnunet.data.sources.idx import MAX_DEFLATE_RATIO
from gnunet.errors import as_data_error, truncate


def open_zip(path: Path) -> tuple[zipfile.ZipFile, dict[Path, zipfile.ZipInfo]]:
    """An archive, and its members by path, which begins with the archive's own; hidden ones are left out.

    Raises:
        DataError: it cannot be read, or has a member that is not safe or not possible to read, or two of one name.
    """
    members: dict[Path, zipfile.ZipInfo] = {}
    packed, size = 0, os.path.getsize(path)
    with as_data_error(path):
        archive = zipfile.ZipFile(path)
        for info in archive.infolist():
            name = PurePosixPath(info.filename.replace("\\", "/"))
            file = path.joinpath(*name.parts)
            packed += info.compress_size
            limit = min(MAX_FILE_BYTES, MAX_DEFLATE_RATIO * info.compress_size)
            problem = (
                "leaves the folder" if any(part in ("..", "/") or part.endswith(":") for part in name.parts)
                else "is there twice" if file in members
                else "is encrypted" if info.flag_bits & 1
                else f"is compressed by method {info.compress_type}, not by deflate" if info.compress_type not in (0, 8)
                else f"has {info.file_size} bytes, but at most {limit} are valid" if info.file_size > limit
                else "overlaps another" if packed > size
                else None
            )  # fmt: skip
            if problem:
                raise ValueError(f"the member {truncate(info.filename)!r} {problem}")
            if not info.is_dir() and not any(part.startswith(".") for part in name.parts):
                members[file] = info
    return archive, members
