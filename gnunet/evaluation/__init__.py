"""Validation loss by noise level, distances between samples and a data set, nearest training images."""

from gnunet.evaluation.extractors import EXTRACTORS
from gnunet.evaluation.image_files import ImageFiles
from gnunet.evaluation.metrics import FeatureMetric, Scorer, check_reference, get_metrics, load_extractors
from gnunet.evaluation.neighbours import nearest_images
from gnunet.evaluation.validation import validation_loss

__all__ = [
    "EXTRACTORS",
    "FeatureMetric",
    "ImageFiles",
    "Scorer",
    "check_reference",
    "get_metrics",
    "load_extractors",
    "nearest_images",
    "validation_loss",
]
