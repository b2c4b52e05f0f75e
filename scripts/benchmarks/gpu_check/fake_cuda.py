"""Build fake_cuda.c for the CUDA build of PyTorch that this Python has, in the place of NVIDIA's libraries.

    python fake_cuda.py    # prints the folder to put into LD_LIBRARY_PATH and TRITON_LIBCUDA_PATH

The environment must have torch and triton, without the packages that torch requires of NVIDIA's, but for the headers
of nvidia-cuda-runtime and the compiler of nvidia-cuda-nvrtc. Every function that torch's libraries want of CUDA's is
there: by hand in fake_cuda.c, else as one that does nothing and succeeds.
"""

import re
import subprocess
import sysconfig
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_cuda.c")
# What is looked up by name while it runs, by Triton's launchers and torch's view of NVML.
BY_NAME = """
cuCtxGetLimit cuCtxSetCurrent cuCtxSetLimit cuFuncSetAttribute cuFuncSetCacheConfig cuLaunchKernel cuLaunchKernelEx
cuModuleUnload cuTensorMapEncodeTiled nvmlInit nvmlInit_v2 nvmlShutdown
"""
SONAMES = {"libcuda.so.1", "libnvidia-ml.so.1"}


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def build(packages: Path) -> Path:
    """Build the libraries for the torch in a site-packages folder; returns theirs, where torch looks for NVIDIA's."""
    folder = packages / "nvidia/cu13/lib"
    folder.mkdir(parents=True, exist_ok=True)
    for library in folder.glob("*"):
        if not library.name.startswith("libnvrtc"):  # which compiles as it does on a machine with a GPU
            library.unlink()
    wanted, sonames = dict.fromkeys(BY_NAME.split(), ""), set(SONAMES)
    for library in (packages / "torch/lib").glob("*.so"):
        undefined = re.findall(r" U (\w+)@*(\S*)", output("nm", "-D", "--undefined-only", library))
        wanted |= {name: version for name, version in undefined if is_nvidias(name, version)}
        sonames |= set(re.findall(r"\[(lib(?:cu|nv|nccl)\S+)\]", output("readelf", "-d", library)))
    written = set(re.findall(r"\b(\w+)\(", SOURCE.read_text()))
    stubs = folder / "stubs.c"
    stubs.write_text("static char thing[65536];\n" + "".join(map(stub, sorted(wanted.keys() - written))))
    versions: dict[str, list[str]] = {}
    for name, version in wanted.items():
        versions.setdefault(version, []).append(f"{name};")
    script = folder / "versions"
    script.write_text("".join(f"{v} {{ global: {' '.join(names)} }};\n" for v, names in versions.items() if v))
    headers = [packages / "nvidia/cu13/include", packages / "triton/backends/nvidia/include"]
    output(
        "gcc", "-O1", "-shared", "-fPIC", "-Wall", *(f"-I{path}" for path in headers), SOURCE, stubs,
        f"-Wl,--version-script={script}", "-o", folder / "fake_cuda.so",
    )  # fmt: skip
    for soname in sonames:
        if not (folder / soname).exists():
            (folder / soname).symlink_to("fake_cuda.so")
    return folder


def is_nvidias(name: str, version: str) -> bool:
    if name.startswith("nvrtc"):  # which is there
        return False
    return version.startswith(("libcu", "libnv", "NVSHMEM")) or bool(
        re.match(r"cu[A-Z]|cuFile|cusparseLt|nccl|nvshmem", name)
    )


def stub(name: str) -> str:
    """A function that succeeds; where its name says that it creates something, its first argument takes it."""
    if "Create" in name or name.startswith("ncclCommInit"):
        return f"int {name}(void **p) {{ *p = thing; return 0; }}\n"
    return f"long {name}(void) {{ return 0; }}\n"


if __name__ == "__main__":
    print(build(Path(sysconfig.get_paths()["purelib"])))
