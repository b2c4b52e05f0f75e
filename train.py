"""`gnunet train` as a script, for `accelerate launch train.py`."""

import sys

from gnunet.commands.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
