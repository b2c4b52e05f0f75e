"""The fixed set of images, noise levels and noise on which the validation loss is computed."""

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from gnunet.data.conditions import Condition
from gnunet.data.dataset import channels_last
from gnunet.data.decoded_images import DecodedImages
from gnunet.random_streams import Stream, StreamKey


class ValidationSet:
    """Example i, for i in 0..num_examples-1: an image, a log-SNR in one of equal bins, and its noise.

    Image rows[i % n] is paired with bin (i + i // n) % num_bins: the bins are filled evenly, and an image that is
    repeated comes in the next bin. If there are more rows than examples, num_examples evenly spaced ones are used.
    Within a bin log-SNRs are stratified: one uniform draw in each of as many equal parts as it has examples.
    Nothing depends on a run's seed, so that runs are compared on the same set; images are not flipped and labels
    not dropped.

    Args:
        rows: int (n,), the rows of the table to validate on, at least one.
        num_examples: size of the set.
        log_snr_min, log_snr_max: lower end of the first bin, upper end of the last. Log-SNR is the natural logarithm
            of signal power over noise power.
        draw: which draw of noise and noise levels.
        condition: what is made of each image besides, if anything.
    """

    def __init__(
        self, table: DecodedImages, rows: np.ndarray, *, num_examples: int, num_bins: int, log_snr_min: float,
        log_snr_max: float, draw: int = 0, condition: Condition | None = None,
    ):  # fmt: skip
        self.table = table
        self.num_bins, self.condition = num_bins, condition
        index = np.arange(num_examples)
        # Evenly spaced, since rows are often sorted by class.
        positions = index % len(rows) if len(rows) <= num_examples else index * len(rows) // num_examples
        self.rows = np.asarray(rows, np.int64)[positions]
        self.bins = (index + index // len(rows)) % num_bins
        self._stream, self._masks = Stream(draw, StreamKey.VALIDATION), Stream(draw, StreamKey.FIXED_MASK)
        self._latents = Stream(draw, StreamKey.FIXED_LATENT)
        fraction = np.empty(num_examples)  # of the bin
        for b in range(num_bins):
            members = np.flatnonzero(self.bins == b)
            uniform = [self._stream.at(i).random() for i in members]
            fraction[members] = (np.arange(len(members)) + uniform) / max(len(members), 1)
        self.log_snr = log_snr_min + (log_snr_max - log_snr_min) / num_bins * (self.bins + fraction)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """The collated examples with these indices, as `TrainingDataset` has them: images, noise, labels if the table
        has any, condition if there is one; with log_snr, float64 (b,), and bin, int64 (b,)."""
        chosen = np.asarray(indices, np.int64)
        rows = self.rows[chosen]
        images, partners = self.table.examples(rows, map(self._latents.at, indices))
        noise = np.empty(images.shape, np.float32)
        for index, out in zip(indices, noise, strict=True):
            stream = self._stream.at(index)
            stream.random()  # drawn for log_snr
            stream.standard_normal(dtype=np.float32, out=out)
        batch = {
            "images": channels_last(images),
            "noise": channels_last(noise),
            "log_snr": torch.from_numpy(self.log_snr[chosen]),
            "bin": torch.from_numpy(self.bins[chosen]),
        }
        if self.table.labels is not None:
            batch["labels"] = torch.from_numpy(self.table.labels_of(rows))
        if self.condition is not None:
            stored = self.condition.store(images, map(self._masks.at, indices), partners)
            batch["condition"] = channels_last(stored)
        return batch

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over every example's image, noise, log-SNR, bin and label."""
        scaling = [] if self.table.scaling.is_pictures else [self.table.scaling]
        digest = hashlib.sha256(repr((self.table.images.shape[1:], self.num_bins, *scaling)).encode())
        for start in range(0, len(self), 256):
            batch = self.batch(range(start, min(start + 256, len(self))))
            for name, tensor in sorted(batch.items()):
                digest.update(name.encode())
                digest.update(np.ascontiguousarray(tensor.numpy()).data)
        return digest.hexdigest()
