"""Labels that are numbers or vectors (model.class_embed_type) in place of classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import FiniteFloat, TypeAdapter

from gnunet.errors import CheckpointError, ConfigError, DataError, truncate
from gnunet.random_streams import Stream, StreamKey

PARTS = 8
"""Parts of equally many training labels that samples have labels of, in turn."""
MAX_LABELS, MAX_NUMBERS = 256, 2**15
"""Training labels that are kept, and numbers in them."""


@dataclass(frozen=True)
class FloatLabels:
    """What a model knows of its training labels.

    For the network, the least number is 0 and the greatest 1000, as for timesteps, and -1000 is the null label. Vectors
    are as they are, and zeros are the null label.
    """

    values: list[FiniteFloat] | list[list[FiniteFloat]]
    """Training labels: numbers, evenly spaced in ascending order from the least to the greatest; or vectors."""
    can_drop: bool
    """Whether the network was trained with the null label."""

    @classmethod
    def of(cls, labels: np.ndarray, can_drop: bool) -> "FloatLabels":
        """Those of float64 labels (n,) or (n, D). DataError if they have no range, or the null label among them."""
        if labels.ndim == 2 and can_drop and not labels.any(axis=1).all():
            raise DataError("labels: a vector of zeros, the null label; valid: others, or data.label_dropout 0")
        if labels.ndim == 1 and not 0 < np.ptp(labels) < np.inf:
            raise DataError(f"labels: from {labels.min():g} to {labels.max():g}; valid: at least two different numbers")
        count = min(len(labels), MAX_LABELS, max(PARTS, MAX_NUMBERS // labels[0].size))
        rows = np.linspace(0, len(labels) - 1, count).round().astype(np.int64)
        return cls((np.sort(labels) if labels.ndim == 1 else labels)[rows].tolist(), can_drop)

    @classmethod
    def from_dict(cls, values: Any, shape: tuple[int, ...] | None, where: object) -> "FloatLabels | None":
        """Labels of this shape from what a checkpoint has of them, which may be untrusted; else CheckpointError. None
        with shape None; a model of diffusers without values has those of timesteps, or zeros."""
        if shape is None:
            return None
        if values is None:
            return cls.of(np.zeros((1, *shape)) if shape else np.linspace(0, 1000, PARTS + 1), False)
        try:
            found = TypeAdapter(cls).validate_python(values)
            array = np.array(found.values)
            if array.shape[1:] == shape and cls.of(array, False).values == found.values:
                return found
        except (DataError, IndexError, ValueError):
            pass
        raise CheckpointError(f"{where}: labels {truncate(values)}; valid: those of the network")

    @property
    def null(self) -> float | None:
        """Each number of the null label, for the network; None if it was trained without."""
        return (0.0 if isinstance(self.values[0], list) else -1000.0) if self.can_drop else None

    def to_network(self, labels: np.ndarray) -> np.ndarray:
        """Labels for the network, float32 of the same shape."""
        if labels.ndim == 1:
            labels = (labels - self.values[0]) / (self.values[-1] - self.values[0]) * 1000
        return labels.astype(np.float32)

    def draw(self, indices: Sequence[int], seed: int) -> np.ndarray:
        """A label for each of these images, float64: a pure function of (seed, index), as frequent as in training."""
        stream = Stream(seed, StreamKey.SAMPLE_LABEL)
        places = np.array([index % PARTS + stream.at(index).random() for index in indices]) / PARTS
        return np.array(self.values)[(places * len(self.values)).astype(np.int64)]

    def check(self, given: Any) -> np.ndarray:
        """Labels to sample from, float64. ConfigError for other than numbers up to half of the range beyond training's,
        or vectors, and for the null label."""
        shape = np.shape(self.values)[1:]
        try:
            labels = np.array(given, np.float64)
            is_valid = len(labels) and labels.shape[1:] == shape and np.isfinite(labels).all()
            if is_valid and (labels.any(axis=1) if shape else abs(self.to_network(labels) - 500) <= 1000).all():
                return labels
        except (TypeError, ValueError):
            pass
        valid = f"vectors of {shape} numbers, not all 0; or a .npy file of them"
        if not shape:
            low, high = self.values[0], self.values[-1]
            ends = f"{1.5 * low - 0.5 * high:g} to {1.5 * high - 0.5 * low:g}"
            valid = f"numbers from {ends}, since those of training are {low:g} to {high:g}"
        raise ConfigError(f"--labels: given {truncate(given)}; valid: {valid}")

    def names(self, labels: np.ndarray) -> list[str] | None:
        """How grids name numbers: each by itself or, of more than 2 * PARTS, by the part that it is in."""
        if labels.ndim == 2:
            return None
        if len(np.unique(labels)) <= 2 * PARTS:
            return [f"{label:.3g}" for label in labels]
        ends = np.unique(np.quantile(self.values, np.linspace(0, 1, PARTS + 1)))
        parts = np.searchsorted(ends[1:-1], labels, side="right")
        return [f"{ends[part]:.3g} to {ends[part + 1]:.3g}" for part in parts]
