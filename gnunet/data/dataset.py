"""Training examples: the images of a table with the draws that belong to each index of the run."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from gnunet.data.example_rng import Draws
from gnunet.data.table import DecodedImages
from gnunet.errors import DataError


class TrainingDataset(Dataset):
    """Example k of a run, for any k >= 0: a pure function of (seed, k), the table and the rows.

    Args:
        table: the decoded images.
        rows: int (n,), the table's rows to train on; each epoch of n examples visits each once.
        seed: the run's seed.
        flip: mirror each example left to right with probability one half.
        label_drop: probability with which an example's label becomes the null label.
        class_conditional: give labels.

    Attributes:
        num_classes: number of classes; 0 where not class_conditional.
        null_label: the label that stands for "no class" (= num_classes).

    Raises:
        DataError: no rows, or labels wanted where the table has none.
    """

    def __init__(
        self,
        table: DecodedImages,
        rows: np.ndarray,
        *,
        seed: int,
        flip: bool,
        label_drop: float = 0.0,
        class_conditional: bool = False,
    ):
        if len(rows) == 0:
            raise DataError("there are no images to train on")
        if class_conditional and table.labels is None:
            raise DataError("data.class_conditional is true, but the data has no labels")
        self.table = table
        self.rows = np.asarray(rows, np.int64)
        self.flip = flip
        self.class_conditional = class_conditional
        self.num_classes = table.num_classes if class_conditional else 0
        self.null_label = self.num_classes
        self._draws = Draws(seed, len(rows), label_drop=label_drop)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """The collated examples with these indices.

        Returns:
            images: uint8 (b, C, H, W), channels_last strides.
            noise: float32 (b, C, H, W), channels_last strides; standard normal.
            u: float64 (b,) in (0, 1), which `Process.noise_level` maps to noise levels.
            index: int64 (b,), the indices.
            labels: int64 (b,), null_label where dropped; only if class_conditional.
        """
        draws = self._draws.examples(indices)
        rows = self.rows[draws.rows]
        images = np.asarray(self.table.images[rows])
        if self.flip:
            images[draws.flip] = images[draws.flip, :, ::-1]
        noise = np.empty(images.shape, np.float32)
        self._draws.fill_noise(indices, noise)
        batch = {
            "images": channels_last(images),
            "noise": channels_last(noise),
            "u": torch.from_numpy(draws.u),
            "index": torch.tensor(indices, dtype=torch.int64),
        }
        if self.class_conditional:
            batch["labels"] = torch.from_numpy(np.where(draws.drop, self.null_label, self.table.labels[rows]))
        return batch

    def rows_of(self, indices: Sequence[int]) -> list[int]:
        """The table's rows, 0 for its first image, that the examples with these indices show."""
        return self.rows[self._draws.examples(indices).rows].tolist()


def channels_last(array: np.ndarray) -> torch.Tensor:
    """View a C-contiguous (b, H, W, C) array as a (b, C, H, W) tensor in channels_last memory format."""
    return torch.from_numpy(array).permute(0, 3, 1, 2)
