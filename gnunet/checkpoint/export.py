"""The newest EMA weights as a diffusers pipeline in RUN/model/, with gnunet.json for what diffusers has no place for.

A U-Net with group norms is saved as diffusers' UNet2DModel, which loads without gnunet. DDPM runs get a complete
DDPMPipeline; EDM, flow, networks with a condition and those of latents, for which diffusers has no pipeline, its U-Net
and scheduler folders, and the autoencoder in vae/.
"""

import json
from pathlib import Path
from typing import Any

from diffusers import DDPMPipeline, DDPMScheduler

from gnunet.checkpoint.checkpoint import TrainState
from gnunet.checkpoint.model_card import write_card
from gnunet.checkpoint.run_dir import RunDir
from gnunet.diffusion import Process
from gnunet.errors import CheckpointError
from gnunet.files import atomic_directory, link_missing
from gnunet.models import UNet2D
from gnunet.safe_io import read_json


def export_model(run: RunDir, ema: UNet2D, process: Process, state: TrainState) -> None:
    """Write the pipeline to RUN/model/, replacing the previous one, with a copy of RUN/autoencoder/ if it sees latents.

    Other files in RUN/model/, such as .git or a README.md that was edited, stay.

    Raises:
        CheckpointError: an entry of RUN/model/ is a file in place of a directory, or the reverse.
    """
    data, condition, of_latents, reason = state.data, None, "autoencoder" in state.data, None
    if (settings := run.config.data).condition is not None:
        omitted = {"condition": {"folder", "column"}}
        condition = settings.model_dump(include={"condition", "condition_dropout"}, exclude=omitted)
        reason = "the network also sees a picture"
    try:
        unet: Any = ema.to_diffusers()
    except ValueError as error:
        unet, reason = ema, str(error)  # a normalization that UNet2DModel lacks: loads with gnunet.models.UNet2D
    scheduler = process.export_scheduler()
    try:
        with atomic_directory(run.model, keep_others=True) as temporary:
            if isinstance(scheduler, DDPMScheduler) and reason is None and not of_latents:
                DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(temporary)
            else:
                unet.save_pretrained(temporary / "unet")
                scheduler.save_pretrained(temporary / "scheduler")
            keys = ("class_names", "class_counts", "scaling", "labels", "autoencoder")
            metadata = {"images": state.images, **{key: data[key] for key in keys if key in data}}
            metadata |= {} if condition is None else {"condition": condition}
            if of_latents:
                (temporary / "vae").mkdir()
                link_missing(run.autoencoder, temporary / "vae")
            (temporary / "gnunet.json").write_text(json.dumps(metadata, indent=1) + "\n")
            write_card(temporary, run, unet, process, state, reason)
    except (NotADirectoryError, FileExistsError) as error:
        raise CheckpointError(f"{error.filename}: is in the way of the model's export; move it elsewhere") from None


def exported_images(folder: Path) -> int | None:
    """Images seen by the exported weights in `folder`, or None if there are none."""
    try:
        return read_json(folder / "gnunet.json")["images"]
    except (CheckpointError, KeyError):
        return None
