"""Processes of one run, forked from one that has everything imported: a launcher's ranks without its seconds."""

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from gnunet.config import Config
from gnunet.errors import GnunetError, print_error
from gnunet.training import fit

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["gnunet.training"])


class Ranks(list[BaseProcess]):
    """The processes of a run, in the order of their ranks."""

    def __init__(self, processes: list[BaseProcess], outputs: list[Path]) -> None:
        super().__init__(processes)
        self.outputs = outputs

    def ended(self, seconds: float = 300) -> list[int | None]:
        """Wait for all and give their exit statuses; None for one that goes on."""
        for process in self:
            process.join(seconds)
        return [process.exitcode for process in self]

    @property
    def said(self) -> list[str]:
        """What each has printed."""
        return [path.read_text() for path in self.outputs]


def train(rank: int, world: int, port: int, config: Config, output: Path, before: Callable | None, also: tuple) -> None:
    """What train.py does, as one rank of a launch on CPUs."""
    # The server that this was forked from may be one that an earlier test has started with signals blocked or ignored.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    os.chdir(output.parent)
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), ACCELERATE_USE_CPU="true")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    if before is not None:
        before(rank, *also)
    try:
        status = fit(config)
    except GnunetError as error:
        print_error(error)
        status = 2
    sys.stdout.flush()
    sys.exit(status)


@pytest.fixture
def start_ranks(tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    """`start_ranks(world, config, before, *also)`: the ranks of a run; each first calls `before(rank, *also)`."""
    started: list[BaseProcess] = []

    def start(world: int, config: Config, before: Callable | None = None, *also: object) -> Ranks:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        outputs = [tmp_path / f"{len(started) + rank}.out" for rank in range(world)]
        arguments = [(rank, world, port, config, outputs[rank], before, also) for rank in range(world)]
        ranks = [server.Process(target=train, args=each) for each in arguments]
        started.extend(ranks)
        for process in ranks:
            process.start()
        return Ranks(ranks, outputs)

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def run_ranks(start_ranks: Callable[..., Ranks]) -> Callable[..., list[str]]:
    """`run_ranks(world, config, before, *also, status=0)`: train to the end; gives what each rank has printed."""

    def run(*arguments: object, status: int = 0) -> list[str]:
        ranks = start_ranks(*arguments)
        assert ranks.ended() == [status] * len(ranks), "\n".join(ranks.said)
        return ranks.said

    return run
