"""The randomness of a run's examples, and the rows that are held out of training."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from gnunet.errors import DataError
from gnunet.random_streams import Stream, StreamKey, generator


@lru_cache(maxsize=2)  # a batch spans two epochs at most
def row_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """The order in which an epoch visits the rows: a permutation of 0..num_rows-1, int64 (num_rows,)."""
    return generator(seed, StreamKey.ROW, epoch).permutation(num_rows)


def split_rows(
    num_rows: int, validation_images: int, labels: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Split rows into those to train on and those held out, both ascending int64, independent of a run's seed.

    With `labels`, int (num_rows,), one row of each class stays to train on.

    Raises:
        DataError: no rows would be left to train on.
    """
    order = generator(0, StreamKey.HOLDOUT, 0).permutation(num_rows)
    kept = min(1, num_rows)
    if labels is not None and num_rows:
        _, last = np.unique(labels[order[::-1]], return_index=True)  # those that are drawn last
        last = num_rows - 1 - last
        order, kept = np.append(np.delete(order, last), order[last]), len(last)
    if validation_images > num_rows - kept:
        what = "images" if labels is None else f"images of each of the {kept} classes"
        raise DataError(
            f"data.validation_images: {validation_images} given, for {num_rows} images in all; valid: 0 to "
            f"{num_rows - kept}, so that {what} to train on are left"
        )
    return np.sort(order[validation_images:]), np.sort(order[:validation_images])


class ExampleRandomness(NamedTuple):
    """What is drawn for a list of examples apart from their noise; arrays of one length."""

    rows: np.ndarray  # int64, 0..num_rows-1
    flip: np.ndarray  # bool, true with probability 1/2
    u: np.ndarray  # float64 in (0, 1), which `Process.noise_level` maps to noise levels
    drop: np.ndarray  # float64 in [0, 1), below the probability with which a label or a condition is dropped


class ExampleRNG:
    """Draws a run's examples; example k is a pure function of (seed, k) and num_rows.

    Each epoch of num_rows examples visits every row once, in a different order.
    """

    def __init__(self, seed: int, num_rows: int):
        self.seed = seed
        self.num_rows = num_rows
        self._example = Stream(seed, StreamKey.EXAMPLE)
        self._noise = Stream(seed, StreamKey.NOISE)

    def examples(self, indices: Sequence[int]) -> ExampleRandomness:
        raw = np.empty((len(indices), 3), np.uint64)
        rows = np.empty(len(indices), np.int64)
        for i, index in enumerate(indices):
            raw[i] = self._example.raw(index, 3)
            epoch, position = divmod(index, self.num_rows)
            rows[i] = row_order(self.seed, epoch, self.num_rows)[position]
        return ExampleRandomness(
            rows=rows,
            # 52 bits and a half: exact in a double, never 0 or 1, where quantile functions are infinite.
            u=((raw[:, 0] >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52,
            flip=(raw[:, 1] >> np.uint64(63)).astype(bool),
            drop=(raw[:, 2] >> np.uint64(11)).astype(np.float64) * 2.0**-53,
        )

    def fill_noise(self, indices: Sequence[int], out: np.ndarray) -> None:
        """Write the examples' standard normal noise to `out`, C-contiguous float32 (b, H, W, C)."""
        for index, noise in zip(indices, out, strict=True):
            self._noise.at(index).standard_normal(dtype=np.float32, out=noise)
