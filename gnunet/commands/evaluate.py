"""Measure a model's samples, or a folder of images, against reference images.

gnunet evaluate runs/NAME --num_images 2048                  # against the images it trained on
gnunet evaluate runs/NAME --num_images 2048 --repeat 5       # mean and spread over seeds
gnunet evaluate FOLDER --reference DATA                      # no model: images against images
gnunet evaluate runs/NAME --validation_loss                  # by noise level, averaged and raw weights
accelerate launch -m gnunet evaluate runs/NAME --num_images 50000 --metrics fid --batch_size 256

The source is a run (its newest checkpoint), a checkpoint, RUN/checkpoints/best, a diffusers folder, or a folder of
images. Image i of a model is the one that `gnunet sample` writes. A folder's images must be squares of one size,
all grey or all in colour, unless --resolution prepares them as training images are; its grid.png is left out.

1, 2 and 4 processes print the same digits, so where there is no GPU the work is spread over the cores. An evaluation
that was killed is started again by the same command; statistics of the reference images are kept in the cache.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gnunet.checkpoint.trained_model import WEIGHTS, find_checkpoint, is_model_path, load_trained_model
from gnunet.commands.evaluate_inputs import Files, ReferenceImages, Samples, open_reference
from gnunet.commands.options import add_sampling_options, open_with_options, positive
from gnunet.data.cache import cache_folder
from gnunet.distributed.accelerator import open_accelerator
from gnunet.distributed.launch import run_as_processes, spawn_cpu_processes
from gnunet.environment import num_cpus
from gnunet.errors import CheckpointError, ConfigError, DataError, run_cli
from gnunet.evaluation import (
    FeatureMetric,
    ImageFiles,
    Scorer,
    check_reference,
    draw_neighbours,
    get_metrics,
    load_extractors,
    make_scorer,
    nearest_images,
    report,
    sample_size_warnings,
    validation_loss,
)
from gnunet.evaluation.batching import single_threaded
from gnunet.evaluation.extractors import EXTRACTORS
from gnunet.evaluation.features import Images
from gnunet.processes import Processes
from gnunet.training.data import load_run_data

IMAGES_PER_PROCESS = 128
"""Where nobody says how many processes to take, another one is started for so many images."""
PROCESSES = 8
"""But no more than these."""
NEAREST_OF = 1024
"""The nearest training images are found for at most so many images."""
NEAREST_DRAWN = 32
"""And drawn for at most so many."""


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line; values left out are the run's own."""
    parser = argparse.ArgumentParser(
        prog="gnunet evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", type=Path, help="run, checkpoint, diffusers folder or folder of images")
    parser.add_argument("--metrics", nargs="+", help="fid, kid, or fd_, kid_, precision_, recall_ and an extractor")
    parser.add_argument("--num_images", type=positive, help="images 0 .. N-1 (default: the run's; all of a folder's)")
    parser.add_argument("--repeat", type=positive, default=1, help="measure so many times, on images of other seeds")
    parser.add_argument("--reference", help="a run, or any data.source (default: what the model trained on)")
    parser.add_argument("--split", default="train", help="split of the reference (default train)")
    parser.add_argument("--resolution", type=positive, help="resize and crop a folder's images, all RGB")
    parser.add_argument("--nearest", type=positive, metavar="K", help="find each image's K nearest reference images")
    parser.add_argument("--validation_loss", action="store_true", help="only the validation loss by noise level")
    parser.add_argument(
        "--extractors", nargs="+", type=pair, default=[], metavar="NAME=SOURCE",
        help="your own: a TorchScript file or package.module:Class",
    )  # fmt: skip
    parser.add_argument(
        "--extractor_weights", nargs="+", type=pair, default=[], metavar="NAME=FILE",
        help="files of weights that are not in their own place",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder for JSON and PNG (default: evaluations/NAME)")
    add_sampling_options(parser)
    return parser.parse_args(argv)


def pair(text: str) -> tuple[str, str]:
    """argparse type: NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ValueError
    return name, value


class Evaluation:
    """A command line understood: everything that can be refused without computing has been.

    Raises:
        GnunetError: what is missing, unknown or does not go together.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.subject = open_subject(arguments)
        defaults = self.subject.defaults
        self.sources = {**defaults.extractors, **dict(arguments.extractors)}
        self.weights = {**defaults.weights, **dict(arguments.extractor_weights)}
        names = list(dict.fromkeys(arguments.metrics or defaults.metrics))
        self.metrics: list[FeatureMetric] = get_metrics(names, [*EXTRACTORS, *self.sources])
        load_extractors(self.metrics, sources=self.sources, weights=self.weights)
        self.num_images = self.subject.number(arguments.num_images, arguments.repeat)
        for metric in self.metrics:
            if self.num_images < metric.min_images:
                raise ConfigError(
                    f"--num_images: {self.num_images} given; valid: at least {metric.min_images}, which "
                    f"{metric.name} needs"
                )
        self.about = self.subject.about(arguments.repeat)
        self.reference: ReferenceImages = open_reference(
            arguments.reference, arguments.split, self.subject, arguments.resolution is not None
        )
        number = len(self.reference.rows)
        check_reference(self.metrics, number)
        if arguments.nearest and arguments.nearest >= number:
            raise ConfigError(f"--nearest: given {arguments.nearest}; valid: below the {number} reference images")
        self.out = report.open_folder(arguments.out, self.subject.name)

    def run(self) -> None:
        """Measure, print and write."""
        arguments, subject, reference = self.arguments, self.subject, self.reference
        precision = subject.model.mixed_precision if isinstance(subject, Samples) else "no"
        accelerator = open_accelerator(precision, cpu=arguments.cpu)
        if isinstance(subject, Samples):
            subject.model.network.to(accelerator.device)
        processes = Processes.of(accelerator)
        extractors = load_extractors(
            self.metrics, sources=self.sources, weights=self.weights, device=accelerator.device
        )
        kept: Recorder | None = None
        with progress_bar(accelerator) as bar:
            scorer = make_scorer(
                self.metrics, extractors, reference.table, reference.rows, cache_folder(reference.cache_dir),
                processes=processes, progress=stage(bar, "reference", len(reference.rows)),
            )  # fmt: skip
            repeats = []
            for repeat in range(arguments.repeat):
                images = subject.images(repeat, arguments.repeat, self.num_images, accelerator)
                if arguments.nearest and repeat == 0:
                    images = kept = Recorder(images, min(self.num_images, NEAREST_OF))
                what = "images" if arguments.repeat == 1 else f"images, {repeat + 1} of {arguments.repeat}"
                repeats.append(
                    scorer.score(
                        images, self.num_images, chunk=subject.chunk, processes=processes,
                        progress=stage(bar, what, self.num_images),
                    )
                )  # fmt: skip
            record = self.record(scorer, repeats, accelerator)
            if kept is not None:
                record["nearest"] = self.nearest(kept, scorer, accelerator, stage(bar, "nearest", len(reference.rows)))
        if accelerator.is_main_process:
            report.write_record(self.out / "metrics.json", record)
            lines = [f"note: {note}" for note in record["notes"]]
            if kept is not None:
                lines += report.neighbours_lines(record["nearest"]) + [f"  {self.out / 'nearest.png'}"]
            report.show(*report.metrics_report(record), *lines, f"written to {self.out / 'metrics.json'}")
        accelerator.end_training()

    def record(self, scorer: Scorer, repeats: list[dict[str, float]], accelerator: Accelerator) -> dict[str, Any]:
        """What metrics.json holds."""
        return {
            "name": self.subject.name,
            "source": str(self.arguments.source),
            "num_images": self.num_images,
            "repeats": len(repeats),
            "images": {"resolution": self.subject.resolution, "channels": self.subject.channels, **self.about},
            "reference": self.reference.about,
            "extractors": {name: extractor.identity for name, extractor in scorer.extractors.items()},
            "metrics": report.summarize(self.metrics, repeats),
            "notes": sample_size_warnings(self.metrics, self.num_images, len(self.reference.rows), scorer.num_features),
            "versions": report.versions(accelerator.device),
        }

    def nearest(
        self, kept: "Recorder", scorer: Scorer, accelerator: Accelerator, progress: Callable[[int], None]
    ) -> dict[str, Any]:
        """Find the nearest reference images, and on the main process draw them."""
        table, rows = self.reference.table, self.reference.rows
        name, extractor = next(iter(scorer.extractors.items()))
        samples = kept.together(accelerator)
        found = nearest_images(
            samples, table.images, rows, extractor, k=self.arguments.nearest, processes=Processes.of(accelerator),
            progress=progress,
        )  # fmt: skip
        if accelerator.is_main_process:
            pictures = table.images[rows[found.rows]]
            report.write_picture(
                self.out / "nearest.png", draw_neighbours(samples, pictures, found, limit=NEAREST_DRAWN)
            )
        return report.neighbours_record(found, name)


def open_subject(arguments: argparse.Namespace) -> Samples | Files:
    """What the source is."""
    source = arguments.source.expanduser()
    if is_model_path(source):
        if arguments.resolution is not None:
            raise ConfigError("--resolution: for a folder of images; a model samples at its own")
        return Samples(open_with_options(source, arguments))
    if not source.is_dir():
        raise CheckpointError(f"{source}: there is no such folder; valid: a run, a checkpoint, or images")
    return Files(source, ImageFiles(source, arguments.resolution))


class Recorder:
    """Keeps the first `count` of the images that pass."""

    def __init__(self, images: Images, count: int):
        self.images, self.count = images, count
        self.subset: np.ndarray | None = None

    def __call__(self, indices: range) -> np.ndarray:
        images = self.images(indices)
        if self.subset is None:
            self.subset = np.zeros((self.count, *images.shape[1:]), np.uint8)
        first = images[: max(self.count - indices.start, 0)]
        self.subset[indices.start : indices.start + len(first)] = first
        return images

    def together(self, accelerator: Accelerator) -> np.ndarray:
        """The kept images of all processes, on every process."""
        mine = torch.from_numpy(self.subset).to(accelerator.device)
        # What a process has not seen is zero there.
        return accelerator.gather(mine).view(accelerator.num_processes, *mine.shape).amax(dim=0).cpu().numpy()


def run_validation(arguments: argparse.Namespace) -> None:
    """The validation loss by noise level, of averaged and raw weights on the run's own validation set."""
    if find_checkpoint(source := arguments.source.expanduser()) is None:
        raise CheckpointError(f"{source}: --validation_loss needs a run or a checkpoint, which know their data")
    models = {weights: load_trained_model(source, weights) for weights in WEIGHTS}
    model = models["ema"]
    data = load_run_data(model.config)
    if data.table.fingerprint != model.fingerprint:
        raise DataError(f"{model.config.data.source}: these are not the images that {model.name} was trained on")
    settings = model.config.validation
    val_set = data.val_set(settings)
    out = report.open_folder(arguments.out, model.name)
    accelerator = open_accelerator(model.mixed_precision, cpu=arguments.cpu)
    results = {}
    for name, each in models.items():
        with single_threaded():  # the bits depend on the number of threads, and that on the launch
            result = validation_loss(
                each.network.to(accelerator.device), each.process, val_set, device=accelerator.device,
                batch_size=settings.batch_size, autocast=accelerator.autocast, processes=Processes.of(accelerator),
            )  # fmt: skip
        results[name] = report.validation_record(result)
    edges = np.linspace(settings.log_snr_min, settings.log_snr_max, settings.num_bins + 1).tolist()
    held_out = len(data.validation_rows)
    record = {
        "name": model.name,
        "source": str(arguments.source),
        "bank": {
            "fingerprint": val_set.fingerprint,
            "num_examples": len(val_set),
            "source": f"{held_out} held-out images" if held_out else "training images",
            "bins": list(zip(edges, edges[1:], strict=False)),
        },
        "weights": results,
        "versions": report.versions(accelerator.device),
    }
    if accelerator.is_main_process:
        path = out / "validation_loss.json"
        report.write_record(path, record)
        report.show(*report.validation_report(record), f"written to {path}")
    accelerator.end_training()


def progress_bar(accelerator: Accelerator) -> Progress:
    """The bar that `stage` adds to, on the main process."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        disable=not accelerator.is_main_process,
    )  # fmt: skip


def stage(bar: Progress, what: str, total: int) -> Callable[[int], None]:
    """A callback for what is done of something, shown from its first call on."""
    task = bar.add_task(what, total=total, visible=False)
    return lambda done: bar.update(task, completed=done, visible=True)


def processes_for(arguments: argparse.Namespace, images_in_a_repeat: int) -> int:
    """How many processes to take where nobody says."""
    if torch.accelerator.is_available() and not arguments.cpu:
        return 1
    return max(1, min(num_cpus(), PROCESSES, images_in_a_repeat * arguments.repeat // IMAGES_PER_PROCESS))


def evaluate(arguments: argparse.Namespace) -> int:
    """Measure what the command line asks for, in several processes where that is faster; returns the exit status."""
    if arguments.validation_loss:
        spawn_cpu_processes()
        run_validation(arguments)
        return 0
    evaluation = Evaluation(arguments)
    spawn_cpu_processes()
    if (status := run_as_processes(processes_for(arguments, evaluation.num_images))) is not None:
        return status
    evaluation.run()
    return 0


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    arguments = parse_arguments(argv)
    return run_cli(lambda: evaluate(arguments))
