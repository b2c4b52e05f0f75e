"""Work that the processes of a launch do together, or fail at together."""

import errno
from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError

from gnunet.errors import GnunetError

Result = TypeVar("Result")


def run_on_all_ranks(accelerator: Accelerator, work: Callable[[], Result]) -> list[Result]:
    """Call `work` on every process, and wait for all.

    Returns:
        What each process's work has returned, in the order of ranks, on every process.

    Raises:
        GnunetError, OSError: on every process, its own or what the first that failed has raised; a SafetensorError as
            OSError. A DivergenceError cannot be sent.
    """
    result = own = None
    try:
        result = work()
    except SafetensorError as caught:  # cannot be sent, and is what its library makes of an error of the system
        own = OSError(errno.EIO, str(caught))
    except (GnunetError, OSError) as caught:
        own = caught
    told = gather_object([(result, own)])
    for _, error in told:
        if error is not None:
            raise own or error  # its own has its traceback
    return [result for result, _ in told]


def run_on_main_rank(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Call `work` on the main process while the others wait; gives its result, or raises its error, on every process.

    Raises:
        GnunetError, OSError: see `run_on_all_ranks`.
    """
    main = accelerator.is_main_process
    return run_on_all_ranks(accelerator, lambda: work() if main else None)[0]
