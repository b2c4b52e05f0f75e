"""Sample images from a run, a checkpoint or a diffusers folder.

gnunet sample runs/NAME --num_images 64 --seed 0
accelerate launch -m gnunet sample runs/NAME --num_images 50000 --batch_size 256

Image i depends on the checkpoint, the sampler's settings, the seed and i alone, however many images are asked
for and however many processes share the work; the first images of a run's own seed are its training grid's.
Whole batches are sampled, so a last short batch takes as long as a full one.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gnunet.checkpoint.trained_model import TrainedModel
from gnunet.commands.options import add_sampling_options, open_with_options, positive
from gnunet.diffusion import make_grid
from gnunet.distributed.accelerator import open_accelerator
from gnunet.errors import ConfigError, run_cli
from gnunet.evaluation.batching import indices_for_rank
from gnunet.training import spawn_cpu_processes

GRID_IMAGES = 256
"""The grid shows at most so many images."""


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line; values left out are the run's own."""
    parser = argparse.ArgumentParser(
        prog="gnunet sample",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", type=Path, help="run folder, checkpoint folder or diffusers folder")
    parser.add_argument("--num_images", type=positive, default=16, help="images 0 .. N-1 (default 16)")
    parser.add_argument(
        "--classes", nargs="+", metavar="CLASS", help="class names or numbers, taken in turn by the images"
    )
    parser.add_argument("--out", type=Path, help="folder for the PNGs (default: samples/NAME)")
    add_sampling_options(parser)
    return parser.parse_args(argv)


def labels_of(indices: list[int], model: TrainedModel, classes: list[str] | None) -> np.ndarray | None:
    """Class label of each image, the given classes in turn; None where none are given.

    Raises:
        ConfigError: classes for an unconditional model, or a class that it does not have.
    """
    if not classes:
        return None
    if model.class_counts is None:
        raise ConfigError(f"--classes {' '.join(classes)}: {model.name} is not class-conditional")
    numbers = []
    for name in classes:
        if name in model.class_names:
            numbers.append(model.class_names.index(name))
        elif name.isdigit() and int(name) < len(model.class_names):
            numbers.append(int(name))
        else:
            valid = ", ".join(model.class_names)
            raise ConfigError(f"--classes: given {name!r}; valid: {valid}, or a number below {len(model.class_names)}")
    return np.array([numbers[i % len(numbers)] for i in indices], dtype=np.int64)


def sample(arguments: argparse.Namespace) -> None:
    """Sample this process's share of the images, write them, and on the main process the grid."""
    spawn_cpu_processes()
    model = open_with_options(arguments.source, arguments)
    accelerator = open_accelerator(model.mixed_precision, cpu=arguments.cpu)
    batch_size = model.sampling.batch_size
    out = arguments.out or Path("samples") / model.name
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be made: {error.strerror}") from None
    model.network.to(accelerator.device)

    indices = range(arguments.num_images)
    mine = indices_for_rank(indices, batch_size, accelerator.process_index, accelerator.num_processes)
    progress = Progress(
        TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(), disable=not accelerator.is_main_process,
    )  # fmt: skip
    with progress:
        task = progress.add_task("sampling", total=len(indices), speed="")
        start, done = time.perf_counter(), 0
        for first in range(0, len(mine), batch_size):
            batch = mine[first : first + batch_size]
            images = model.sample(batch, accelerator, labels=labels_of(batch, model, arguments.classes))
            for index, image in zip(batch, images, strict=True):
                Image.fromarray(image.squeeze()).save(out / f"{index:06d}.png")
            done += len(batch)
            rate = done * accelerator.num_processes / (time.perf_counter() - start)
            progress.update(task, completed=min(done * accelerator.num_processes, len(indices)),
                            speed=f"{rate:.1f} images/s")  # fmt: skip
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        seconds = time.perf_counter() - start
        shown = [np.asarray(Image.open(out / f"{i:06d}.png")) for i in indices[:GRID_IMAGES]]
        grid = np.stack(shown).reshape(len(shown), model.resolution, model.resolution, model.channels)
        make_grid(grid).save(out / "grid.png")
        Console(soft_wrap=True).print(
            f"{len(indices)} images in {seconds:.1f} s ({len(indices) / seconds:.1f} images/s): "
            f"{out}, grid {out / 'grid.png'}",
            markup=False,
        )
    accelerator.end_training()


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    arguments = parse_arguments(argv)
    return run_cli(lambda: sample(arguments))
