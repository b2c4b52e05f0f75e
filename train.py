"""Train a diffusion U-Net.

accelerate launch train.py [--config FILE ...] [--section.key VALUE ...]
"""

import os
import sys
from pathlib import Path

from gnunet.cli import parse
from gnunet.errors import GnunetError

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "noto_portraits32.yaml"


def main(argv: list[str]) -> int:
    """Parse, build, fit; returns the exit status."""
    try:
        config = parse(argv, default_config=DEFAULT_CONFIG)
        from gnunet.training import fit, spread_over_cpus  # after parsing: a mistyped flag is answered at once

        spread_over_cpus()
        return fit(config)
    except GnunetError as error:
        if os.environ.get("RANK", "0") == "0":  # every process meets the same error; one tells it
            print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
