"""`gnunet sample` as a script, for `accelerate launch scripts/sample.py`."""

import sys

from gnunet.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
