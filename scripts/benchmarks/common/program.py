"""How a benchmark ends."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn


def run(main: Callable[[], None]) -> NoReturn:
    """Run `main` and exit at once with its status: torch 2.11's compile workers can delay a normal exit by minutes."""
    status: object = 0
    try:
        main()
    except SystemExit as end:
        status = end.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)
