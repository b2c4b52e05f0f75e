"""Data: which image, noise level, noise, flip and label belong to example k of a run."""

from gnunet.data.cache import load_images
from gnunet.data.conditions import Condition, SampleConditions
from gnunet.data.dataset import TrainingDataset
from gnunet.data.decoded_images import DecodedImages
from gnunet.data.float_labels import FloatLabels
from gnunet.data.latents import encode_images
from gnunet.data.loader import TrainingLoader
from gnunet.data.validation import ValidationSet

__all__ = [
    "Condition",
    "DecodedImages",
    "FloatLabels",
    "SampleConditions",
    "TrainingDataset",
    "TrainingLoader",
    "ValidationSet",
    "encode_images",
    "load_images",
]
