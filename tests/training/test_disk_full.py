"""A run whose disk fills up: what is said, what is left, and how it goes on when there is room."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gnunet.training import fit
from gnunet.training.checkpoint import check_whole, list_checkpoints

ROOT = Path(__file__).parents[2]
SCRIPT = """
set -u
mount -t tmpfs -o size="$1"k tmpfs run || exit 77
shift
"$@" > first.out 2>&1; echo $? > first.status
cp -r run left
mount -o remount,size=64m run
"$@" > second.out 2>&1; echo $? > second.status
cp -r run ended
"""


def in_a_small_folder(kib: int, flags: list[str], folder: Path) -> tuple[int, str]:
    """Train in folder/run, a file system of its own, and once more after it has grown.

    `left` and `ended` are what is there after each; returns the first's status and output.
    """
    (folder / "run").mkdir()
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", SCRIPT, "sh", str(kib)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    try:
        status = subprocess.run(
            [*command, sys.executable, str(ROOT / "train.py"), *flags], cwd=folder, env=environment
        ).returncode
    except FileNotFoundError:
        status = 1
    if not (folder / "second.status").exists():
        pytest.skip(f"a small file system cannot be mounted here (status {status})")
    assert (folder / "second.status").read_text() == "0\n", (folder / "second.out").read_text()
    return int((folder / "first.status").read_text()), (folder / "first.out").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("every", "room"), [("8", 0.5), ("8", 3.5), ("0", 24), ("0", 32)], ids=str)
def test_a_full_disk_loses_nothing(tiny, tiny_flags, tmp_path, every, room):
    """Full in the first or a later checkpoint or, where there are none yet, in a log or a grid after so many KiB."""
    more = ["--train.log_every=8", "--train.sample_every=8", f"--train.checkpoint_every={every}"]
    more += ["--train.keep_checkpoints=9"]
    fit(tiny("whole", *more))
    checkpoint = sum(path.stat().st_size for path in (tmp_path / "whole/checkpoints/000000064").iterdir()) / 1024
    room = int(room * (checkpoint if every == "8" else 1))
    (tmp_path / "small").mkdir()
    flags = [flag.replace(str(tmp_path / "run"), "run") for flag in tiny_flags("run", *more)]
    status, said = in_a_small_folder(room, flags, tmp_path / "small")
    assert status == 2 and "Traceback" not in said, said
    assert "cannot be written" in said and "No space left" in said, said
    for path in list_checkpoints(tmp_path / "small/left/checkpoints"):
        check_whole(path)
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        ended, whole = (tmp_path / run / "checkpoints/000000064" / name for run in ("small/ended", "whole"))
        assert ended.read_bytes() == whole.read_bytes()
    assert (tmp_path / "small/ended/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
