"""A chart of inspect_kernels.py's record: bytes a second over the size of a tensor, beside the bandwidth of the GPU."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarking.model import BANDWIDTH, LAUNCH, LOAD, TAIL

PEAK = 3.35
"""TB/s, of an H100's memory by its data sheet."""
BYTES = {"forward": (2, "x read, y written: 4 bytes an element"), "backward": (3, "x, dy read, dx written: 6 bytes")}
"""How many tensors are moved at the least, and which."""


def draw(record: dict[str, Any], path: Path) -> None:
    """Write the chart of a record's predictions to a file."""
    from matplotlib.figure import Figure  # an extra, which nothing else here needs

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (direction, (tensors, moved)) in zip(panels, BYTES.items(), strict=True):
        rows = [row for row in record["rows"] if row["direction"] == direction]
        points = {
            "torch.compile, at the least": [row for row in rows if "compiled_seconds" in row["predicted"]],
            "gnunet, Triton": [row for row in rows if row["backend"] == "triton"],
            "gnunet, CUDA C++": [row for row in rows if row["backend"] == "cuda" and row["kernels"][0]["held"] == 1],
        }
        for (name, found), marker, color in zip(points.items(), "x.o", ("0.55", "tab:orange", "tab:blue"), strict=True):
            times = [row["predicted"]["compiled_seconds" if "compile" in name else "seconds"] for row in found]
            sizes = [row["tensor_bytes"] for row in found]
            speeds = [tensors * size / time / 1e12 for size, time in zip(sizes, times, strict=True)]
            panel.plot([size / 1e6 for size in sizes], speeds, marker, color=color, markersize=5, label=name)
        size = np.geomspace(3e5, 6e8, 200)
        copy = LAUNCH + np.maximum(tensors * size / BANDWIDTH, LOAD + TAIL)
        panel.plot(size / 1e6, tensors * size / copy / 1e12, color="0.3", linewidth=1, label="a copy of as many bytes")
        panel.axhline(PEAK, color="0.3", linewidth=1, linestyle=":", label=f"peak, {PEAK} TB/s")
        panel.set(xscale="log", xlabel="MB of x (bf16)", title=f"{direction}: {moved}", ylim=(0, 3.5))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("TB/s of these bytes, predicted for an H100")
    panels[1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.95))
    figure.savefig(path, dpi=110)
