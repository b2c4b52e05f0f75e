import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gnunet
from gnunet.data import DecodedImages, load_images
from tests.tables import make_table


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Each test has an empty cache."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("GNUNET_CACHE", str(cache))
    return cache


@pytest.fixture
def table() -> DecodedImages:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (23, 8, 8, 3), dtype=np.uint8)
    return make_table(images, rng.integers(0, 5, 23), tuple("abcde"))


@pytest.fixture
def write_images():
    """Writes one 8x8 picture of a single grey value to each file."""

    def write(folder: Path, values: dict[str, int]) -> Path:
        for name, value in values.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), value).save(file, "PNG")
        return folder

    return write


@pytest.fixture
def load():
    """`load_images` of 8x8 grey pictures."""
    return lambda source, **keys: load_images(str(source), **{"resolution": 8, "channels": 1, **keys})


@pytest.fixture
def greys():
    """The value of each picture that is all of one grey."""
    return lambda table: table.images[:, 0, 0, 0].tolist()


@pytest.fixture
def run_python():
    """Runs a program in a new session, with more environment variables."""

    def run(program: str, **environment: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": str(Path(gnunet.__file__).parent.parent), **environment}
        command = [sys.executable, "-c", program]
        return subprocess.run(
            command, env=environment, start_new_session=True, capture_output=True, text=True, timeout=600
        )

    return run
