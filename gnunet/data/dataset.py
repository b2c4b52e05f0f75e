"""The training data set: decoded images with the randomness of each example of the run."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from gnunet.data.augment import draw_transforms, transform
from gnunet.data.conditions import Condition
from gnunet.data.decoded_images import DecodedImages
from gnunet.data.example_rng import ExampleRNG
from gnunet.random_streams import Stream, StreamKey


class TrainingDataset(Dataset):
    """Example k of a run, for any k >= 0: a pure function of (seed, k), the images and the rows.

    Args:
        rows: int (n,), the rows of the table to train on, at least one; each epoch of n examples visits each once.
        flip: mirror each example left to right with probability 1/2.
        label_dropout: probability that an example's label is replaced by the null label.
        class_conditional: return labels, which the table must have. Otherwise `num_classes` is 0.
        condition: what is made of each example besides, if anything, and the probability that it is dropped.
        augment: probability of each transform of `gnunet.data.augment`, which mirrors images in place of `flip`.
    """

    def __init__(
        self, table: DecodedImages, rows: np.ndarray, *, seed: int, flip: bool, label_dropout: float = 0.0,
        class_conditional: bool = False, condition: Condition | None = None, condition_dropout: float = 0.0,
        augment: float = 0.0,
    ):  # fmt: skip
        self.table = table
        self.rows = np.asarray(rows, np.int64)
        self.flip = flip
        self.class_conditional = class_conditional
        self.num_classes = table.num_classes if class_conditional else 0
        self.null_label: float | None = self.num_classes if self.num_classes and label_dropout > 0 else None
        if table.float_labels is not None:
            self.null_label = table.float_labels.null
        self.label_dropout, self.condition, self.condition_dropout = label_dropout, condition, condition_dropout
        self._rng, self._masks = ExampleRNG(seed, len(rows)), Stream(seed, StreamKey.MASK)
        self._latents, self.augment = Stream(seed, StreamKey.LATENT), augment
        self._transforms = Stream(seed, StreamKey.AUGMENT)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """The collated examples with these indices:

        images: uint8 or, of arrays, float32 (b, C, H, W), channels_last; of latents, float32 as the network sees them.
        noise: float32 (b, C, H, W), channels_last; standard normal.
        u: float64 (b,) in (0, 1), which `Process.noise_level` maps to noise levels.
        index: int64 (b,), the indices.
        labels: as of `DecodedImages.labels_of`, null_label where dropped; only if class_conditional.
        condition: (b, c, h, w), channels_last, as stored; only with a condition.
        condition_drop: bool (b,), where it is dropped; only with condition_dropout.
        augment_labels, augment_maps: of `draw_transforms`; only with augment.
        """
        random = self._rng.examples(indices)
        rows = self.rows[random.rows]
        drawn = map(self._latents.at, indices)
        images, partners = self.table.examples(rows, drawn, random.flip if self.flip and not self.augment else None)
        noise = np.empty(images.shape, np.float32)
        self._rng.fill_noise(indices, noise)
        batch = {
            "images": channels_last(images),
            "noise": channels_last(noise),
            "u": torch.from_numpy(random.u),
            "index": torch.tensor(indices, dtype=torch.int64),
        }
        if self.class_conditional:
            labels = self.table.labels_of(rows)
            if self.null_label is not None:
                labels[random.drop < self.label_dropout] = self.null_label
            batch["labels"] = torch.from_numpy(labels)
        if self.condition is not None:
            stored = self.condition.store(images, map(self._masks.at, indices), partners)
            batch["condition"] = channels_last(stored)
            if self.condition_dropout:
                batch["condition_drop"] = torch.from_numpy(random.drop < self.condition_dropout)
        if self.augment:
            labels, maps = draw_transforms(self._transforms, indices, self.augment, images.shape[1:3])
            batch |= {"augment_labels": torch.from_numpy(labels), "augment_maps": torch.from_numpy(maps)}
        return batch

    def image_rows(self, indices: Sequence[int]) -> list[int]:
        """The rows of the table that the examples with these indices show."""
        return self.rows[self._rng.examples(indices).rows].tolist()

    @property
    def metadata(self) -> dict[str, Any]:
        """What a checkpoint records of the data: fingerprint, number of images, class names and counts or other labels,
        and the scaling of arrays."""
        names = counts = None
        latents, float_labels = self.table.latents, self.table.float_labels
        if self.class_conditional and float_labels is None:
            names = list(self.table.class_names)
            counts = np.bincount(self.table.labels[self.rows], minlength=self.num_classes).tolist()
        return {
            "fingerprint": self.table.fingerprint,
            "num_images": len(self.rows),
            "class_names": names,
            "class_counts": counts,
            **({} if self.table.scaling.is_pictures else {"scaling": self.table.scaling.as_dict()}),
            **({} if latents is None else {"autoencoder": latents.autoencoder}),
            **({} if float_labels is None else {"labels": asdict(float_labels)}),
        }


def to_network(
    table: DecodedImages, condition: Condition | None, batch: Mapping[str, torch.Tensor], device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A batch's images and conditions, if it has any, as networks see them, fp32 (b, channels, H, W) on a device."""
    images = table.to_network(batch["images"].to(device, non_blocking=True))
    if "augment_maps" in batch:
        images = transform(images, batch["augment_maps"].to(device, non_blocking=True))
    if condition is None:
        return images, None
    seen = condition.to_network(batch["condition"].to(device, non_blocking=True), images.shape[2:], table.to_network)
    if "condition_drop" in batch:
        seen[batch["condition_drop"].to(device, non_blocking=True)] = 0
    return images, seen


def channels_last(array: np.ndarray) -> torch.Tensor:
    """View a C-contiguous (b, H, W, C) array as a (b, C, H, W) tensor in channels_last memory format."""
    return torch.from_numpy(array).permute(0, 3, 1, 2)
