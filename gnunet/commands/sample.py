"""Sample images from a run, a checkpoint or a diffusers model.

gnunet sample runs/NAME --num_images 64 --seed 0
accelerate launch -m gnunet sample runs/NAME --num_images 50000 --batch_size 256

Image i depends only on the checkpoint, the sampler's settings, the seed and i: neither on the number of images nor on
the number of processes that share the work. The first images with a run's own seed are those of its training grids.
Whole batches are sampled, so a partial last batch takes as long as a full one.

samples.json, beside the images, has their settings. A folder holds images of one checkpoint and one set of settings;
the same command, also with more images, writes those that are missing, for instance after a kill.
"""

import argparse
import time
from pathlib import Path

from gnunet.commands.options import SAMPLING, Parser, add_sampling_options, check_exists, integer
from gnunet.errors import run_cli

MAX_GRID_IMAGES = 256


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("sample", __doc__)
    parser.add_argument("source", type=Path, help="run, checkpoint or diffusers directory")
    parser.add_argument(
        "--num_images", type=integer("num_images"), default=16, metavar="N", help="images 0..N-1 (default 16)"
    )
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="class names or numbers, assigned in turn")
    parser.add_argument(
        "--labels", nargs="+", metavar="VALUE",
        help="numbers, assigned in turn, for a model with model.class_embed_type; or a .npy file of numbers or vectors",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path,
        help="directory for the files (default: samples/NAME, or with a number after it if that has other samples)",
    )  # fmt: skip
    parser.add_argument(
        "--inpaint", type=Path, metavar="FOLDER",
        help="fill what NAME_mask.png masks in white in each NAME.png, in turn, by RePaint, with any model",
    )  # fmt: skip
    parser.add_argument("--jump_length", type=integer(), metavar="N", help="RePaint: steps of a jump back (default 10)")
    parser.add_argument(
        "--resample", type=integer(), metavar="N", help="RePaint: times that a jump's steps are taken (10)"
    )
    add_sampling_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    return run_cli(lambda: sample(arguments))


def sample(arguments: argparse.Namespace) -> None:
    """Sample this process's share of the images that are missing and write them; the main process writes the grid."""
    check_exists(arguments.source)
    # Imported here so that --help does not wait for torch.
    from dataclasses import replace

    import numpy as np

    from gnunet.commands.api import given_labels, sample_batches
    from gnunet.commands.conditions import open_model
    from gnunet.commands.progress import ProgressBar
    from gnunet.commands.sample_folder import SamplesRecord, open_sample_folder, writing_to
    from gnunet.distributed.accelerator import open_accelerator
    from gnunet.distributed.launch import check_launch
    from gnunet.evaluation.image_files import GRID, read_sample, write_sample
    from gnunet.training.evaluation import write_grid

    check_launch()
    num_images = arguments.num_images
    names = (*SAMPLING, "conditions", "inpaint", "jump_length", "resample")
    model = open_model(arguments.source, **{name: getattr(arguments, name) for name in names})
    model = replace(model, given_labels=given_labels(model, arguments.classes, arguments.labels))
    accelerator = open_accelerator(model.mixed_precision, cpu=arguments.cpu)
    record = SamplesRecord.of(model, arguments.source, num_images)
    with open_sample_folder(arguments.out, record, accelerator) as (out, missing), ProgressBar(accelerator) as bar:
        start, progress, files = time.perf_counter(), bar.stage("sampling", num_images), record.files(out)
        for indices, images in sample_batches(model, missing, accelerator):
            with writing_to(out):
                for index, image in zip(indices, images, strict=True):
                    write_sample(files[index], image, model.scaling)
            progress(indices[-1] + 1)
        accelerator.wait_for_everyone()
        progress(num_images)
        if accelerator.is_main_process:
            seconds = time.perf_counter() - start
            shown = [read_sample(file, model.scaling, model.channels) for file in files[:MAX_GRID_IMAGES]]
            with writing_to(out):
                write_grid(out / GRID, model.scaling.to_pictures(np.stack(shown)), model)
            bar.stop()
            new = "" if len(missing) == num_images else f", {num_images - len(missing)} of which were there"
            rate = f"{len(missing) / seconds:.1f} images/s"
            print(f"{num_images} images{new}, in {seconds:.1f} s ({rate}): {out}, grid {out / GRID}")
    accelerator.end_training()
