"""Train on the embedded portraits, sample, evaluate, and sample from the export in diffusers, all from Python.

python scripts/python_api.py [RUN_DIR]
"""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

import gnunet
from gnunet.training import StepInfo


def main(run_dir: str, source: str = "noto_portraits32", num_images: int = 256, **keys: Any) -> Mapping[str, float]:
    """Train a class-conditional flow as a config file or a shipped config says; returns metrics of its samples."""
    config = gnunet.load_config(source, overrides={"run_dir": run_dir, **keys})

    def report(step: StepInfo) -> None:
        if step.images % config.train.log_every == 0:
            print(f"{step.images} of {step.total_images} images: loss {step.loss}")

    run = gnunet.train(config, callback=report)

    images = gnunet.sample(run, 8, classes=["dark", "light"], guidance_scale=2.0, num_inference_steps=16, seed=1)
    Image.fromarray(np.concatenate(images, axis=1)).save(run / "gnunet.png")
    scores = gnunet.evaluate(run, num_images=num_images, metrics=["kid_efficientnet_lite0"])

    # RUN/model/ needs no gnunet; its README.md has such lines for each kind of model.
    unet = UNet2DModel.from_pretrained(run / "model", subfolder="unet")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(run / "model", subfolder="scheduler")
    scheduler.set_timesteps(sigmas=[i / 16 for i in range(16, 0, -1)])
    labels, size = torch.tensor([0, 1, 0, 1]), (unet.config.in_channels, *config.data.size)
    x = torch.randn(len(labels), *size, generator=torch.manual_seed(1))
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t, class_labels=labels).sample, t, x).prev_sample
    Image.fromarray(np.concatenate(VaeImageProcessor().postprocess(x), axis=1)).save(run / "diffusers.png")
    return scores


if __name__ == "__main__":
    print(main(*sys.argv[1:] or ["runs/python_api"]))
