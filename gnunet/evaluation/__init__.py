"""How good a network and its samples are: validation loss, distances to a data set, nearest training images."""

from gnunet.evaluation.extractors import EXTRACTORS, Extractor, load_extractor
from gnunet.evaluation.features import FeatureStatistics, collect_statistics
from gnunet.evaluation.metrics import Metric, compute_metrics, find_metrics, metric_table
from gnunet.evaluation.neighbours import Neighbours, draw_neighbours, nearest_images
from gnunet.evaluation.reference import Reference, reference_statistics
from gnunet.evaluation.validation import ValidationResult, validation_loss

__all__ = [
    "EXTRACTORS",
    "Extractor",
    "FeatureStatistics",
    "Metric",
    "Neighbours",
    "Reference",
    "ValidationResult",
    "collect_statistics",
    "compute_metrics",
    "draw_neighbours",
    "find_metrics",
    "load_extractor",
    "metric_table",
    "nearest_images",
    "reference_statistics",
    "validation_loss",
]
