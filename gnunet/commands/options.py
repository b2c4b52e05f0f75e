"""The options that scripts share which sample from a model."""

import argparse
from dataclasses import replace
from pathlib import Path

from gnunet.checkpoint.trained_model import WEIGHTS, TrainedModel, load_trained_model


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add what decides the samples; values left out are the run's own."""
    parser.add_argument("--weights", choices=WEIGHTS, default="ema", help="averaged or raw (default ema)")
    parser.add_argument("--seed", type=int, help="seed of the images (default: the run's)")
    parser.add_argument("--sampler", help="ddpm, ddim, dpm++, euler or heun, as the process allows")
    parser.add_argument("--num_inference_steps", type=positive, help="sampling steps")
    parser.add_argument("--guidance_scale", type=float, help="classifier-free guidance scale; 1 is off")
    for old, new in (("--steps", "--num_inference_steps"), ("--guidance", "--guidance_scale")):
        parser.add_argument(old, action=_Renamed, const=new, help=argparse.SUPPRESS)
    parser.add_argument("--batch_size", type=positive, help="images sampled together on each process")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")


def open_with_options(path: Path, arguments: argparse.Namespace) -> TrainedModel:
    """The model at `path`, with the settings that the options ask for.

    Raises:
        CheckpointError: see `load_trained_model`.
    """
    model = load_trained_model(path, arguments.weights)
    given = {
        name: getattr(arguments, name) for name in ("sampler", "num_inference_steps", "guidance_scale", "batch_size")
    }
    settings = model.sampling.model_copy(update={name: value for name, value in given.items() if value is not None})
    return replace(model, sampling=settings, seed=model.seed if arguments.seed is None else arguments.seed)


class _Renamed(argparse.Action):
    """An option that is an error naming the option that took its place."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f"{option_string} was renamed to {self.const}")


def positive(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    if (value := int(text)) < 1:
        raise ValueError
    return value
