"""Latents: what an autoencoder makes of decoded images, once, kept in the cache beside them."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gnunet.data.cache import METADATA_FILE, cache_folder, read_or_build
from gnunet.data.decoded_images import IMAGES_FILE, DecodedImages, Latents, map_array
from gnunet.errors import DataError
from gnunet.processes import single_threaded

VERSION = 1  # increased whenever the same images would get other latents, so that no older cache is used
BATCH_VALUES = 2**20  # of the images that are encoded at a time


def encode_images(
    table: DecodedImages, autoencoder: Any, *, flip: bool, cache_dir: str | None,
    progress: Callable[[int, int], None],
) -> Latents:  # fmt: skip
    """The latents of a table's images, mapped from disk; as with `load_images`, the first call makes them.

    The cache is that of the table's fingerprint and of the digest of the `Autoencoder` (gnunet.models.autoencoder).
    With `flip` it also has those of the mirrored images, which are not mirrored latents. `progress` is called with
    (images done, images in all). DataError for latents that are not finite in float16, or a cache that cannot be
    written.
    """
    channels, digest = autoencoder.latent_channels, autoencoder.digest
    key = hashlib.sha256(repr((VERSION, table.fingerprint, digest, flip)).encode()).hexdigest()[:24]

    def build(folder: Path) -> None:
        step, sums = max(1, BATCH_VALUES // table.images[0].size), np.zeros(3)
        # On one thread: an image's bits depend on the number of threads, which launches change.
        with open(folder / IMAGES_FILE, "wb") as file, single_threaded():
            for start in range(0, len(table), step):
                images = table.images[start : start + step]
                both = [autoencoder.encode(each.copy()) for each in (images, images[:, :, ::-1])[: 1 + flip]]
                with np.errstate(over="ignore"):
                    moments = np.stack(both, axis=1).astype(np.float16)
                if not np.isfinite(moments).all():
                    raise DataError("data.autoencoder: its latents of these images are not finite in float16")
                values = moments.astype(np.float64)
                sums += [values[..., :channels].sum(), (values**2).sum(), values[..., :channels].size]
                file.write(moments.data)
                progress(min(start + step, len(table)), len(table))
        std = math.sqrt(max(sums[1] / sums[2] - (sums[0] / sums[2]) ** 2, 0.0))
        (folder / METADATA_FILE).write_text(json.dumps({"shape": (len(table), *moments.shape[1:]), "std": std}))

    def read(folder: Path) -> Latents | None:
        found = json.loads((folder / METADATA_FILE).read_text())
        moments = map_array(folder / IMAGES_FILE, np.float16, tuple(found["shape"]))
        return Latents(moments, channels, float(found["std"]), digest) if len(moments) == len(table) else None

    return read_or_build(cache_folder(cache_dir) / f"latents-{key}", read, build)
