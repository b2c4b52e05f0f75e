"""Measure a model's samples, or a directory of images, against reference images.

gnunet evaluate runs/NAME --num_images 2048                  # against the images it trained on
gnunet evaluate runs/NAME --num_images 2048 --repeat 5       # mean and standard deviation over seeds
gnunet evaluate FOLDER --reference DATA                      # no model: images against images
gnunet evaluate runs/NAME --validation_loss                  # by noise level, of EMA and raw weights
accelerate launch -m gnunet evaluate runs/NAME --num_images 50000 --metrics fid --batch_size 256

The source is a run (its newest checkpoint), a checkpoint, RUN/checkpoints/best, a diffusers model, or a directory of
images. Image i of a model is the one that `gnunet sample` writes. A directory's images must be of one size, all grey or
all in colour, unless --resolution prepares them like training images; its grid.png is left out.

Results are identical for any number of processes, so without a GPU the work is distributed over the cores. Statistics
of the reference images are cached.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from gnunet.commands.options import Parser, add_sampling_options, check_exists, integer, make_output_dir, numbered
from gnunet.errors import run_cli

if TYPE_CHECKING:
    from PIL import Image

IMAGES_PER_PROCESS = 128  # without a launcher or a GPU, one more process is started for each of these many images
MAX_PROCESSES = 8


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("evaluate", __doc__)
    parser.add_argument("source", type=Path, help="run, checkpoint, diffusers directory or directory of images")
    parser.add_argument("--metrics", nargs="+", help="fid, kid, or fd_, kid_, precision_, recall_ and an extractor")
    parser.add_argument(
        "--num_images", type=integer("num_images"), metavar="N", help="images 0..N-1 (default: the run's; all)"
    )
    parser.add_argument(
        "--repeat", type=integer("repeat"), default=1, metavar="N", help="measure N times, on images of other seeds"
    )
    parser.add_argument("--reference", help="a run, or any data.source (default: what the model trained on)")
    parser.add_argument("--split", help="split of a reference that is a data.source (default train)")
    parser.add_argument(
        "--resolution", type=integer("resolution"), metavar="N", help="resize a directory's images to N x N, in RGB"
    )
    parser.add_argument("--nearest", type=integer("nearest"), metavar="K", help="find the K nearest reference images")
    parser.add_argument("--validation_loss", action="store_true", help="only the validation loss by noise level")
    parser.add_argument(
        "--extractors", nargs="+", type=name_and_value, default=[], metavar="NAME=SOURCE",
        help="user-defined extractors: a TorchScript file or package.module:Class",
    )  # fmt: skip
    parser.add_argument(
        "--extractor_weights", nargs="+", type=name_and_value, default=[], metavar="NAME=FILE",
        help="weights files that are not in the default location",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path,
        help="directory for JSON and PNG (default: evaluations/NAME, or with a number after it if that has the results "
        "of other settings)",
    )  # fmt: skip
    add_sampling_options(parser)
    arguments = parser.parse_args(argv)
    if arguments.validation_loss:
        used = ("source", "out", "cpu", "validation_loss")
        others = [name for name in vars(arguments) if name not in used]
        if given := [f"--{name}" for name in others if getattr(arguments, name) != parser.get_default(name)]:
            parser.error(f"--validation_loss is that of the run's own validation set; leave out {' '.join(given)}")
    return arguments


def name_and_value(text: str) -> tuple[str, str]:
    """argparse type: NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"given {text}; valid: NAME=VALUE")
    return name, value


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    return run_cli(lambda: validate(arguments) if arguments.validation_loss else evaluate(arguments))


def evaluate(arguments: argparse.Namespace) -> int:
    """Measure, print and write, in several processes if that is faster."""
    check_exists(arguments.source)
    # Imported here so that --help does not wait for torch.
    from gnunet.commands.measure import Evaluation
    from gnunet.commands.progress import ProgressBar
    from gnunet.distributed.accelerator import open_accelerator
    from gnunet.distributed.launch import check_launch, run_as_processes
    from gnunet.evaluation import report

    not_inputs = ("out", "cpu", "validation_loss")
    evaluation = Evaluation(**{name: value for name, value in vars(arguments).items() if name not in not_inputs})
    subject = evaluation.subject
    # Not among those of a model of this name, whose samples these may be.
    default = Path("evaluations") / (subject.name if subject.model else f"{subject.name}-images")
    make_output_dir(arguments.out or default.parent)
    check_launch()
    processes = num_processes(subject.num_images * arguments.repeat, arguments.cpu)
    if (status := run_as_processes(processes)) is not None:
        return status
    accelerator = open_accelerator(evaluation.mixed_precision, cpu=arguments.cpu)
    with ProgressBar(accelerator) as bar:
        record, picture = evaluation.run(accelerator, bar.stage)
    if accelerator.is_main_process:
        report.print_all(*report.metrics_report(record))
        if picture is not None:
            report.print_all(*report.neighbours_report(record["nearest"]))
        write(record, arguments.out, default, "metrics.json", picture)
    accelerator.end_training()
    return 0


def write(record: dict, given: Path | None, default: Path, name: str, picture: "Image.Image | None" = None) -> None:
    """Write a record and its picture, by default where no other evaluation's stand."""
    from gnunet.commands.sample_folder import writing_to
    from gnunet.evaluation import report

    out = given or next(path for path in numbered(default) if report.has_same_inputs(path / name, record))
    make_output_dir(out)
    with writing_to(out):
        report.write_json(out / name, record)
        if picture is not None:
            report.write_picture(out / "nearest.png", picture)
    report.print_all(f"written to {out / name}" + (f", {out / 'nearest.png'}" if picture is not None else ""))


def validate(arguments: argparse.Namespace) -> None:
    """Print and write the validation loss by noise level."""
    check_exists(arguments.source)
    from accelerate import PartialState

    from gnunet.commands.measure import measure_validation
    from gnunet.distributed.launch import check_launch
    from gnunet.evaluation import report

    check_launch()
    record = measure_validation(arguments.source.expanduser(), cpu=arguments.cpu)
    if PartialState().is_main_process:
        report.print_all(*report.validation_report(record))
        write(record, arguments.out, Path("evaluations") / record["name"], "validation_loss.json")


def num_processes(num_images: int, cpu: bool) -> int:
    """How many processes to start without a launcher."""
    import torch

    from gnunet.environment import num_cpus

    if torch.accelerator.is_available() and not cpu:
        return 1
    return max(1, min(num_cpus(), MAX_PROCESSES, num_images // IMAGES_PER_PROCESS))
