"""One thread for arithmetic whose bits must not depend on how many threads a process has."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's CPU operators in one thread inside; the number of threads is put back after.

    Convolutions, matrix products and factorizations split their sums by the number of threads, and a launch of
    several processes gives each fewer. On a CPU, more processes, not more threads, use more cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
