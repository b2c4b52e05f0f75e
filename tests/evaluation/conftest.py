"""Extractors small enough to compute by hand, and a launch of several processes in one."""

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from gnunet.evaluation.extractors import Extractor, Preprocessing, load_extractor
from gnunet.processes import Processes


@pytest.fixture
def pixels() -> Extractor:
    """Features that are the pixels themselves, of 4 x 4 images: 48 of them."""
    return make_extractor(lambda images: images.flatten(1).float() / 255)


@pytest.fixture
def extractor_of() -> Callable[..., Extractor]:
    """An extractor whose network is the given function of uint8 (N, 3, H, W)."""
    return make_extractor


def make_extractor(network, weights: str = "none", preprocessing: Preprocessing | None = None) -> Extractor:
    return Extractor("pixels", network, "pixels", weights, preprocessing, torch.device("cpu"))


@pytest.fixture
def with_threads() -> Callable[[Callable], list]:
    """`with_threads(function)`: what the function returns with 1, 2 and 5 threads."""

    def run(function: Callable) -> list:
        threads, found = torch.get_num_threads(), []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(function())
            assert torch.get_num_threads() == count
        torch.set_num_threads(threads)
        return found

    return run


@pytest.fixture(scope="session")
def efficientnet() -> Extractor:
    return load_extractor("efficientnet_lite0")


@pytest.fixture
def noise_images() -> Callable[..., np.ndarray]:
    """uint8 (count, size, size, channels) of noise."""

    def draw(count: int, seed: int = 0, size: int = 4, channels: int = 3) -> np.ndarray:
        generator = np.random.default_rng(seed)
        return generator.integers(0, 256, (count, size, size, channels), dtype=np.uint8)

    return draw


@pytest.fixture
def launch() -> Callable:
    """Runs function(processes) in threads, as the processes of a launch; gives every result."""

    def run(world_size: int, function: Callable) -> list:
        barrier = threading.Barrier(world_size, timeout=600)
        slots: list = [None] * world_size
        results: list = [None] * world_size
        errors: list[BaseException] = []

        def gather_of(rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
            def gather(tensor: torch.Tensor) -> torch.Tensor:
                slots[rank] = tensor
                barrier.wait()
                gathered = torch.cat(slots)
                barrier.wait()
                return gathered

            return gather

        def work(rank: int) -> None:
            try:
                results[rank] = function(Processes(rank, world_size, gather_of(rank)))
            except BaseException as error:
                errors.append(error)
                barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results

    return run
