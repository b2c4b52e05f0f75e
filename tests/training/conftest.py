import shutil
from pathlib import Path

import pytest


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """The tiny run at its end, in the folder of `tiny("run")`."""
    return Path(shutil.copytree(finished, tmp_path / "run"))
