"""The images of a run: those it trains on, those it holds out, and its validation set."""

from dataclasses import dataclass

import numpy as np

from gnunet.config import Config, ValidationConfig, image_kwargs
from gnunet.data import DecodedImages, ValidationSet, load_images, split_rows
from gnunet.training.progress import decode_progress


@dataclass(frozen=True)
class RunData:
    """A table of images and how its rows are split."""

    table: DecodedImages
    train_rows: np.ndarray
    """int64, ascending."""
    validation_rows: np.ndarray
    """int64, ascending; empty if none are held out."""

    def val_set(self, validation: ValidationConfig) -> ValidationSet:
        """The validation set, over training images if none are held out."""
        return ValidationSet(
            self.table, self.validation_rows if len(self.validation_rows) else self.train_rows,
            num_examples=validation.num_examples, num_bins=validation.num_bins,
            log_snr_min=validation.log_snr_min, log_snr_max=validation.log_snr_max,
        )  # fmt: skip


def load_run_data(config: Config) -> RunData:
    """The images that a configuration trains and validates on. Raises DataError if they cannot be loaded."""
    # One process fills the cache, the others wait for it.
    table = load_images(**image_kwargs(config.data), channels=config.model.in_channels, progress=decode_progress())
    return RunData(table, *split_rows(len(table.images), config.data.validation_images))
