"""Compiled kernels that travel along: Triton's, and the graphs of torch.compile, which bring theirs with them."""

import io
import json
import pickle
import tarfile
from pathlib import Path

TRITON, INDUCTOR = "triton", "inductor"
GRAPHS, DERIVATIVES = "fxgraph", "aotautograd"
"""Folders of what inductor finds again: compiled graphs, and what they are the derivatives of."""
NEEDED = {".cubin", ".json", ".so"}  # of a kernel; its other files are for readers


def environment(caches: Path) -> dict[str, str]:
    """Where Triton and inductor keep what they compile."""
    return {"TRITON_CACHE_DIR": str(caches / TRITON), "TORCHINDUCTOR_CACHE_DIR": str(caches / INDUCTOR)}


def pack(caches: Path, archive: Path) -> None:
    """Put into an archive what another machine with the same versions and GPU will find: of Triton's cache the kernels
    that are not in a graph."""
    kernels = [path for path in (caches / TRITON).rglob("*") if path.suffix in NEEDED and not is_in_graph(path)]
    graphs = [path for path in (caches / INDUCTOR / GRAPHS).rglob("*") if path.is_file()]
    derivatives = [path for path in (caches / INDUCTOR / DERIVATIVES).rglob("*") if path.is_file()]
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:xz", preset=6) as tar:
        for path in sorted(kernels) + sorted(graphs) + sorted(derivatives):
            content = path.read_bytes()
            if path in graphs:
                content = without_text(content)
            member = tarfile.TarInfo(str(path.relative_to(caches)))
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def is_in_graph(path: Path) -> bool:
    """Whether a file is of a kernel that inductor has written; its graphs have those, too."""
    return path.name.removeprefix("__grp__").startswith("triton_")


def without_text(graph: bytes) -> bytes:
    """A file of a compiled graph (torch 2.11) without its kernels' intermediate representations: a quarter of it."""
    loaded = pickle.loads(graph)  # which has just been written here
    for kernel in getattr(getattr(loaded, "_triton_bundle", None), "kernel_artifacts", ()):
        kernel.artifacts[:] = [file for file in kernel.artifacts if Path(file.filename).suffix in NEEDED]
    return pickle.dumps(loaded)


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
    """How many graphs the caches have, and how many kernels that were compiled and did not come from an archive."""
    graphs = [path for path in (caches / INDUCTOR / GRAPHS).rglob("*") if path.is_file()]
    return {"kernels": len([*(caches / TRITON).rglob("*.ttir")]), "graphs": len(graphs)}
