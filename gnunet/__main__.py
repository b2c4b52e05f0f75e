"""The command line: `gnunet COMMAND`, `python -m gnunet COMMAND`, `accelerate launch -m gnunet COMMAND`."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from gnunet import __doc__ as description
from gnunet import __version__
from gnunet.distributed.launch import SIZE_VARIABLES, die_with_parent
from gnunet.errors import tolerate_closed_stdout

COMMANDS = {
    "train": "train a U-Net, or resume its training",
    "sample": "write images of a trained model",
    "evaluate": "measure samples against reference images",
    "ema": "reconstruct an EMA of another width after training",
    "push": "upload a run's model and its card to the Hugging Face hub",
    "ablate": "compare normalizations, or other settings, in a study",
}


@tolerate_closed_stdout()
def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    listing = "\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="gnunet", usage="gnunet [--help] [--version] COMMAND ...", description=description,
        epilog=f"commands:\n{listing}\n\n`gnunet COMMAND --help` describes a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"gnunet {__version__}")
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    command = parser.parse_args(argv[:1]).command
    sizes = {os.environ.get(name) for name in SIZE_VARIABLES} - {None, "", "1"}
    if command in ("ema", "push") and sizes:
        parser.error(f"{command}: started as {sizes.pop()} processes; valid: one, without a launcher")
    die_with_parent()  # before torch is imported, which takes seconds
    return import_module(f"gnunet.commands.{command}").main(list(argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
