"""`gnunet ablate` as a script, for `accelerate launch scripts/ablate.py`."""

import sys

from gnunet.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["ablate", *sys.argv[1:]]))
