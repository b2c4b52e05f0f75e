"""What is measured, a model's samples or a folder's images, and what it is compared with."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from gnunet.checkpoint.trained_model import TrainedModel, sanitize_config
from gnunet.config import Config, EvaluateConfig
from gnunet.data import DecodedImages, load_images
from gnunet.data.sources.files import visible_files
from gnunet.data.sources.image_folder import IMAGE_SUFFIXES
from gnunet.errors import ConfigError, DataError
from gnunet.evaluation import ImageFiles
from gnunet.evaluation.distances import evenly_spaced
from gnunet.evaluation.features import CHUNK, Images
from gnunet.training.data import load_run_data
from gnunet.training.evaluation import sample_fn, sampling_metadata
from gnunet.training.progress import decode_progress

LOOKED_AT = 1000
"""Files of a reference folder whose size is looked at."""


@dataclass(frozen=True)
class Samples:
    """Samples of a model: images 0..n-1 of as many seeds as there are repeats."""

    model: TrainedModel

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def resolution(self) -> int:
        return self.model.resolution

    @property
    def channels(self) -> int:
        return self.model.channels

    @property
    def chunk(self) -> int:
        """Images that are made together."""
        return self.model.sampling.batch_size

    @property
    def defaults(self) -> EvaluateConfig:
        """What is measured where the command line does not say."""
        return self.model.config.evaluate if self.model.config else EvaluateConfig()

    def number(self, wanted: int | None, repeats: int) -> int:
        """How many images a repeat has."""
        return wanted or self.defaults.num_images

    def about(self, repeats: int) -> dict[str, Any]:
        """What decides the images besides the weights and their number."""
        settings = sampling_metadata(self.model)
        seed = settings.pop("seed")
        return {**settings, "seeds": [seed + repeat for repeat in range(repeats)]}

    def images(self, repeat: int, repeats: int, num_images: int, accelerator: Accelerator) -> Images:
        """The images of a repeat; the network is on the accelerator's device."""
        return sample_fn(replace(self.model, seed=self.model.seed + repeat), accelerator)


@dataclass(frozen=True)
class Files:
    """Images of a folder; of more than are wanted, ones from everywhere, none in two repeats."""

    folder: Path
    files: ImageFiles
    chunk: int = CHUNK
    defaults: EvaluateConfig = EvaluateConfig()

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def resolution(self) -> int:
        return self.files.resolution

    @property
    def channels(self) -> int:
        return self.files.channels

    def number(self, wanted: int | None, repeats: int) -> int:
        """How many images a repeat has. ConfigError where the folder has too few."""
        available = len(self.files) // repeats
        if (wanted or 1) > available:
            times = f" {repeats} times" if repeats > 1 else ""
            raise ConfigError(
                f"--num_images: given {wanted or 'none'}{times}, but {self.folder} holds {len(self.files)} images; "
                f"valid: at most {available}"
            )
        return wanted or available

    def about(self, repeats: int) -> dict[str, Any]:
        return {}

    def images(self, repeat: int, repeats: int, num_images: int, accelerator: Accelerator) -> Images:
        chosen = evenly_spaced(len(self.files), repeats * num_images)[repeat::repeats]
        return lambda indices: self.files.read(chosen[indices.start : indices.stop])


@dataclass(frozen=True)
class ReferenceImages:
    """The images that a subject is compared with."""

    table: DecodedImages
    rows: np.ndarray
    name: str
    cache_dir: str | None

    @property
    def about(self) -> dict[str, Any]:
        """What identifies them, for the record."""
        return {
            "source": self.name,
            "num_images": len(self.rows),
            "resolution": self.table.images.shape[1],
            "channels": self.table.images.shape[3],
            "fingerprint": self.table.fingerprint,
        }


def open_reference(given: str | None, split: str, subject: Samples | Files, resized: bool) -> ReferenceImages:
    """The reference images, prepared as for training at the subject's size and in its colours.

    Args:
        given: a run or a checkpoint, which may be a stranger's, for the images that it trained on; or a `data.source`;
            None for the images that the subject's own model trained on.
        split: of a `data.source`.
        subject: what will be compared with them.
        resized: whether the subject's size was asked for, so that smaller images may be enlarged to it.

    Raises:
        ConfigError: none given for a subject that knows none. DataError: other images than the model's, or too small.
        CheckpointError: the given run's configuration cannot be read.
    """
    if given is None:
        model = getattr(subject, "model", None)
        if model is None or model.config is None:
            raise ConfigError(
                f"--reference: needed, since {subject.name} does not know its training images; valid: a run, or "
                "images in any form that data.source takes"
            )
        reference = _images_of(model.config, model.name)
        if reference.table.fingerprint != model.fingerprint:
            raise DataError(
                f"{model.config.data.source}: these are not the images that {model.name} was trained on; give others "
                "with --reference"
            )
        return reference
    path = Path(given).expanduser()
    if (path / "config.yaml").is_file():
        reference = _images_of(sanitize_config(path / "config.yaml"), given)
        theirs = reference.table.images.shape[1:]
        if theirs != (subject.resolution, subject.resolution, subject.channels):
            raise DataError(
                f"{given} trains on {_described(theirs[0], theirs[2])}, but {subject.name} has "
                f"{_described(subject.resolution, subject.channels)}; valid are equal ones"
            )
        return reference
    if path.is_dir() and not resized:
        _check_sizes(path, subject)
    table = load_images(
        given, split=split, resolution=subject.resolution, channels=subject.channels, progress=decode_progress()
    )
    return ReferenceImages(table, np.arange(len(table)), given, None)


def _images_of(config: Config, name: str) -> ReferenceImages:
    data = load_run_data(config)
    return ReferenceImages(data.table, data.train_rows, f"training images of {name}", config.data.cache_dir)


def _described(resolution: int, channels: int) -> str:
    return f"{'grey' if channels == 1 else 'RGB'} images of {resolution} x {resolution}"


def _check_sizes(folder: Path, subject: Samples | Files) -> None:
    """Refuse reference images that would have to be enlarged, which distances see."""
    files = [file for file in visible_files(folder) if file.suffix.lower() in IMAGE_SUFFIXES]
    for file in (files[i] for i in evenly_spaced(len(files), LOOKED_AT)):
        try:
            with Image.open(file) as image:
                width, height = image.size
        except OSError:
            continue  # the decoder names it better
        if min(width, height) < subject.resolution:
            raise DataError(
                f"{file} is {width} x {height}, smaller than the {subject.resolution} x {subject.resolution} of "
                f"{subject.name}; valid are images at least as large, or --resolution to bring both to one size"
            )
