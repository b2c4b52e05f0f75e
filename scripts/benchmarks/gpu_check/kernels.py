"""An archive of gnunet's compiled kernels, in CUDA C++ and in Triton, for another machine.

What torch.compile makes is left out: its cache distinguishes the fake device from a real one and recompiles.
"""

import io
import json
import tarfile
from pathlib import Path

CUDA, TRITON, INDUCTOR = "cuda", "triton", "inductor"
NEEDED = {".cubin", ".json", ".so"}
"""Suffixes of a kernel's files that are loaded; its intermediate representations are not."""


def environment(caches: Path) -> dict[str, str]:
    """Where gnunet, Triton and inductor keep what they compile."""
    folders = {"GNUNET_KERNEL_CACHE": CUDA, "TRITON_CACHE_DIR": TRITON, "TORCHINDUCTOR_CACHE_DIR": INDUCTOR}
    return {name: str(caches / folder) for name, folder in folders.items()}


def pack(caches: Path, archive: Path) -> None:
    """Write an archive from which a machine with the same GPU and the same versions loads everything in the caches."""
    kernels = [path for path in files(caches / TRITON) if path.suffix in NEEDED and not is_inductors(path)]
    contents = {path: path.read_bytes() for path in kernels + files(caches / CUDA)}
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


def is_inductors(path: Path) -> bool:
    """Whether a file belongs to a kernel that inductor has generated."""
    return path.name.removeprefix("__grp__").startswith("triton_")


def unpack(archive: Path, caches: Path) -> None:
    """Fill the caches from an archive."""
    with tarfile.open(archive) as tar:
        tar.extractall(caches, filter="data")
    # Triton lists a kernel's files by their absolute paths.
    for group in (caches / TRITON).rglob("__grp__*"):
        names = json.loads(group.read_text())["child_paths"]
        there = {name: str(group.parent / name) for name in names if (group.parent / name).exists()}
        group.write_text(json.dumps({"child_paths": there}))


def count(caches: Path) -> int:
    """How many of gnunet's kernels in the caches were compiled on this machine, and of those in CUDA C++ all."""
    compiled = [path for path in files(caches / TRITON) if path.suffix == ".ttir" and not is_inductors(path)]
    return len(compiled) + len(files(caches / CUDA))
