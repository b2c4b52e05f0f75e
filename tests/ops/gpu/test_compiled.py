"""The Triton kernels compiled for GPUs that are not here, as scripts/inspect_kernels.py does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts/inspect_kernels.py"
PLAIN = ("odd sizes", "no spatial dimensions")  # shapes whose layout does not allow loads of 16 bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dtype", "center"),
    [(80, "float16", "True"), (90, "bfloat16", "True"), (90, "bfloat16", "False"), (100, "float32", "True")],
)
def test_no_spills_and_wide_loads(tmp_path, arch, dtype, center):
    output = tmp_path / "resources.json"
    command = [sys.executable, SCRIPT, "--arch", str(arch), "--dtypes", dtype, "--center", center, "--output", output]
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    resources = json.loads(output.read_text())
    assert {(r["module"], r["kernel"]) for r in resources} == {
        *(("forward", kernel) for kernel in ("tile", "loop", "moments", "merge", "elements")),
        *(("backward", kernel) for kernel in ("tile", "loop", "sums", "merge", "elements", "over_batch")),
    }
    for r in resources:
        of = {key: r[key] for key in ("module", "kernel", "shape", "layout")}
        assert r["stack"] == r["spills"] == 0, of
        assert 0 < r["registers"] <= 255, of
        if r["shape"] in PLAIN or r["kernel"] in ("merge", "over_batch"):
            continue
        # Every byte of x (and dy) that a thread takes comes in a load of 16; what is narrower reads the tables.
        tensors = 2 if r["module"] == "backward" else 1
        assert r["loads"]["16"] * 16 >= tensors * r["tile_bytes"] > 0, of
        if r["kernel"] in ("tile", "loop", "elements"):
            assert r["stores"]["16"] * 16 >= r["tile_bytes"], of
