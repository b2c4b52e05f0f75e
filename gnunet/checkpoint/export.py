"""The newest EMA weights as a diffusers pipeline in RUN/model/, with gnunet.json for what diffusers has no place for.

A U-Net with group norms is saved as diffusers' UNet2DModel, which loads without gnunet. DDPM runs get a complete
DDPMPipeline; EDM, flow, networks with a condition and those of latents, for which diffusers has no pipeline, its U-Net
and scheduler folders, and the autoencoder in vae/.
"""

import json
from pathlib import Path
from typing import Any

from diffusers import DDPMPipeline, DDPMScheduler

from gnunet.diffusion import Process
from gnunet.errors import CheckpointError
from gnunet.files import atomic_directory, link_missing
from gnunet.models import UNet2D
from gnunet.safe_io import read_json


def export_model(
    folder: Path, ema: UNet2D, process: Process, *, images: int, data: dict[str, Any],
    condition: dict[str, Any] | None = None, autoencoder: Path | None = None,
) -> None:  # fmt: skip
    """Write the pipeline to `folder`, replacing the previous one; `data` is `TrainState.data`, `condition` the keys of
    the configuration's data that describe a condition, if the network has one, `autoencoder` the folder of its
    autoencoder, if it sees latents.

    Other files in `folder`, such as a README.md or .git, stay.

    Raises:
        CheckpointError: an entry of `folder` is a file in place of a directory, or the reverse.
    """
    try:
        unet: Any = ema.to_diffusers()
    except ValueError:
        unet = ema  # UNet2DModel does not have this normalization: loads with gnunet.models.UNet2D
    scheduler = process.export_scheduler()
    try:
        with atomic_directory(folder, keep_others=True) as temporary:
            stock = isinstance(scheduler, DDPMScheduler) and not isinstance(unet, UNet2D)
            if stock and condition is None and autoencoder is None:
                DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(temporary)
            else:
                unet.save_pretrained(temporary / "unet")
                scheduler.save_pretrained(temporary / "scheduler")
            metadata = {"images": images, "class_names": data["class_names"], "class_counts": data["class_counts"]}
            metadata |= {} if condition is None else {"condition": condition}
            metadata |= {key: data[key] for key in ("scaling", "labels") if key in data}
            if autoencoder is not None:
                (temporary / "vae").mkdir()
                link_missing(autoencoder, temporary / "vae")
                metadata["autoencoder"] = data["autoencoder"]
            (temporary / "gnunet.json").write_text(json.dumps(metadata, indent=1) + "\n")
    except (NotADirectoryError, FileExistsError) as error:
        raise CheckpointError(f"{error.filename}: is in the way of the model's export; move it elsewhere") from None


def exported_images(folder: Path) -> int | None:
    """Images seen by the exported weights in `folder`, or None if there are none."""
    try:
        return read_json(folder / "gnunet.json")["images"]
    except (CheckpointError, KeyError):
        return None
