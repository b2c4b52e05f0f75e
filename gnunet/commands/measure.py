"""An evaluation from its inputs to its record, the content of metrics.json or validation_loss.json."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from PIL import Image

from gnunet.checkpoint.trained_model import WEIGHTS, find_checkpoint, load_from_checkpoint
from gnunet.commands.conditions import load_training_data
from gnunet.commands.evaluate_inputs import open_reference, open_subject
from gnunet.commands.options import check_integer, make_output_dir, numbered
from gnunet.commands.progress import ProgressBar
from gnunet.commands.sample_folder import writing_to
from gnunet.config import EvaluateConfig
from gnunet.data.cache import cache_folder
from gnunet.diffusion import encode_png
from gnunet.distributed.accelerator import open_accelerator, run_on_all_ranks
from gnunet.distributed.launch import check_launch, run_as_processes
from gnunet.environment import num_cpus
from gnunet.errors import CheckpointError, ConfigError, expand
from gnunet.evaluation import EXTRACTORS, Scorer, check_reference, get_metrics, load_extractors, report, validation_loss
from gnunet.evaluation.features import Images
from gnunet.evaluation.metrics import sample_size_warnings, too_few_images
from gnunet.evaluation.neighbours import draw_neighbours, nearest_images
from gnunet.files import atomic_write
from gnunet.processes import Processes, single_threaded
from gnunet.scaling import as_resolution
from gnunet.training.session import with_latents

IMAGES_PER_PROCESS = 128  # for each of these, one more process is started without a launcher or a GPU
MAX_PROCESSES = 8
MAX_NEAREST = 1024  # images for which the nearest training images are found
MAX_NEAREST_DRAWN = 32

Stage = Callable[[str, int], Callable[[int], None]]
"""Given a description and a total, returns a callback for the number of items done."""
Pairs = Mapping[str, str] | Iterable[tuple[str, str]]


class Evaluation:
    """Opens and checks the inputs of an evaluation; `run` computes it.

    Args:
        source: a run, a checkpoint, a diffusers model or a directory of images.
        metrics, num_images: names such as kid_dinov2, and how many images; None takes the run's, or all images.
        repeat: number of measurements, of images with other seeds or of other files.
        reference: a run, or any `data.source`, of which `split` is used (None is "train"); None takes the images that
            the model trained on.
        resolution: resize and crop a directory's images to this size, in RGB.
        nearest: number of nearest reference images to find for each image.
        extractors, extractor_weights: user-defined extractors, a TorchScript file or package.module:Class, and weights
            files, by the extractor's name.
        sampling: as the settings of `gnunet.sample`.

    Raises:
        GnunetError: an input is missing, unknown, too small, or does not fit the others.
    """

    def __init__(
        self, source: str | Path, *, metrics: Sequence[str] | None = None, num_images: int | None = None,
        repeat: int = 1, reference: str | Path | None = None, split: str | None = None,
        resolution: int | None = None, nearest: int | None = None, extractors: Pairs = (),
        extractor_weights: Pairs = (), **sampling: Any,
    ):  # fmt: skip
        integers = {"num_images": num_images, "repeat": repeat, "resolution": resolution, "nearest": nearest}
        for name, value in integers.items():
            if value is not None or name == "repeat":
                check_integer(name, value)
        if metrics is not None and (isinstance(metrics, str) or not metrics or {*map(type, metrics)} != {str}):
            raise ConfigError(f"metrics: given {metrics!r}; valid: a non-empty list of names")
        for name, pairs in {"extractors": extractors, "extractor_weights": extractor_weights}.items():
            if isinstance(pairs, str):
                raise ConfigError(f"{name}: given {pairs!r}; valid: a mapping from names to files")
        self.source, self.repeat, self.nearest = expand(source), repeat, nearest
        self.subject = open_subject(self.source, num_images, repeat, resolution, sampling)
        model = self.subject.model
        defaults = model.config.evaluate if model and model.config else EvaluateConfig()
        self.extractors = {
            "sources": {**defaults.extractors, **dict(extractors)},
            "weights": {**defaults.weights, **dict(extractor_weights)},
        }
        names = list(dict.fromkeys(metrics or defaults.metrics))
        self.metrics = get_metrics(names, [*EXTRACTORS, *self.extractors["sources"]])
        load_extractors(self.metrics, **self.extractors)  # raises if something is missing
        if valid := too_few_images(self.metrics, self.subject.num_images):
            raise ConfigError(f"--num_images: given {self.subject.num_images}; valid: {valid}")
        self.reference = open_reference(reference, split, self.subject, allow_enlarging=resolution is not None)
        num_reference = len(self.reference.rows)
        check_reference(self.metrics, num_reference)
        if nearest and nearest >= num_reference:
            raise ConfigError(f"--nearest: given {nearest}; valid: below the {num_reference} reference images")

    @property
    def mixed_precision(self) -> str:
        return self.subject.model.mixed_precision if self.subject.model else "no"

    def run(
        self, accelerator: Accelerator, stage: Stage = lambda description, total: lambda done: None
    ) -> tuple[dict[str, Any], Image.Image | None]:
        """Compute the record on all ranks together, and a picture of the nearest reference images if requested."""
        subject, reference, processes = self.subject, self.reference, Processes.of(accelerator)
        num_images, num_reference = subject.num_images, len(reference.rows)
        extractors = load_extractors(self.metrics, **self.extractors, device=accelerator.device)
        scorer = Scorer(
            self.metrics, extractors, reference.table, reference.rows, cache_folder(reference.cache_dir),
            processes=processes, progress=stage("reference", num_reference),
        )  # fmt: skip
        scores: list[dict[str, float]] = []
        kept: dict[int, np.ndarray] = {}
        for number in range(self.repeat):
            images = subject.images(number, accelerator)
            if self.nearest and number == 0:
                images = keep_first(images, MAX_NEAREST, kept)
            description = "images" if self.repeat == 1 else f"images, {number + 1} of {self.repeat}"
            progress = stage(description, num_images)
            scores.append(scorer.score(images, num_images, chunk=subject.chunk, progress=progress))
        resolution = as_resolution(subject.size)
        record = {
            "name": subject.name,
            "source": str(self.source),
            "num_images": num_images,
            "repeats": self.repeat,
            "images": {"resolution": resolution, "channels": subject.channels, **subject.metadata},
            "reference": {
                "source": reference.name,
                "num_images": num_reference,
                "resolution": resolution,
                "channels": subject.channels,
                "fingerprint": reference.table.fingerprint,
            },
            "extractors": {name: extractor.identity for name, extractor in extractors.items()},
            "metrics": report.summarize(self.metrics, scores),
            "notes": sample_size_warnings(self.metrics, num_images, scorer.references),
            "versions": report.versions(accelerator.device),
        }
        if not self.nearest:
            return record, None
        for others in run_on_all_ranks(accelerator, lambda: kept):
            kept.update(others)
        samples = np.stack([kept[index] for index in range(len(kept))])
        name, extractor = next(iter(extractors.items()))
        found = nearest_images(
            samples, reference.table, reference.rows, extractor, k=self.nearest, processes=processes,
            progress=stage("nearest", num_reference),
        )  # fmt: skip
        record["nearest"] = report.neighbours_record(found, name)
        nearest = reference.table.pictures(reference.rows[found.rows])
        return record, draw_neighbours(samples, nearest, found, limit=MAX_NEAREST_DRAWN)


def keep_first(source: Images, count: int, kept: dict[int, np.ndarray]) -> Images:
    """The same source of images, which adds those of the first `count` that it makes to `kept`, by index."""

    def images(indices: range) -> np.ndarray:
        made = source(indices)
        kept.update((index, image) for index, image in zip(indices, made, strict=True) if index < count)
        return made

    return images


def measure_validation(source: Path, *, cpu: bool) -> dict[str, Any]:
    """The validation loss by noise level of a run's EMA and raw weights, on the run's own validation set."""
    if (checkpoint := find_checkpoint(source)) is None:
        raise CheckpointError(f"{source}: --validation_loss needs a run or a checkpoint, which know their data")
    models = {weights: load_from_checkpoint(checkpoint, weights) for weights in WEIGHTS}
    model = models["ema"]
    data = load_training_data(model)
    if model.autoencoder is not None:
        data = with_latents(data, model.config, model.autoencoder)
    settings = model.config.validation
    val_set = data.val_set(model.config)
    accelerator = open_accelerator(model.mixed_precision, cpu=cpu)
    results = {}
    for name, each in models.items():
        with single_threaded():  # results depend on the number of threads, and that on the launch
            result = validation_loss(
                each.network.to(accelerator.device), each.process, val_set, device=accelerator.device,
                batch_size=settings.batch_size, autocast=accelerator.autocast, processes=Processes.of(accelerator),
            )  # fmt: skip
        results[name] = asdict(result)
    edges = settings.bin_edges
    held_out = len(data.validation_rows)
    return {
        "name": model.name,
        "source": str(source),
        "bank": {
            "fingerprint": val_set.fingerprint,
            "num_examples": len(val_set),
            "source": f"{held_out} held-out images" if held_out else "training images",
            "bins": list(zip(edges, edges[1:], strict=False)),
        },
        "checkpoints": {name: each.digest() for name, each in models.items()},
        "weights": results,
        "versions": report.versions(accelerator.device),
    }


def evaluate(arguments: argparse.Namespace) -> int:
    """Measure, print and write, in several processes if that is faster."""
    not_inputs = ("out", "cpu", "validation_loss")
    evaluation = Evaluation(**{name: value for name, value in vars(arguments).items() if name not in not_inputs})
    subject = evaluation.subject
    # Not among those of a model of this name, whose samples these may be.
    default = Path("evaluations") / (subject.name if subject.model else f"{subject.name}-images")
    make_output_dir(arguments.out or default.parent)
    check_launch()
    on_gpu = torch.accelerator.is_available() and not arguments.cpu
    shares = subject.num_images * arguments.repeat // IMAGES_PER_PROCESS
    if (status := run_as_processes(1 if on_gpu else max(1, min(num_cpus(), MAX_PROCESSES, shares)))) is not None:
        return status
    accelerator = open_accelerator(evaluation.mixed_precision, cpu=arguments.cpu)
    with ProgressBar(accelerator) as bar:
        record, picture = evaluation.run(accelerator, bar.stage)
    if accelerator.is_main_process:
        report.print_all(*report.metrics_report(record))
        if picture is not None:
            report.print_all(*report.neighbours_report(record["nearest"]))
        _write(record, arguments.out, default, "metrics.json", picture)
    accelerator.end_training()
    return 0


def validate(arguments: argparse.Namespace) -> None:
    """Print and write the validation loss by noise level."""
    check_launch()
    record = measure_validation(expand(arguments.source), cpu=arguments.cpu)
    if PartialState().is_main_process:
        report.print_all(*report.validation_report(record))
        _write(record, arguments.out, Path("evaluations") / record["name"], "validation_loss.json")


def _write(
    record: dict[str, Any], given: Path | None, default: Path, name: str, picture: Image.Image | None = None
) -> None:
    """Write a record and its picture, by default where no other evaluation's stand."""
    out = given or next(path for path in numbered(default) if report.has_same_inputs(path / name, record))
    make_output_dir(out)
    with writing_to(out):
        report.write_json(out / name, record)
        if picture is not None:
            atomic_write(out / "nearest.png", encode_png(picture))
    report.print_all(f"written to {out / name}" + (f", {out / 'nearest.png'}" if picture is not None else ""))
