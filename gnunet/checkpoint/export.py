"""The newest averaged weights as a diffusers pipeline in RUN/model/.

A group-norm U-Net is saved as diffusers' own UNet2DModel, so that whoever loads it needs no gnunet. DDPM runs
get a whole DDPMPipeline; EDM and flow, for which diffusers has no unconditional pipeline, get the U-Net and
the scheduler in the folders a pipeline would have. gnunet.json says what diffusers has no place for.
"""

import json
from pathlib import Path
from typing import Any

from diffusers import DDPMPipeline, DDPMScheduler

from gnunet.diffusion import Process
from gnunet.errors import CheckpointError
from gnunet.files import atomic_directory
from gnunet.models import UNet2D
from gnunet.safe_io import read_json


def export_model(folder: Path, ema: UNet2D, process: Process, *, images: int, data: dict[str, Any]) -> None:
    """Write the pipeline folder, replacing the one that is there."""
    try:
        unet: Any = ema.to_diffusers()
    except ValueError:
        unet = ema  # a normalization that UNet2DModel does not have: loads with gnunet.models.UNet2D
    scheduler = process.export_scheduler()
    with atomic_directory(folder) as temporary:
        if isinstance(scheduler, DDPMScheduler) and not isinstance(unet, UNet2D):
            DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(temporary)
        else:
            unet.save_pretrained(temporary / "unet")
            scheduler.save_pretrained(temporary / "scheduler")
        about = {"images": images, "class_names": data["class_names"], "class_counts": data["class_counts"]}
        (temporary / "gnunet.json").write_text(json.dumps(about, indent=1) + "\n")


def exported_images(folder: Path) -> int | None:
    """Images seen by the exported weights in `folder`; None where there are none."""
    try:
        return read_json(folder / "gnunet.json")["images"]
    except (CheckpointError, KeyError):
        return None
