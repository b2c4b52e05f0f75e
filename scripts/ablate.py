"""`gnunet ablate` as a script, for `accelerate launch scripts/ablate.py`."""

import sys

from gnunet.commands.ablate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
