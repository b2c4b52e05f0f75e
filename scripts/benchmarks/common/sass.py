"""The machine code of a compiled kernel, as Triton's copy of NVIDIA's cuobjdump prints it."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton


def cuobjdump(option: str, cubin: bytes) -> str:
    """What it prints with an option: --dump-resource-usage, or --dump-sass for the code that is read below."""
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, option, file.name], check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class KernelCode:
    """What one compiled kernel needs.

    tile: elements that a program has in its registers at a time. loads, stores: how many instructions move how many
    bytes from and to global memory.
    """

    kernel: str
    warps: int
    registers: int
    shared: int
    stack: int
    spills: int
    instructions: int
    tile: int
    loads: dict[str, int]
    stores: dict[str, int]
    cluster_barriers: int

    @classmethod
    def read(cls, cubin: bytes, **others: Any) -> "KernelCode":
        """From machine code; the others are what does not stand in it."""
        usage, code = (cuobjdump(option, cubin) for option in ("--dump-resource-usage", "--dump-sass"))
        numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
        names = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", code))
        return cls(
            registers=numbers["REG"],
            stack=numbers["STACK"],
            spills=names["LDL"] + names["STL"],
            instructions=names.total() - names["NOP"],
            loads=widths("LDG", code) | {f"copy {width}": n for width, n in widths("LDGSTS", code).items()},
            stores=widths("STG", code),
            cluster_barriers=names["UCGABAR_WAIT"],
            **others,
        )


def widths(instruction: str, code: str) -> dict[str, int]:
    """How many of the instructions move how many bytes: LDG.E.128 moves 16, LDG.E.U16 2, LDG.E 4."""
    found: dict[str, int] = {}
    for suffix in re.findall(rf"\b{instruction}\.E([.\w]*)", code):
        bits = re.search(r"\.[US]?(8|16|64|128|256)\b", suffix)
        width = str(int(bits[1]) // 8 if bits else 4)
        found[width] = found.get(width, 0) + 1
    return found
