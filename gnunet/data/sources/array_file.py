"""One array of all images in NumPy's format."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from gnunet.data.decode import MAX_FILE_BYTES, ArrayCell, load_array
from gnunet.data.sources.base import Name, Source, choose_split, file_fingerprint, split_of_file
from gnunet.data.sources.idx import MAX_DEFLATE_RATIO
from gnunet.data.sources.image_folder import ARRAY_SUFFIXES
from gnunet.errors import DataError, as_data_error


class ArrayFile(Source):
    """A .npy file of (N, C, H, W), (N, H, W, C) or (N, H, W), mapped into memory; or a .npz of such arrays and labels,
    (N,) or (N, 1), by split if their names say one, as MedMNIST's train_images and train_labels do."""

    def __init__(self, path: Path, files: list[Path], split: str) -> None:
        self.name, self._path, self._split = str(path), path, split
        self.fingerprint = file_fingerprint([path])
        with as_data_error(path):
            self._file: Any = np.load(path, mmap_mode="r", allow_pickle=False)
            self._shapes = (
                {"image": self._file.shape}
                if isinstance(self._file, np.ndarray)
                else {name: self._open(name)[1] for name in self._file.files}
            )

    @classmethod
    def accepts(cls, path: Path, files: list[Path]) -> bool:
        return path.is_file() and path.suffix.lower() in ARRAY_SUFFIXES

    def _open(self, name: str) -> tuple[IO[bytes], tuple[int, ...], bool, np.dtype]:
        """An array of a .npz at its first value, with its shape, whether it is in Fortran's order, and dtype."""
        info = self._file.zip.getinfo(f"{name}.npy")
        file, size = self._file.zip.open(info), min(info.file_size, MAX_DEFLATE_RATIO * info.compress_size)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, is_fortran, dtype = read[np.lib.format.read_magic(file)](file)
        if math.prod(shape) * dtype.itemsize > size - file.tell():
            raise ValueError(f"{name} announces {dtype} {shape} in {size} bytes")
        return file, shape, is_fortran, dtype

    @property
    def columns(self) -> list[str]:
        return list(self._shapes)

    @property
    def image_columns(self) -> list[str]:
        return [name for name, shape in self._shapes.items() if len(shape) in (3, 4) and min(shape) > 0]

    def choose_columns(self, image_column: Name = None, label_column: Name = None, subset: Iterable[str] = ()) -> None:
        super().choose_columns(image_column, label_column, subset)
        found = defaultdict(list)
        for name in self.columns:
            found[split_of_file(name)].append(name)
        names = [image_column] if image_column else choose_split(self.name, found, self._split)
        images = [name for name in names if name in self.image_columns]
        if len(images) != 1:
            valid = "one of (N, C, H, W), (N, H, W, C) or (N, H, W), or its name as data.image_column"
            raise DataError(f"{self.name} has arrays of the shapes {self._shapes}; valid: {valid}")
        self.image_column = images[0]
        names = found[split_of_file(self.image_column)]
        labels = [name for name in names if self._shapes[name] in ((len(self),), (len(self), 1))]
        self.label_column = label_column or (labels[0] if len(labels) == 1 else None)

    def __len__(self) -> int:
        return self._shapes[self.image_column][0]

    def values(self, column: str) -> Sequence[Any]:
        if column == self.image_column:
            return super().values(column)
        if self._shapes[column][:1] != (len(self),) or len(self._shapes[column]) > 2:
            valid = f"({len(self)},), or ({len(self)}, D) for vectors"
            raise DataError(f"{self.name}: {column!r} has the shape {self._shapes[column]}; valid: {valid}")
        with as_data_error(self._path):
            values = load_array(ArrayCell(self._path, column))
            return values.ravel().tolist() if values.size == len(self) else [*values]

    def iter_images(self, rows: np.ndarray) -> Iterator[Any]:
        with as_data_error(self._path):
            if isinstance(self._file, np.ndarray):
                yield from (np.array(self._file[row]) for row in rows)
                return
            file, (_, *shape), is_fortran, dtype = self._open(self.image_column)
            start, size = file.tell(), math.prod(shape) * dtype.itemsize
            if is_fortran or size > MAX_FILE_BYTES:
                valid = f"C order, and at most {MAX_FILE_BYTES} bytes for each image"
                raise ValueError(f"{self.image_column}: valid: {valid}")
            for row in rows.tolist():  # ascending, so that the file is unpacked once
                file.seek(start + row * size)
                yield np.frombuffer(file.read(size), dtype).reshape(shape)
