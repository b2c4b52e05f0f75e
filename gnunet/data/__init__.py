"""Data: which image, noise level, noise, flip and label belong to example k of a run."""

from gnunet.data.cache import load_images
from gnunet.data.dataset import TrainingExamples
from gnunet.data.example_rng import Draws, ExampleDraws, row_order, split_rows
from gnunet.data.loader import MicroBatchSampler, training_loader
from gnunet.data.table import ImageTable
from gnunet.data.validation import ValidationBank

__all__ = [
    "Draws",
    "ExampleDraws",
    "ImageTable",
    "MicroBatchSampler",
    "TrainingExamples",
    "ValidationBank",
    "load_images",
    "row_order",
    "split_rows",
    "training_loader",
]
