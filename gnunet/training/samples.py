"""Sampling shared by the processes of a run, and the grids in RUN/samples/."""

import io
from pathlib import Path

import numpy as np
import torch

from gnunet.diffusion import make_grid
from gnunet.files import write_file
from gnunet.training.checkpoint import checkpoint_name
from gnunet.training.session import Session


def share_of(indices: range, batch_size: int, rank: int, world: int) -> list[int]:
    """The image indices that `rank` samples: whole batches of consecutive indices, dealt out in turn."""
    return [i for i in indices if i // batch_size % world == rank]


def save_grid(folder: Path, session: Session, images_seen: int) -> Path:
    """Sample images 0 .. num_images - 1, each process its share, and write them as one PNG."""
    model, accelerator = session.averaged, session.accelerator
    settings, world = model.sampling, accelerator.num_processes
    count = settings.num_images
    shares = [share_of(range(count), settings.batch_size, rank, world) for rank in range(world)]
    mine = shares[accelerator.process_index]
    images = model.sample(mine, accelerator)
    longest = max(map(len, shares))
    padded = torch.zeros(longest, *images.shape[1:], dtype=torch.uint8, device=accelerator.device)
    padded[: len(mine)] = torch.from_numpy(images).to(accelerator.device)
    gathered = accelerator.gather(padded).view(world, longest, *images.shape[1:]).cpu().numpy()
    whole = np.empty((count, *images.shape[1:]), dtype=np.uint8)
    for share, part in zip(shares, gathered, strict=True):
        whole[share] = part[: len(share)]
    path = folder / f"{checkpoint_name(images_seen)}.png"
    if accelerator.is_main_process:
        png = io.BytesIO()
        make_grid(whole).save(png, format="PNG")
        write_file(path, png.getvalue())
    return path
