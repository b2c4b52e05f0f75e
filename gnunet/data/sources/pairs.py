"""The partners of a source's images."""

from copy import copy
from pathlib import Path

from gnunet.data.sources import ImageFolder, Source, open_source
from gnunet.data.sources.image_folder import ALL
from gnunet.errors import DataError, did_you_mean, first_few, quoted


def open_partners(source: Source, folder: str | None, column: str | None) -> Source:
    """A source with the partner of each of a source's images in the same row.

    They are in a folder, under the relative names of the source's images but for the suffix, or in a column. DataError
    for images without a partner, or a column that does not exist, or holds these images themselves or none.
    """
    if folder is None:
        columns = [name for name in source.image_columns if name != source.image_column]
        if column not in columns:
            valid = quoted(columns) or "data.condition.folder, since it has no other column of images"
            given = f"{column!r} is not another column of images of {source.name}{did_you_mean(column, columns)}"
            raise DataError(f"data.condition.column: {given}; valid: {valid}")
        others = copy(source)
        others.choose_columns(image_column=column)
        return others
    others = open_source(folder, ALL)
    if not isinstance(source, ImageFolder) or not isinstance(others, ImageFolder):
        wrong = others if isinstance(source, ImageFolder) else source
        raise DataError(f"data.condition.folder: {wrong.name} is not a folder of images; valid: a column of it")
    names, found = _names(source), dict(zip(_names(others), others.files, strict=True))
    if missing := [source.describe_row(row) for row, name in enumerate(names) if name not in found]:
        valid = f"a file of the same relative name for each image, such as {names[0]}.png"
        lacking = f"{folder} has no partner of {len(missing)} images, {first_few(missing)}"
        raise DataError(f"data.condition.folder: {lacking}; valid: {valid}")
    if twins := sorted({*others.files} - {*found.values()}):
        raise DataError(f"data.condition.folder: another file is named as {first_few(twins)} but for the suffix")
    others.files = [found[name] for name in names]
    return others


def _names(source: ImageFolder) -> list[str]:
    return [file.relative_to(Path(source.name)).with_suffix("").as_posix() for file in source.files]
