"""Data: which image, noise level, noise, flip and label belong to example k of a run."""

from gnunet.data.cache import load_images
from gnunet.data.dataset import TrainingExamples
from gnunet.data.example_rng import Draws, ExampleDraws, row_order, split_rows
from gnunet.data.loader import MicroBatchSampler, training_loader
from gnunet.data.table import ImageTable
from gnunet.data.validation import ValidationBank
from gnunet.random_streams import Purpose, Stream, generator

__all__ = [
    "Draws",
    "ExampleDraws",
    "ImageTable",
    "MicroBatchSampler",
    "Purpose",
    "Stream",
    "TrainingExamples",
    "ValidationBank",
    "generator",
    "load_images",
    "row_order",
    "split_rows",
    "training_loader",
]
