"""An archive of compiled kernels for another machine: gnunet's in CUDA C++, Triton's, and torch.compile's graphs, which
contain their own."""

import io
import json
import pickle
import tarfile
from pathlib import Path

CUDA, TRITON, INDUCTOR = "cuda", "triton", "inductor"
GRAPHS, AOT_AUTOGRAD = "fxgraph", "aotautograd"
"""Folders of inductor's cache: compiled graphs, and the forward and backward graphs that AOTAutograd has traced."""
NEEDED = {".cubin", ".json", ".so"}
"""Suffixes of a kernel's files that are loaded; its intermediate representations are not."""


def environment(caches: Path) -> dict[str, str]:
    """Where gnunet, Triton and inductor keep what they compile."""
    folders = {"GNUNET_KERNEL_CACHE": CUDA, "TRITON_CACHE_DIR": TRITON, "TORCHINDUCTOR_CACHE_DIR": INDUCTOR}
    return {name: str(caches / folder) for name, folder in folders.items()}


def pack(caches: Path, archive: Path) -> None:
    """Write an archive from which a machine with the same GPU and the same versions loads everything in the caches."""
    kernels = [path for path in files(caches / TRITON) if path.suffix in NEEDED and not is_in_graph(path)]
    kernels += files(caches / CUDA)
    graphs, traced = (files(caches / INDUCTOR / name) for name in (GRAPHS, AOT_AUTOGRAD))
    contents = {path: path.read_bytes() for path in kernels + traced}
    contents |= {path: without_text(path.read_bytes()) for path in graphs}
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_suffix(".partial")
    with tarfile.open(partial, "w:xz", preset=6) as tar:
        for path, content in contents.items():
            member = tarfile.TarInfo(str(path.relative_to(caches)))
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    partial.replace(archive)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def is_in_graph(path: Path) -> bool:
    """Whether a file belongs to a kernel that inductor has generated, which its graph contains as well."""
    return path.name.removeprefix("__grp__").startswith("triton_")


def without_text(graph: bytes) -> bytes:
    """Strip a cached graph (torch 2.11) of its kernels' intermediate representations: a quarter remains."""
    loaded = pickle.loads(graph)  # which this machine has just written
    for kernel in getattr(getattr(loaded, "_triton_bundle", None), "kernel_artifacts", ()):
        kernel.artifacts[:] = [file for file in kernel.artifacts if Path(file.filename).suffix in NEEDED]
    return pickle.dumps(loaded)


def unpack(archive: Path, caches: Path) -> None:
    """Fill the caches from an archive."""
    with tarfile.open(archive) as tar:
        tar.extractall(caches, filter="data")
    # Triton lists a kernel's files by their absolute paths.
    for group in (caches / TRITON).rglob("__grp__*"):
        names = json.loads(group.read_text())["child_paths"]
        there = {name: str(group.parent / name) for name in names if (group.parent / name).exists()}
        group.write_text(json.dumps({"child_paths": there}))


def count(caches: Path) -> dict[str, int]:
    """How many kernels in the caches were compiled on this machine, and how many graphs there are."""
    return {
        "kernels": len([path for path in files(caches / TRITON) if path.suffix == ".ttir"]) + len(files(caches / CUDA)),
        "graphs": len(files(caches / INDUCTOR / GRAPHS)),
    }
