"""A tiny data set and configuration that train in about a second on one core, and processes that train it.

The processes are forked from one that has everything imported: a launcher's ranks without its seconds.
"""

import gc
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

# Else torch.cuda.is_available() initializes CUDA, which processes that are forked from this one or from the fork server
# below cannot do again.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed import TCPStore

# Without a GPU, Triton's kernels run on the CPU; the variable is read when they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from gnunet.config import Config, parse_args  # noqa: E402
from gnunet.distributed.accelerator import fresh_accelerate_state  # noqa: E402
from gnunet.errors import run_cli  # noqa: E402

ROOT = Path(__file__).parents[1]
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["gnunet.ablation.runner"])  # which has all that training needs

TINY = """
data: {resolution: 16, class_conditional: true, num_workers: 0, validation_images: 4}
model:
  block_out_channels: [8, 16]
  layers_per_block: 1
  down_block_types: [DownBlock2D, AttnDownBlock2D]
  up_block_types: [AttnUpBlock2D, UpBlock2D]
  norm: {groups: 4}
diffusion: {kind: flow}
train:
  total_images: 64
  batch_size: 8
  learning_rate: 1e-3
  warmup_images: 16
  lr_schedule: cosine
  ema_half_life: 100
  log_every: 16
  validate_every: 32
  sample_every: 32
  checkpoint_every: 24
validation: {num_examples: 16, num_bins: 4}
sampling: {num_inference_steps: 4, num_images: 6, batch_size: 4}
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, so that workers end at about the same time; then those for GPUs, whose time is limited."""
    items.sort(key=lambda item: (item.get_closest_marker("slow") is None, item.path.name != "test_on_gpu.py"))


def pytest_collection_finish() -> None:
    """Each run ends in a search for garbage; half a million objects that stay would make it a quarter of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 20 pictures of 16 x 16 in two classes: light and dark noise."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 128)):
        (folder / name).mkdir()
        for i in range(10):
            picture = rng.integers(low, low + 128, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / name / f"{i}.png")
    return folder


def flags_in(folder: Path, images: Path) -> Callable[..., list[str]]:
    """`flags(name, *more)`: arguments of train.py for a tiny run in folder/name, followed by more flags."""
    file = folder / "tiny.yaml"
    file.write_text(TINY)

    def flags(name: str, *more: str) -> list[str]:
        return [
            "--config", str(file), "--data.source", str(images), "--data.cache_dir", str(folder / "cache"),
            "--run_dir", str(folder / name), *more,
        ]  # fmt: skip

    return flags


@pytest.fixture
def tiny_flags(images: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of train.py for the tiny run, as `tiny_flags(name, "--key", "value", ...)`."""
    return flags_in(tmp_path, images)


@pytest.fixture
def tiny(tiny_flags: Callable[..., list[str]]) -> Callable[..., Config]:
    """The tiny run's configuration, as `tiny(name, "--key", "value", ...)`."""
    return lambda name, *more: parse_args(tiny_flags(name, *more), default_config=ROOT / "none.yaml")


@pytest.fixture(scope="session")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `run` of the tiny run at its end, for tests that only read it; it names no cache."""
    from gnunet.training import fit  # takes seconds, which the tests of operators and norms need not wait for

    folder = tmp_path_factory.mktemp("finished")
    flags = flags_in(folder, images)("run", "--data.cache_dir", "null")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GNUNET_CACHE", str(folder / "cache"))
        fit(parse_args(flags, default_config=ROOT / "none.yaml"))
    return folder / "run"


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads; the old one comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps process-wide state; each test starts without it."""
    with fresh_accelerate_state():
        yield


@pytest.fixture
def little_memory() -> Callable[..., AbstractContextManager[None]]:
    """Context in which the process can allocate at most the given number of bytes."""

    @contextmanager
    def limited(spare: int = 2**28) -> Iterator[None]:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + spare, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    return limited


class Ranks(list[BaseProcess]):
    """The processes of a launch, in the order of their ranks."""

    def __init__(self, processes: list[BaseProcess], outputs: list[Path]) -> None:
        super().__init__(processes)
        self.outputs = outputs

    def ended(self) -> list[int | None]:
        """Wait for all and return their exit statuses; None for one that still runs after ten minutes."""
        end = time.monotonic() + 600
        for process in self:
            process.join(max(0, end - time.monotonic()))
        return [process.exitcode for process in self]

    @property
    def said(self) -> list[str]:
        """The output of each."""
        return [path.read_text() if path.exists() else "" for path in self.outputs]


def work_as_rank(
    environment: dict[str, str], output: Path, work: Config | Callable[[], int], before: Callable | None, also: tuple
) -> None:
    """Train by a configuration, or run a program, as one process of a launch on CPUs."""
    # The server that this was forked from has the signals and the environment of whichever test it was started in.
    os.setsid()
    gc.freeze()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):  # nohup, for instance, leaves one ignored
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(None, force=True)  # else a fork server, which takes seconds
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    os.chdir(output.parent)
    torch.set_num_threads(1)
    assert not torch.cuda._is_in_bad_fork(), "CUDA was started in the fork server: no rank can use it"
    callback = before(int(environment.get("RANK", "0")), *also) if before is not None else None
    if isinstance(work, Config):
        from gnunet.training import fit

        status = run_cli(lambda: fit(work, callback) and None)
    else:
        status = work()
    sys.stdout.flush()
    sys.exit(status)


@pytest.fixture
def start_ranks(tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    """`start_ranks(world, work, before, *also)`: the processes of a launch, each the leader of its process group.

    `work` is the configuration of a run or a function that returns an exit status; each process first calls
    `before(rank, *also)`, which may return the callback of the run.
    """
    started: list[BaseProcess] = []
    stores: list[TCPStore] = []

    def start(world: int, work: Config | Callable[[], int], before: Callable | None = None, *also: object) -> Ranks:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if world > 1:
            # The test keeps the store, as launchers do, so that no other process takes its port before a rank.
            stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
            environment |= {
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(stores[-1].port), "TORCHELASTIC_USE_AGENT_STORE": "True",
                "WORLD_SIZE": str(world), "ACCELERATE_USE_CPU": "true",
            }  # fmt: skip
        outputs = [tmp_path / f"{len(started) + rank}.out" for rank in range(world)]
        ranks = []
        for rank, output in enumerate(outputs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
            arguments = (environment | own, output, work, before, also)
            ranks.append(server.Process(target=work_as_rank, args=arguments))
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
    """`run_ranks(world, work, before, *also, status=0)`: `start_ranks` to the end; returns each rank's output."""

    def run(*arguments: object, status: int = 0) -> list[str]:
        ranks = start_ranks(*arguments)
        assert ranks.ended() == [status] * len(ranks), "\n".join(ranks.said)
        return ranks.said

    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """The tiny run at its end, in the folder of `tiny("run")`."""
    return Path(shutil.copytree(finished, tmp_path / "run"))
