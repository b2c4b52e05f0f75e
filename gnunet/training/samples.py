"""Sampling shared by the processes of a run, and the grids in RUN/samples/."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from gnunet.diffusion import make_grid
from gnunet.evaluation.rounds import rounds
from gnunet.files import write_file
from gnunet.training.checkpoint import checkpoint_name
from gnunet.training.session import Session


def share_of(indices: range, batch_size: int, rank: int, world: int) -> list[int]:
    """The image indices that `rank` samples: whole batches of consecutive indices, dealt out in turn."""
    return [i for i in indices if i // batch_size % world == rank]


def sample_grid(session: Session, check: Callable[[], None]) -> np.ndarray:
    """Images 0 .. sampling.num_images - 1 of the averaged weights, uint8 (N, H, W, C), on every process.

    The processes sample whole batches in turn. `check`: see `Sampleable.sample`.
    """
    model, accelerator = session.averaged, session.accelerator
    settings, rank, world = model.sampling, accelerator.process_index, accelerator.num_processes
    images = np.empty((settings.num_images, model.resolution, model.resolution, model.channels), dtype=np.uint8)
    for batches in rounds(len(images), settings.batch_size, world):
        mine = batches[rank] if rank < len(batches) else range(1)
        padded = torch.zeros(settings.batch_size, *images.shape[1:], dtype=torch.uint8, device=accelerator.device)
        padded[: len(mine)] = torch.from_numpy(model.sample(mine, accelerator, check=check))
        gathered = accelerator.gather(padded).view(world, *padded.shape).cpu().numpy()
        for batch, part in zip(batches, gathered, strict=False):
            images[batch] = part[: len(batch)]
    return images


def save_grid(folder: Path, images: np.ndarray, images_seen: int) -> Path:
    """Write images as the one PNG of what a run has sampled at so many images seen."""
    path = folder / f"{checkpoint_name(images_seen)}.png"
    png = io.BytesIO()
    make_grid(images).save(png, format="PNG")
    write_file(path, png.getvalue())
    return path
