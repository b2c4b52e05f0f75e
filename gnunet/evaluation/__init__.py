"""Validation loss by noise level, distances between samples and a data set, nearest training images."""

from gnunet.evaluation.extractors import EXTRACTORS, Extractor, load_extractor
from gnunet.evaluation.features import FeatureStatistics, collect_statistics
from gnunet.evaluation.image_files import ImageFiles
from gnunet.evaluation.metrics import FeatureMetric, compute_metrics, get_metrics, metric_table, sample_size_warnings
from gnunet.evaluation.neighbours import Neighbours, draw_neighbours, nearest_images
from gnunet.evaluation.reference import Reference, reference_statistics
from gnunet.evaluation.scoring import Scorer, check_reference, load_extractors
from gnunet.evaluation.validation import ValidationResult, validation_loss

__all__ = [
    "EXTRACTORS",
    "Extractor",
    "FeatureMetric",
    "FeatureStatistics",
    "ImageFiles",
    "Neighbours",
    "Reference",
    "Scorer",
    "ValidationResult",
    "check_reference",
    "collect_statistics",
    "compute_metrics",
    "draw_neighbours",
    "get_metrics",
    "load_extractor",
    "load_extractors",
    "metric_table",
    "nearest_images",
    "reference_statistics",
    "sample_size_warnings",
    "validation_loss",
]
