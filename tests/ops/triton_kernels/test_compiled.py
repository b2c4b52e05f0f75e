"""The Triton kernels compiled for GPUs that are not here, as scripts/benchmarks/inspect_kernels.py does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts/benchmarks"
PROGRAM = """
import json, sys
import inspect_kernels
shapes = inspect_kernels.SHAPES
output, cases = sys.argv[1], json.loads(sys.argv[2])
for i, (arch, dtype, center, wanted) in enumerate(cases):
    inspect_kernels.SHAPES = {name: shapes[name] for name in wanted}
    sys.argv[1:] = ["--backend", "triton", "--arch", arch, "--dtypes", dtype, "--center", center]
    sys.argv += ["--output", f"{output}/{i}.json"]
    inspect_kernels.main()
"""
TENS = "groups of 10 channels, large"  # with channels last loads of two channels
EACH_KERNEL = ("a wider one in a large batch", "its lowest level")
"""Shapes that launch each kernel in both layouts: split, and in a single pass."""
EACH_TILING = (
    "its lowest level", TENS, "a group for each channel", "no spatial dimensions", "odd sizes",
)  # fmt: skip
"""Each kernel with and without channels and positions that fill its tiles, and where it takes the most registers."""
CASES = [
    ("80", "float16", "True", EACH_KERNEL),
    ("90", "bfloat16", "True", EACH_TILING),
    ("90", "bfloat16", "False", EACH_KERNEL),
    ("100", "float32", "True", EACH_KERNEL),
]
PLAIN = ("odd sizes", "no spatial dimensions")  # shapes whose layout does not allow loads of 16 bytes
SMALL = ("bwd_combine_sums", "bwd_dweight_dbias")
ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@pytest.mark.slow
def test_no_spills_and_wide_loads(tmp_path):
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parents[1])])
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), json.dumps(CASES)]
    subprocess.run(command, check=True, env=os.environ | environment, stdout=subprocess.PIPE)
    for i, case in enumerate(CASES):
        assert_no_spills_and_wide_loads(json.loads((tmp_path / f"{i}.json").read_text()), case)


def assert_no_spills_and_wide_loads(resources: list[dict], case: tuple) -> None:
    kernels = {r["kernel"] for r in resources}
    assert kernels == {
        "fwd_single_pass", "fwd_partial_stats", "fwd_normalize",
        "bwd_single_pass", "bwd_partial_sums", "bwd_dx", *SMALL,
    }, case  # fmt: skip
    for r in resources:
        of = (case[:3], *(r[key] for key in ("kernel", "shape", "layout")))
        assert r["stack"] == r["spills"] == 0, of
        assert 0 < r["registers"] <= 255, of
        if r["shape"] in PLAIN or r["kernel"] in SMALL:
            continue
        # Every byte of x (and dy) that a thread takes comes in a load as wide as can be; what is narrower reads tables.
        itemsize = ITEMSIZES[r["dtype"]]
        width = 2 * itemsize if r["shape"] == TENS and r["layout"] == "channels_last" else 16
        tile_bytes = r["tile"] * itemsize // (32 * r["warps"])
        tensors = 2 if r["kernel"].startswith("bwd") else 1
        assert r["loads"][str(width)] * width >= tensors * tile_bytes > 0, of
        if r["kernel"] not in ("fwd_partial_stats", "bwd_partial_sums"):
            assert r["stores"][str(width)] * width >= tile_bytes, of
