"""`gnunet evaluate` as a script, for `accelerate launch scripts/evaluate.py`."""

import sys

from gnunet.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
