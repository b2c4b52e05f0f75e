"""Statistics of the reference images, cached on disk."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from gnunet.data.decoded_images import DecodedImages
from gnunet.errors import CheckpointError
from gnunet.evaluation.distances import RunningCovariance, kernel_sums
from gnunet.evaluation.extractors import Extractor
from gnunet.evaluation.features import CHUNK, FORWARD_BATCH, MAX_SUBSET, FeatureStatistics, collect_statistics
from gnunet.files import atomic_write
from gnunet.processes import SINGLE_PROCESS, Processes
from gnunet.safe_io import TensorSpec, read_safetensors_header

log = logging.getLogger(__name__)

VERSION = 2
"""Part of the cache key. Increased whenever the same images would give other statistics."""


def reference_statistics(
    table: DecodedImages,
    rows: np.ndarray,
    extractor: Extractor,
    cache_dir: Path,
    *,
    processes: Processes = SINGLE_PROCESS,
    progress: Callable[[int], None] = lambda done: None,
) -> FeatureStatistics:
    """The statistics of a table's rows with kernel sums, from the cache or computed by all ranks together.

    The images are those that a model trains on (decoded, cropped and resized by `load_images`), not flipped. The cache
    is a safetensors file, written atomically; one that cannot be read is recomputed, and a directory that cannot be
    written to only causes a warning.

    Args:
        rows: int (n,), the table's rows to compare with.
        processes, progress: as for `stream_features`.
    """
    key = cache_key(table, rows, extractor)
    path = cache_dir / f"reference-{key[:24]}.safetensors"
    cached = load_reference(path, key, len(rows), extractor.statistics_device)
    # All or none: a rank that does not see the file yet would wait for the others indefinitely.
    is_cached = torch.tensor([cached is not None], dtype=torch.int64, device=extractor.device)
    if bool(processes.gather(is_cached).all()) and cached is not None:
        return cached
    [statistics] = collect_statistics(
        lambda indices: table.pictures(rows[indices]), len(rows), [extractor], processes=processes, progress=progress
    )
    statistics = replace(statistics, kernel_sums=kernel_sums(statistics.subset))
    if cached is None:
        _save_reference(statistics, path, key)
    return statistics


def cache_key(table: DecodedImages, rows: np.ndarray, extractor: Extractor) -> str:
    """sha256 of everything that decides reference statistics: pixels, their number and order, and the extractor."""
    content = {
        "version": VERSION,
        "data": table.fingerprint,
        "rows": hashlib.sha256(np.ascontiguousarray(rows, np.int64).data).hexdigest(),
        "shape": list(table.images.shape[1:]),
        "extractor": extractor.identity,
        "arithmetic": [extractor.device.type, FORWARD_BATCH, CHUNK, MAX_SUBSET],
        **({} if table.scaling.is_pictures else {"scaling": table.scaling.as_dict()}),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_reference(path: Path, key: str, num_images: int, device: torch.device) -> FeatureStatistics | None:
    """Read cached statistics; None if the file is missing, corrupted, of another key or of other shapes or dtypes."""
    try:
        specs = read_safetensors_header(path)
        features = specs["mean"].shape[-1] if "mean" in specs and specs["mean"].shape else 0
        subset = min(num_images, MAX_SUBSET)
        shapes = {
            "mean": TensorSpec("F64", (features,)), "scatter": TensorSpec("F64", (features, features)),
            "subset": TensorSpec("F32", (subset, features)), "kernel_sums": TensorSpec("F64", (subset,)),
        }  # fmt: skip
        if specs != shapes:
            return None
        with safe_open(path, framework="pt", device=str(device)) as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            tensors = [file.get_tensor(name) for name in shapes]
    except (CheckpointError, OSError, SafetensorError):
        return None
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        return None
    mean, scatter, *others = tensors
    return FeatureStatistics(RunningCovariance(num_images, mean, scatter), *others)


def _save_reference(statistics: FeatureStatistics, path: Path, key: str) -> None:
    tensors = {
        "mean": statistics.moments.mean,
        "scatter": statistics.moments.scatter,
        "subset": statistics.subset,
        "kernel_sums": statistics.kernel_sums,
    }
    content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, {"key": key})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            # Unless another rank was faster.
            if load_reference(path, key, statistics.moments.count, torch.device("cpu")) is None:
                atomic_write(path, content)
    except OSError as error:
        log.warning("cannot write the statistics of the reference images to %s: %s", path.parent, error)
