"""`gnunet sample` as a script, for `accelerate launch scripts/sample.py`."""

import sys

from gnunet.commands.sample import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
