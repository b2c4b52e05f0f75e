"""Arguments shared by the subcommands, and the model that they name."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gnunet.errors import ConfigError

if TYPE_CHECKING:
    from gnunet.checkpoint.trained_model import TrainedModel

SAMPLING = ("weights", "seed", "sampler", "num_inference_steps", "guidance_scale", "batch_size")


def make_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for `gnunet COMMAND`."""
    return argparse.ArgumentParser(
        prog=f"gnunet {command}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip


def parse_with_sampling_options(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Add --cpu and the options in SAMPLING, which are by default the run's own, and parse.

    A former name of one is an error that gives the new one.
    """
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="EMA or raw weights (default ema)")
    parser.add_argument("--seed", type=int, help="seed of the images (default: the run's)")
    parser.add_argument("--sampler", help="ddpm, ddim, dpm++, euler or heun, as the process allows")
    parser.add_argument("--num_inference_steps", type=positive_int, metavar="N", help="sampling steps")
    parser.add_argument("--guidance_scale", type=float, metavar="W", help="classifier-free guidance scale; 1 is off")
    parser.add_argument("--batch_size", type=positive_int, metavar="N", help="images sampled together on each process")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        from gnunet.config.renamed_keys import RENAMED_KEYS  # takes seconds, which valid arguments need not wait for

        for flag in (word.partition("=")[0] for word in unknown if word.startswith("--")):
            if new := RENAMED_KEYS.get(f"sampling.{flag[2:]}"):
                parser.exit(2, f"error: {flag}: renamed to --{new.removeprefix('sampling.')}\n")
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return arguments


def load_model(
    source: str | Path,
    *,
    weights: str = "ema",
    seed: int | None = None,
    sampler: str | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int | None = None,
) -> "TrainedModel":
    """Load a run, a checkpoint or a diffusers model with settings as in the config's `sampling`; None: the run's own.

    Raises:
        CheckpointError: there is no model at `source`, or it is corrupted.
        ConfigError: a setting is not valid.
    """
    # These take seconds, which --help need not wait for.
    from gnunet.checkpoint.trained_model import WEIGHTS, load_trained_model
    from gnunet.config import SamplingConfig
    from gnunet.config.merge import ConfigSource, merge_and_validate

    if weights not in WEIGHTS:
        raise ConfigError(f"weights: given {weights}; valid: {' or '.join(WEIGHTS)}")
    model = load_trained_model(Path(source).expanduser(), weights)
    settings = {
        "sampler": sampler,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "batch_size": batch_size,
    }
    given = {key: value for key, value in settings.items() if value is not None}
    sources = [ConfigSource(model.name, model.sampling.model_dump()), ConfigSource("given", given)]
    sampling = merge_and_validate(SamplingConfig, sources)
    return replace(model, sampling=sampling, seed=model.seed if seed is None else seed)


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    if not text.isdecimal() or (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"given {text}; valid: an integer of at least 1")
    return value


def make_output_dir(given: Path | None, default: Path) -> Path:
    """Create the directory of --out. Raises ConfigError if that fails."""
    path = given or default
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: cannot create {path}: {error.strerror}") from None
    return path
