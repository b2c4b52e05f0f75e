"""The tensors that benchmark_op.py times, named after the networks they come from.

A name is FAMILY/CHANNELS@SIZE/nBATCH: `sd15/320@64/n8` is a norm of 320 channels on 64 x 64 positions in Stable
Diffusion 1.5's U-Net at batch 8. Lists are the published architectures' resolutions and channel counts, those of
concatenated skips included; 32 groups throughout.
"""

from collections import Counter
from dataclasses import dataclass, replace
from math import prod

import torch

LAYOUTS = ("channels_last", "contiguous")
NUM_GROUPS = 32
_SECTOR = 64  # bytes: shorter rows of channels_last waste memory traffic, so a block takes several groups at once

_FAMILIES: dict[str, tuple[tuple[int, ...], str]] = {
    # family: (batch sizes, channels@size)
    "ddpm_cifar10": ((128,), "128@32 256@32 384@32 256@16 384@16 512@16 256@8 512@8 256@4 512@4"),
    "adm64": (
        (32,),
        "192@64 384@64 576@64 384@32 576@32 768@32 960@32 576@16 960@16 1152@16 1344@16 768@8 1344@8 1536@8",
    ),
    "adm256": (
        (4,),
        "256@256 512@256 256@128 512@128 512@64 1024@64 512@32 1024@32 1536@32 1024@16 2048@16 1024@8 2048@8",
    ),
    "sd15": (
        (1, 8, 32),
        "320@64 640@64 960@64 320@32 640@32 960@32 1280@32 1920@32 640@16 1280@16 1920@16 2560@16 1280@8 2560@8",
    ),
    "sdxl": ((1, 4), "320@128 640@128 960@128 320@64 640@64 960@64 1280@64 1920@64 640@32 1280@32 1920@32 2560@32"),
    "vae512": ((1, 4), "512@64 512@128 512@256 256@256 256@512 128@512"),
    "vae1024": ((1,), "512@128 512@512 256@512 256@1024 128@1024"),
    "svd": ((1,), "320@14x72x128 640@14x36x64 1280@14x18x32"),
    "hunyuan_vae": ((1,), "128@20x256x256"),
    "ltx2_vae": ((1,), "512@8x45x80 512@16x90x160 512@16x180x320"),
    "corrdiff": ((4,), "128@448"),
}

_DEFAULT = """
    ddpm_cifar10/128@32 ddpm_cifar10/384@32 ddpm_cifar10/256@16 ddpm_cifar10/512@16 ddpm_cifar10/512@8
    ddpm_cifar10/512@4 adm256/256@256 adm256/512@128 adm256/1024@64 adm256/2048@16 vae512/512@256/n1 vae512/256@512/n1
    vae1024/512@512 vae1024/256@1024 vae1024/128@1024 svd/320 hunyuan_vae ltx2_vae/512@16x90x160 sd15/320@64
    sd15/960@64/n8 sd15/640@32/n8 sd15/1920@32/n8 sd15/1280@16/n1 sd15/2560@16/n32 sd15/1280@8/n8 sdxl/320@128/n1
    sdxl/960@128/n4 sdxl/640@64/n4 sdxl/1280@32/n1 adm64/192@64 adm64/576@32 adm64/1152@16 adm64/1536@8
"""
_DEFAULT_CONTIGUOUS = """
    ddpm_cifar10/128@32 ddpm_cifar10/256@16 adm256/256@256 sd15/320@64/n8 sd15/1280@16/n1 vae512/256@512/n1
    vae1024/128@1024 svd/320 hunyuan_vae ltx2_vae/512@16x90x160
"""


@dataclass(frozen=True)
class Case:
    """One tensor x: (N, C, *spatial) and the groups it is normalized in."""

    name: str
    shape: tuple[int, ...]
    layout: str = "channels_last"
    dtype: torch.dtype = torch.bfloat16
    num_groups: int = NUM_GROUPS

    @property
    def label(self) -> str:
        """Name, layout and dtype: unique in a record."""
        return f"{self.name} {self.layout} {str(self.dtype).removeprefix('torch.')}"

    @property
    def family(self) -> str:
        return self.name.partition("/")[0]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of x, and of each of y, dy and dx."""
        return self.numel * self.dtype.itemsize

    @property
    def working_set(self) -> int:
        """Bytes of x that have to stay on chip for x to be read once: one sample's group, or, in channels_last, as
        many groups as fill 64 bytes of a row."""
        group_channels = self.shape[1] // self.num_groups
        groups = 1 if self.layout == "contiguous" else -(-_SECTOR // (group_channels * self.dtype.itemsize))
        return groups * group_channels * prod(self.shape[2:]) * self.dtype.itemsize

    def shrunk(self, max_elements: int | None) -> "Case":
        """The case with its batch, then its longest side, halved until x has at most `max_elements` elements."""
        shape = list(self.shape)
        while max_elements and prod(shape) > max_elements and max(shape[0], *shape[2:]) > 1:
            side = 0 if shape[0] > 1 else max(range(2, len(shape)), key=lambda d: shape[d])
            shape[side] //= 2
        return replace(self, shape=tuple(shape))


def _every_shape() -> dict[str, tuple[int, ...]]:
    shapes = {}
    for family, (batches, sites) in _FAMILIES.items():
        for site in sites.split():
            channels, size = site.split("@")
            sides = [int(side) for side in size.split("x")]
            for batch in batches:
                shapes[f"{family}/{site}/n{batch}"] = (batch, int(channels), *(sides if len(sides) > 1 else sides * 2))
    return shapes


SHAPES = _every_shape()


def matching(names: list[str]) -> list[str]:
    """The shapes whose name is, or begins with, one of `names`: a family, a site or a full name, in their order.

    Raises:
        ValueError: a name that matches none.
    """
    found: list[str] = []
    for name in names:
        hits = [shape for shape in SHAPES if shape == name or shape.startswith((f"{name}/", f"{name}@"))]
        if not hits:
            raise ValueError(
                f"no shape is called {name!r}; a name is FAMILY, FAMILY/CHANNELS@SIZE or FAMILY/CHANNELS@SIZE/nBATCH, "
                f"as in {', '.join(_FAMILIES)} or {next(iter(SHAPES))}"
            )
        found += [hit for hit in hits if hit not in found]
    return found


def cases(
    shapes: list[str] | None,
    layouts: list[str] | None,
    dtypes: list[torch.dtype],
    max_elements: int | None = None,
) -> list[Case]:
    """The cases to time: one of each family, then the next of each, since where time runs out the last ones go.

    Args:
        shapes: as `matching` takes them; None is a choice of every family.
        layouts: None is channels_last, and of the default shapes some in both.
        max_elements: larger shapes are shrunk.
    """
    names = matching(shapes if shapes is not None else _DEFAULT.split())
    both = set(matching(_DEFAULT_CONTIGUOUS.split())) if shapes is None else set()
    found = [
        Case(name, SHAPES[name], layout, dtype).shrunk(max_elements)
        for dtype in dtypes
        for name in names
        for layout in layouts or (LAYOUTS if name in both else LAYOUTS[:1])
    ]
    seen: Counter[str] = Counter()
    turns = []
    for case in found:
        turns.append(seen[case.family])
        seen[case.family] += 1
    return [case for _, case in sorted(zip(turns, found, strict=True), key=lambda pair: pair[0])]
