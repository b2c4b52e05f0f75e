"""Sample images from a run, a checkpoint or a diffusers model.

gnunet sample runs/NAME --num_images 64 --seed 0
accelerate launch -m gnunet sample runs/NAME --num_images 50000 --batch_size 256

Image i depends only on the checkpoint, the sampler's settings, the seed and i: neither on the number of images nor on
the number of processes that share the work. The first images with a run's own seed are those of its training grids.
Whole batches are sampled, so a partial last batch takes as long as a full one.
"""

import argparse
import time
from pathlib import Path

from gnunet.commands.options import SAMPLING, make_output_dir, make_parser, parse_with_sampling_options, positive_int
from gnunet.errors import run_cli

MAX_GRID_IMAGES = 256


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = make_parser("sample", __doc__)
    parser.add_argument("source", type=Path, help="run, checkpoint or diffusers directory")
    parser.add_argument("--num_images", type=positive_int, default=16, metavar="N", help="images 0..N-1 (default 16)")
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="class names or numbers, assigned in turn")
    parser.add_argument("--out", type=Path, help="directory for the PNGs (default: samples/NAME)")
    return parse_with_sampling_options(parser, argv)


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    return run_cli(lambda: sample(arguments))


def sample(arguments: argparse.Namespace) -> None:
    """Sample this process's share of the images and write them; the main process writes the grid."""
    # Imported here so that --help does not wait for torch.
    import numpy as np
    from PIL import Image

    from gnunet.commands.api import load_model, sample_batches
    from gnunet.commands.progress import ProgressBar
    from gnunet.diffusion import make_grid
    from gnunet.distributed.accelerator import open_accelerator
    from gnunet.distributed.launch import join_launch

    join_launch()
    model = load_model(arguments.source, **{name: getattr(arguments, name) for name in SAMPLING})
    accelerator = open_accelerator(model.mixed_precision, cpu=arguments.cpu)
    out = make_output_dir(arguments.out, Path("samples") / model.name)
    start, num_images = time.perf_counter(), arguments.num_images
    with ProgressBar(accelerator) as bar:
        progress, done = bar.stage("sampling", num_images), 0
        for indices, images in sample_batches(model, num_images, accelerator, arguments.classes):
            for index, image in zip(indices, images, strict=True):
                Image.fromarray(image.squeeze()).save(out / f"{index:06d}.png")
            done += len(indices) * accelerator.num_processes
            progress(done)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        seconds = time.perf_counter() - start
        files = [out / f"{i:06d}.png" for i in range(min(num_images, MAX_GRID_IMAGES))]
        images = np.stack([np.asarray(Image.open(file)) for file in files])
        make_grid(images.reshape(*images.shape[:3], -1)).save(out / "grid.png")
        rate = num_images / seconds
        print(f"{num_images} images in {seconds:.1f} s ({rate:.1f} images/s): {out}, grid {out / 'grid.png'}")
    accelerator.end_training()
