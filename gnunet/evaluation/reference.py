"""Statistics of the reference images, computed once for each data set, resolution, preprocessing and extractor."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gnunet.data.table import DecodedImages
from gnunet.errors import CheckpointError, DataError
from gnunet.evaluation.distances import kernel_sums
from gnunet.evaluation.extractors import Extractor
from gnunet.evaluation.features import (
    BATCH,
    CHUNK,
    KEPT,
    FeatureStatistics,
    collect_statistics,
    statistics_device,
)
from gnunet.evaluation.running_covariance import Moments
from gnunet.files import atomic_write
from gnunet.processes import SINGLE_PROCESS, Processes
from gnunet.safe_io import TensorSpec, read_safetensors_header

log = logging.getLogger(__name__)

VERSION = 1
"""Raised whenever the same images would give other statistics, so that no older cache is used."""


@dataclass(frozen=True)
class Reference:
    """What images are compared with."""

    statistics: FeatureStatistics
    kernel_sums: Tensor
    """float64 (m,), each kept image's sum of kernels with the others; see `kernel_sums`."""

    def to(self, device: torch.device) -> "Reference":
        """The same on another device."""
        moments = self.statistics.moments
        moved = Moments(moments.count, moments.mean.to(device), moments.scatter.to(device))
        return Reference(FeatureStatistics(moved, self.statistics.kept.to(device)), self.kernel_sums.to(device))


def describe(table: DecodedImages, rows: np.ndarray, extractor: Extractor) -> dict[str, Any]:
    """JSON of exactly what decides reference statistics: pixels, their number and order, and the extractor."""
    return {
        "version": VERSION,
        "data": table.fingerprint,
        "rows": hashlib.sha256(np.ascontiguousarray(rows, np.int64).data).hexdigest(),
        "num_images": len(rows),
        "resolution": list(table.images.shape[1:3]),
        "channels": table.images.shape[3],
        "extractor": extractor.identity,
        "arithmetic": {"device": extractor.device.type, "batch": BATCH, "chunk": CHUNK, "kept": KEPT},
    }


def reference_statistics(
    table: DecodedImages,
    rows: np.ndarray,
    extractor: Extractor,
    folder: Path,
    *,
    processes: Processes = SINGLE_PROCESS,
    progress: Callable[[int], None] | None = None,
) -> Reference:
    """The statistics of a table's rows, from the cache or computed by all processes together.

    The images are those that a model trains on (decoded, cropped and resized as `load_images` does), not
    flipped. The cache is one safetensors file, which appears whole by a rename; a torn one, and one
    that holds no such statistics, is computed anew. A folder that cannot be written costs a warning, no more.

    Args:
        table: the decoded images.
        rows: int (n,), the table's rows to compare with.
        extractor: gives the features.
        folder: the caches' folder, `gnunet.data.cache.cache_folder`.
        processes, progress: see `stream_features`.

    Raises:
        DataError: no rows, or the cache's file is of other statistics than its name says.
    """
    about = describe(table, rows, extractor)
    path = folder / f"reference-{hashlib.sha256(_json(about).encode()).hexdigest()[:24]}.safetensors"
    found = load_reference(path, about)
    # All or none: where one process sees the file and another not yet, one would wait for the other for ever.
    seen = processes.gather(torch.tensor([found is not None], dtype=torch.int64, device=extractor.device))
    if found is not None and bool(seen.all()):
        return found.to(statistics_device(extractor))
    [statistics] = collect_statistics(
        lambda indices: table.images[rows[indices.start : indices.stop]], len(rows), [extractor],
        processes=processes, progress=progress,
    )  # fmt: skip
    reference = Reference(statistics, kernel_sums(statistics.kept))
    if found is None:
        _keep(reference, path, about)
    return reference


def load_reference(path: Path, about: dict[str, Any]) -> Reference | None:
    """Read cached statistics, on the CPU; None where the file is absent, torn, or holds none that could be meant.

    No tensor is read before the file's header fits `about`.

    Raises:
        DataError: the file holds statistics of something else than `about`; names what differs.
    """
    try:
        found = read_safetensors_header(path)
        with safe_open(path, framework="pt") as file:
            stored = json.loads(file.metadata()["about"])
            _check_same(stored, json.loads(_json(about)), path)
            if found != _layout(about, num_features=found["mean"].shape[-1]):
                return None
            tensors = {name: file.get_tensor(name) for name in found}
    except (CheckpointError, OSError, SafetensorError, LookupError, TypeError, ValueError, RecursionError):
        return None
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        return None
    moments = Moments(about["num_images"], tensors["mean"], tensors["scatter"])
    return Reference(FeatureStatistics(moments, tensors["kept"]), tensors["kernel_sums"])


def _check_same(stored: Any, wanted: dict[str, Any], path: Path) -> None:
    """Raise DataError where a file says that its statistics are of something else; TypeError where it says nothing."""
    if not isinstance(stored, dict):
        raise TypeError
    if stored != wanted:
        differing = [
            f"{key} is {repr(stored.get(key))[:100]}, not {wanted.get(key)}"
            for key in sorted(stored.keys() | wanted.keys())
            if stored.get(key) != wanted.get(key)
        ]
        raise DataError(f"{path} holds statistics of other images or features ({'; '.join(differing)}); remove it")


def _layout(about: dict[str, Any], num_features: int) -> dict[str, TensorSpec]:
    """What a file of such statistics holds, by name."""
    kept = min(about["num_images"], about["arithmetic"]["kept"])
    return {
        "mean": TensorSpec("F64", (num_features,)),
        "scatter": TensorSpec("F64", (num_features, num_features)),
        "kept": TensorSpec("F32", (kept, num_features)),
        "kernel_sums": TensorSpec("F64", (kept,)),
    }


def _keep(reference: Reference, path: Path, about: dict[str, Any]) -> None:
    """Write the cache's file unless another process was faster."""
    statistics = reference.statistics
    tensors = {
        "mean": statistics.moments.mean,
        "scatter": statistics.moments.scatter,
        "kept": statistics.kept,
        "kernel_sums": reference.kernel_sums,
    }
    content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, {"about": _json(about)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if load_reference(path, about) is None:
                atomic_write(path, content)
    except OSError as error:
        log.warning("the statistics of the reference images cannot be kept in %s: %s", path.parent, error)


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True)
