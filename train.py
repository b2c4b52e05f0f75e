"""`gnunet train` as a script, for `accelerate launch train.py`."""

import sys

from gnunet.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
