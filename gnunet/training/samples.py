"""Sampling shared by the processes of a run, and the grids in RUN/samples/."""

import io
from pathlib import Path

import numpy as np
import torch

from gnunet.diffusion import make_grid, sample_images, sample_labels
from gnunet.training.checkpoint import checkpoint_name
from gnunet.training.files import write_file
from gnunet.training.session import Session


def share_of(indices: range, batch_size: int, rank: int, world: int) -> list[int]:
    """The image indices that `rank` samples: whole batches of consecutive indices, dealt out in turn."""
    return [i for i in indices if i // batch_size % world == rank]


def save_grid(folder: Path, session: Session, images_seen: int) -> Path:
    """Sample images 0 .. num_images - 1, each process its share, and write them as one PNG."""
    config, accelerator = session.config, session.accelerator
    sampling, world = config.sampling, accelerator.num_processes
    count = sampling.num_images
    shares = [share_of(range(count), sampling.batch_size, rank, world) for rank in range(world)]
    mine = shares[accelerator.process_index]
    class_counts = session.data["class_counts"]
    images = sample_images(
        session.ema.model, session.process, indices=mine, resolution=config.data.resolution,
        channels=config.model.in_channels, seed=config.seed, sampler=sampling.sampler, steps=sampling.steps,
        batch_size=sampling.batch_size, guidance=sampling.guidance,
        labels=None if class_counts is None else sample_labels(mine, config.seed, class_counts),
        null_label=session.null_label, device=accelerator.device, autocast=accelerator.autocast,
    )  # fmt: skip
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

