"""The Triton kernels compiled for GPUs that are not here, as scripts/benchmarks/inspect_kernels.py does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts/benchmarks"
PROGRAM = """
import sys
import inspect_kernels
if (wanted := sys.argv.pop(1)) != "all":
    inspect_kernels.SHAPES = {name: inspect_kernels.SHAPES[name] for name in wanted.split("|")}
inspect_kernels.main()
"""
EACH_KERNEL = "a level of DDPM's U-Net|a wider one in a large batch|its lowest level|odd sizes"
"""Shapes that launch each kernel; all of the script's are compiled once."""
PLAIN = ("odd sizes", "no spatial dimensions")  # shapes whose layout does not allow loads of 16 bytes
TENS = ("groups of 10 channels", "groups of 10 channels, large")  # with channels last loads of two channels
SMALL = ("bwd_combine_sums", "bwd_dweight_dbias")
ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


def run(command: list, cache: Path) -> str:
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parents[1])])
    return subprocess.run(command, check=True, env=os.environ | environment, stdout=subprocess.PIPE, text=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dtype", "center", "shapes"),
    [
        (80, "float16", "True", EACH_KERNEL),
        (90, "bfloat16", "True", "all"),
        (90, "bfloat16", "False", EACH_KERNEL),
        (100, "float32", "True", EACH_KERNEL),
    ],
    ids=["80-float16", "90-bfloat16", "90-bfloat16-rms", "100-float32"],
)
def test_no_spills_and_wide_loads(tmp_path, arch, dtype, center, shapes):
    output = tmp_path / "resources.json"
    command = [sys.executable, "-c", PROGRAM, shapes, "--backend", "triton"]
    command += ["--arch", str(arch), "--dtypes", dtype, "--center", center, "--output", output]
    run(command, tmp_path)
    resources = json.loads(output.read_text())
    kernels = {r["kernel"] for r in resources}
    assert kernels == {
        "fwd_single_pass", "fwd_partial_stats", "fwd_normalize",
        "bwd_single_pass", "bwd_partial_sums", "bwd_dx", *SMALL,
    }  # fmt: skip
    for r in resources:
        of = {key: r[key] for key in ("kernel", "shape", "layout", "dtype")}
        assert r["stack"] == r["spills"] == 0, of
        assert 0 < r["registers"] <= 255, of
        if r["shape"] in PLAIN or r["kernel"] in SMALL:
            continue
        # Every byte of x (and dy) that a thread takes comes in a load as wide as can be; what is narrower reads tables.
        itemsize = ITEMSIZES[r["dtype"]]
        width = 2 * itemsize if r["shape"] in TENS and r["layout"] == "channels_last" else 16
        tile_bytes = r["tile"] * itemsize // (32 * r["warps"])
        tensors = 2 if r["kernel"].startswith("bwd") else 1
        assert r["loads"][str(width)] * width >= tensors * tile_bytes > 0, of
        if r["kernel"] not in ("fwd_partial_stats", "bwd_partial_sums"):
            assert r["stores"][str(width)] * width >= tile_bytes, of
