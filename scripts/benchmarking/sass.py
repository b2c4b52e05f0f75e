"""The machine code of a compiled kernel, as Triton's copy of NVIDIA's cuobjdump prints it."""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton


def cuobjdump(option: str, cubin: bytes) -> str:
    """What it prints with an option: --dump-resource-usage, or --dump-sass for the code that is read below."""
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, option, file.name], check=True, capture_output=True, text=True).stdout


def _instructions(code: str) -> list[tuple[int, str, str]]:
    """Address, name and operands of each."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)([^;]*);", code)
    return [(int(address, 16), name, operands) for address, name, operands in found]


def counts(code: str) -> Counter[str]:
    """How many instructions of each name, but for those that do nothing."""
    return Counter(name for _, name, _ in _instructions(code) if name != "NOP")


class Loop(NamedTuple):
    """An innermost loop: its instructions, and how many of them load from and store to global memory, copy from it to
    shared memory, load from there, and compute in fp32."""

    instructions: int
    loads: int
    stores: int
    copies: int
    shared_loads: int
    floats: int


def loops(code: str) -> list[Loop]:
    """The innermost loops, in their order."""
    lines = _instructions(code)
    at = {address: i for i, (address, _, _) in enumerate(lines)}
    spans = []
    for i, (_, name, operands) in enumerate(lines):
        target = re.search(r"0x([0-9a-f]+)", operands) if name == "BRA" else None
        if target and (start := at.get(int(target[1], 16), i)) < i:
            spans.append((start, i))
    inner = [(a, b) for a, b in spans if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)]
    found = []
    for start, end in inner:
        names = Counter(name for _, name, _ in lines[start : end + 1])
        floats = names["FADD"] + names["FMUL"] + names["FFMA"]
        found.append(Loop(end + 1 - start, names["LDG"], names["STG"], names["LDGSTS"], names["LDS"], floats))
    return found


def widths(instruction: str, code: str) -> dict[str, int]:
    """How many of the instructions move how many bytes: LDG.E.128 moves 16, LDG.E.U16 2, LDG.E 4."""
    found: dict[str, int] = {}
    for suffix in re.findall(rf"\b{instruction}\.E([.\w]*)", code):
        bits = re.search(r"\.[US]?(8|16|64|128|256)\b", suffix)
        width = str(int(bits[1]) // 8 if bits else 4)
        found[width] = found.get(width, 0) + 1
    return found
