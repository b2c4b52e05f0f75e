"""Arguments shared by the subcommands."""

import argparse
import math
import operator
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from gnunet.errors import CheckpointError, ConfigError, did_you_mean, did_you_mean_path, expand, may_be_on_hub
from gnunet.habits import habits_of

LIMITS = {
    "num_images": (1, 2_000_000),
    "repeat": (1, 1000),
    "resolution": (1, 8192),
    "nearest": (1, 1000),
    "seed": (0, 2**64 - 1),
    "start": (0, 10**12),
    "num_estimates": (1, 1000),
}
"""The least and the greatest value of arguments. Those of the config's `sampling` have the limits of its keys."""


class Parser(argparse.ArgumentParser):
    """A parser for `gnunet COMMAND` that reads - in a flag as _, and answers an unknown flag in one line."""

    def __init__(self, command: str, description: str | None) -> None:
        super().__init__(
            prog=f"gnunet {command}", description=description, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        self.command = command

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        flags = [word.partition("=")[0] for word in args or () if word.startswith("--")]
        known = {name for name in self._option_string_actions if name.startswith("--")}
        spelled = {flag: flag.replace("-", "_").replace("__", "--", 1) for flag in flags}
        for flag in (flag for flag in flags if spelled[flag] not in known and flag != "--"):
            name, habits = spelled[flag][2:], habits_of(self.command, known)
            hint = f"; use {habits[name]}" if name in habits else did_you_mean(spelled[flag], sorted(known))
            self.exit(2, f"error: {flag}: not a flag of {self.prog}{hint or '; --help lists the flags'}\n")
        words = [spelled[flag] + word[len(flag) :] if (flag := word.partition("=")[0]) in spelled else word
                 for word in args or ()]  # fmt: skip
        return super().parse_known_args(words, namespace)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add --cpu and the options of a model that samples, by default the run's own settings."""
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="EMA or raw weights (default ema)")
    parser.add_argument("--seed", type=integer("seed"), metavar="N", help="seed of the images (default: the run's)")
    parser.add_argument("--sampler", help="ddpm, ddim, dpm++, euler or heun, as the process allows")
    parser.add_argument("--num_inference_steps", type=integer(), metavar="N", help="sampling steps")
    parser.add_argument("--guidance_scale", type=scale, metavar="W", help="guidance scale; 1 is off")
    interval = "guidance only where sigma / alpha is from LOW to HIGH"
    parser.add_argument("--guidance_interval", nargs=2, type=scale, metavar=("LOW", "HIGH"), help=interval)
    guide = "autoguidance: a weaker model, such as an earlier checkpoint, in place of dropped labels"
    parser.add_argument("--guide", type=Path, metavar="CHECKPOINT", help=guide)
    parser.add_argument("--batch_size", type=integer(), metavar="N", help="images sampled together on each process")
    conditions = (
        "pictures to sample from, in turn, for a model with data.condition (default: the run's held-out images)"
    )
    parser.add_argument("--conditions", type=Path, metavar="FOLDER", help=conditions)
    parser.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")


def check_exists(source: Path) -> None:
    """Raise CheckpointError, with the name that is most alike, for neither a path nor an OWNER/NAME on the hub."""
    path = expand(source)
    if not path.exists() and not may_be_on_hub(source.as_posix()):
        raise CheckpointError(f"{source}: no such file or directory{did_you_mean_path(path)}")


def check_integer(name: str, value: object) -> int:
    """The value of an argument as an int. Raises ConfigError unless it is an integer within its LIMITS."""
    low, high = LIMITS.get(name, (1, 2**63))
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if not low <= number <= high:
        raise ConfigError(f"{name}: given {value!r}; valid: an integer, at least {low} and at most {high}")
    return number


def integer(name: str = "") -> Callable[[str], int]:
    """argparse type: an integer within the LIMITS of an argument, by default of at least 1."""
    low, high = LIMITS.get(name, (1, 2**63))

    def parse(text: str) -> int:
        digits = text.isascii() and text.isdecimal() and len(text) <= 20
        if not digits or not low <= int(text) <= high:
            valid = f"an integer, at least {low}" + (f" and at most {high}" if name in LIMITS else "")
            raise argparse.ArgumentTypeError(f"given {text[:100]}; valid: {valid}")
        return int(text)

    return parse


def scale(text: str) -> float:
    """argparse type: a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"given {text[:100]}; valid: a number, at least 0")
    return value


def numbered(path: Path) -> Iterator[Path]:
    """PATH, PATH-2, PATH-3, ..."""
    yield path
    yield from (path.with_name(f"{path.name}-{number}") for number in count(2))


def make_output_dir(path: Path) -> None:
    """Create the directory of --out. Raises ConfigError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: cannot create {path}: {error.strerror}") from None
