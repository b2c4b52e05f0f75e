"""Measure a model's samples, or a directory of images, against reference images.

gnunet evaluate runs/NAME --num_images 2048                  # against the images it trained on
gnunet evaluate runs/NAME --num_images 2048 --repeat 5       # mean and standard deviation over seeds
gnunet evaluate FOLDER --reference DATA                      # no model: images against images
gnunet evaluate runs/NAME --validation_loss                  # by noise level, of EMA and raw weights
accelerate launch -m gnunet evaluate runs/NAME --num_images 50000 --metrics fid --batch_size 256

The source is a run (its newest checkpoint), a checkpoint, RUN/checkpoints/best, a diffusers model, or a directory of
images. Image i of a model is the one that `gnunet sample` writes. A directory's images must be of one size, all grey or
all in colour, unless --resolution prepares them like training images; what `gnunet sample` draws of them is left out.

Results are identical for any number of processes, so without a GPU the work is distributed over the cores. Statistics
of the reference images are cached.
"""

import argparse
from pathlib import Path

from gnunet.commands.options import Parser, add_sampling_options, check_exists, integer
from gnunet.errors import run_cli


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("evaluate", __doc__)
    source = "run, checkpoint, diffusers directory, OWNER/NAME on the hub, or directory of images"
    parser.add_argument("source", type=Path, help=source)
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
    return run_cli(lambda: evaluate(arguments))


def evaluate(arguments: argparse.Namespace) -> int | None:
    """Measure, print and write."""
    check_exists(arguments.source)
    from gnunet.commands import measure  # imports torch, which --help does not wait for

    return measure.validate(arguments) if arguments.validation_loss else measure.evaluate(arguments)
