"""Sample images from a run, a checkpoint or a diffusers model.

gnunet sample runs/NAME --num_images 64 --seed 0
accelerate launch -m gnunet sample runs/NAME --num_images 50000 --batch_size 256

Image i depends only on the checkpoint, the sampler's settings, the seed and i: neither on the number of images nor on
the number of processes that share the work. The first images with a run's own seed are those of its training grids.
Whole batches are sampled, so a partial last batch takes as long as a full one.

samples.json, beside the images, has their settings. A folder holds images of one checkpoint and one set of settings;
the same command, also with more images before or after, writes those that are missing, for instance after a kill.

--strip N draws what the network estimates the first 64 images to be at N of the steps, the last being the images: a row
for each image, in denoising.png. --gif draws the grid at these steps, or at 32: denoising.gif.
"""

import argparse
import time
from pathlib import Path

from gnunet.commands.options import Parser, add_sampling_options, check_exists, integer
from gnunet.errors import run_cli

MAX_GRID_IMAGES, MAX_STRIP_IMAGES = 256, 64
GIF_FRAMES = 32  # by default


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("sample", __doc__)
    parser.add_argument("source", type=Path, help="run, checkpoint, diffusers directory, or OWNER/NAME on the hub")
    parser.add_argument(
        "--num_images", type=integer("num_images"), default=16, metavar="N", help="how many images (default 16)"
    )
    parser.add_argument("--start", type=integer("start"), default=0, metavar="I", help="the first image (default 0)")
    size = "another height, and width, than in training"
    parser.add_argument("--resolution", type=integer("resolution"), nargs="+", metavar="N", help=size)
    parser.add_argument("--strip", type=integer("num_estimates"), metavar="N", help="draw N steps of the denoising")
    parser.add_argument("--gif", action="store_true", help="draw the denoising as an animated grid")
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
    """Sample this process's share of the images that are missing and write them; the main process draws them."""
    check_exists(arguments.source)
    # Imported here so that --help does not wait for torch.
    from dataclasses import replace

    import numpy as np

    from gnunet.commands.api import given_labels, sample_batches
    from gnunet.commands.conditions import open_model
    from gnunet.commands.progress import ProgressBar
    from gnunet.commands.sample_folder import SamplesRecord, open_sample_folder, writing_to
    from gnunet.diffusion import encode_gif, encode_png, make_grid
    from gnunet.distributed.accelerator import open_accelerator, run_on_all_ranks
    from gnunet.distributed.launch import check_launch
    from gnunet.evaluation.image_files import GIF, GRID, STRIP, read_sample, write_sample
    from gnunet.files import atomic_write
    from gnunet.training.evaluation import draw_grid

    check_launch()
    start, num_images = arguments.start, arguments.num_images
    others = ("source", "start", "num_images", "classes", "labels", "out", "strip", "gif", "cpu")
    model = open_model(arguments.source, **{key: vars(arguments)[key] for key in vars(arguments) if key not in others})
    num_estimates = arguments.strip or (GIF_FRAMES if arguments.gif else None)
    labels = given_labels(model, arguments.classes, arguments.labels)
    model = replace(model, given_labels=labels, num_estimates=num_estimates)
    accelerator = open_accelerator(model.mixed_precision, cpu=arguments.cpu)
    record = SamplesRecord.of(model, arguments.source, range(start, start + num_images))
    with open_sample_folder(arguments.out, record, accelerator) as (out, missing), ProgressBar(accelerator) as bar:
        began, progress, files = time.perf_counter(), bar.stage("sampling", num_images), record.files(out)
        followed, estimates = [*files][: MAX_STRIP_IMAGES if num_estimates else 0], {}
        for indices, images in sample_batches(model, sorted({*missing, *followed}), accelerator):
            with writing_to(out):
                for index, image in zip(indices, images, strict=True):
                    if index in followed:
                        estimates[index] = image
                    write_sample(files[index], image[-1] if num_estimates else image, model.scaling)
            progress(indices[-1] + 1 - start)
        for of_rank in run_on_all_ranks(accelerator, lambda: estimates):
            estimates.update(of_rank)
        progress(num_images)
        if accelerator.is_main_process:
            seconds = time.perf_counter() - began
            shown = [read_sample(files[i], model.scaling, model.channels) for i in [*files][:MAX_GRID_IMAGES]]
            with writing_to(out):
                grid = draw_grid(model.scaling.to_pictures(np.stack(shown)), model, start)
                atomic_write(out / GRID, encode_png(grid))
                if followed:
                    stages = model.scaling.to_pictures(np.concatenate([estimates[i] for i in followed]))
                    steps = len(stages) // len(followed)
                if arguments.strip:
                    atomic_write(out / STRIP, encode_png(make_grid(stages, steps, scale=None)))
                if arguments.gif:
                    frames = [draw_grid(stages[step::steps], model, start) for step in range(steps)]
                    atomic_write(out / GIF, encode_gif(frames))
            bar.stop()
            new = "" if len(missing) == num_images else f", {num_images - len(missing)} of which were there"
            rate = f"{len(missing) / seconds:.1f} images/s"
            print(f"{num_images} images{new}, in {seconds:.1f} s ({rate}): {out}, grid {out / GRID}")
    accelerator.end_training()
