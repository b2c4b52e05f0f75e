"""Train a diffusion U-Net.

accelerate launch train.py [--config FILE ...] [--section.key VALUE ...]
"""

import sys
from pathlib import Path

from gnunet.cli import parse
from gnunet.errors import GnunetError, print_error

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "noto_portraits32.yaml"


def main(argv: list[str]) -> int:
    """Parse, build, fit; returns the exit status."""
    try:
        config = parse(argv, default_config=DEFAULT_CONFIG)
        from gnunet.training import fit, spread_over_cpus  # takes seconds, which --help need not wait for

        spread_over_cpus()
        return fit(config)
    except GnunetError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:  # before the run's own handling of signals
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
