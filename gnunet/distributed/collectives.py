"""Run a function on all ranks and raise its error on every rank."""

import errno
from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError

from gnunet.errors import GnunetError

Result = TypeVar("Result")


def run_on_all_ranks(accelerator: Accelerator, function: Callable[[], Result]) -> list[Result]:
    """Call `function` on every rank; returns each rank's result, in the order of ranks, on every rank.

    Raises:
        GnunetError, OSError: on every rank, its own error or that of the first rank that failed; a SafetensorError as
            OSError. A DivergenceError cannot be sent.
    """
    result = own_error = None
    try:
        result = function()
    except SafetensorError as error:  # cannot be pickled, and is how the library reports errors of the system
        own_error = OSError(errno.EIO, str(error))
    except (GnunetError, OSError) as error:
        own_error = error
    gathered = gather_object([(result, own_error)])
    for _, error in gathered:
        if error is not None:
            raise own_error or error  # its own has a traceback
    return [result for result, _ in gathered]


def run_on_main_rank(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """Call `function` on the main rank, while the others wait; its result or its error is every rank's."""
    return run_on_all_ranks(accelerator, lambda: function() if accelerator.is_main_process else None)[0]
