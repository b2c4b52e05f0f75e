"""Compiled kernels that travel along: Triton's, and the graphs of torch.compile, which bring theirs with them."""

import json
import tarfile
from pathlib import Path

TRITON, INDUCTOR = "triton", "inductor"
GRAPHS = ("fxgraph", "aotautograd")  # what there is in inductor's cache that other runs find
NEEDED = {".cubin", ".json", ".so"}  # of a kernel; the rest is for readers


def environment(caches: Path) -> dict[str, str]:
    """Where Triton and inductor keep what they compile."""
    return {"TRITON_CACHE_DIR": str(caches / TRITON), "TORCHINDUCTOR_CACHE_DIR": str(caches / INDUCTOR)}


def pack(caches: Path, archive: Path) -> None:
    """Put what another machine with the same versions and GPU will find into an archive."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:xz", preset=6) as tar:
        for path in files(caches):
            tar.add(path, path.relative_to(caches))


def files(caches: Path) -> list[Path]:
    """What is packed: of Triton's the kernels that are not inductor's, and inductor's graphs."""
    triton = [path for path in (caches / TRITON).rglob("*") if path.suffix in NEEDED and not is_inductors(path)]
    graphs = [path for name in GRAPHS for path in (caches / INDUCTOR / name).rglob("*") if path.is_file()]
    return sorted(triton) + sorted(graphs)


def is_inductors(path: Path) -> bool:
    return path.name.removeprefix("__grp__").startswith("triton_")


def unpack(archive: Path, caches: Path) -> None:
    """Fill the caches from an archive."""
    with tarfile.open(archive) as tar:
        tar.extractall(caches, filter="data")
    # Triton names the files of a kernel by their whole path.
    for group in (caches / TRITON).rglob("__grp__*"):
        names = json.loads(group.read_text())["child_paths"]
        there = {name: str(group.parent / name) for name in names if (group.parent / name).exists()}
        group.write_text(json.dumps({"child_paths": there}))


def count(caches: Path) -> dict[str, int]:
    """How many of the operator's kernels, and how many graphs, the caches have."""
    kernels = [path for path in (caches / TRITON).rglob("*.cubin") if not is_inductors(path)]
    graphs = [path for path in (caches / INDUCTOR / GRAPHS[0]).rglob("*") if path.is_file()]
    return {"kernels": len(kernels), "graphs": len(graphs)}
