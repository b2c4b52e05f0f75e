"""Data: which image, noise level, noise, flip and label belong to example k of a run."""

from gnunet.data.cache import load_images
from gnunet.data.dataset import TrainingDataset
from gnunet.data.example_rng import Draws, ExampleRandomness, row_order, split_rows
from gnunet.data.loader import MicroBatchSampler, training_loader
from gnunet.data.table import DecodedImages
from gnunet.data.validation import ValidationSet

__all__ = [
    "Draws",
    "ExampleRandomness",
    "DecodedImages",
    "MicroBatchSampler",
    "TrainingDataset",
    "ValidationSet",
    "load_images",
    "row_order",
    "split_rows",
    "training_loader",
]
