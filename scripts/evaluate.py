"""`gnunet evaluate` as a script, for `accelerate launch scripts/evaluate.py`."""

import sys

from gnunet.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
