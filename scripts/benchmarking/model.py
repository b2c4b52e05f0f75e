"""A model of how long the operator's kernels take on an H100, from their machine code: predictions, not measurements.

A kernel takes the longest of what its bytes take, its instructions, and its programs one wave after another, each
with the latency of its loads and barriers. Nothing of it has been compared with a GPU yet: the constants are the data
sheet's and what others have measured, and what it says of small tensors may be off by 40%, of large ones by 25%.
"""

from collections.abc import Iterable
from dataclasses import dataclass

MULTIPROCESSORS = 132
CLOCK = 1.755e9
WARP_INSTRUCTIONS = MULTIPROCESSORS * 4 * CLOCK * 0.85
"""A second, of the whole chip."""
BANDWIDTH = 3.0e12
"""Bytes a second of a copy."""
L2_BANDWIDTH, L2_BYTES = 5.5e12, 30e6
"""Bytes a second, and what is left of a tensor for the kernel after the one that read it."""
AHEAD = 2
"""Tiles that a program has asked for at a time."""
LAUNCH = 2e-6
"""Seconds from one kernel of a graph to the next: drain, launch, ramp."""
LOAD, CACHED_LOAD = 0.75e-6, 0.30e-6
"""Latency of a load from memory under load, and from a cache."""
BARRIER = 0.05e-6
REDUCTION = 4
"""Barriers of a reduction over a program."""
TAIL = 0.5e-6
"""Seconds of a program before its first load and after its last."""
SMALL_KERNEL = 1.5e-6
"""Seconds of a kernel that adds up rows of sums."""
SMALL = ("bwd_combine_sums", "bwd_dweight_dbias")


@dataclass(frozen=True)
class KernelCode:
    """What one compiled kernel needs.

    tile: elements that a program has in its registers at a time. tiles: how many of them, one after the other. loops:
    the innermost, as instructions, loads and stores. loads, stores: how many instructions move how many bytes from and
    to global memory.
    """

    kernel: str
    warps: int
    registers: int
    shared: int
    stack: int
    spills: int
    barriers: int
    instructions: int
    loops: list[tuple[int, int, int]]
    tile: int
    loads: dict[str, int]
    stores: dict[str, int]

    @property
    def resident_programs(self) -> int:
        """On a multiprocessor of an H100."""
        by_registers = 65536 // (-(-self.registers // 8) * 8 * 32 * self.warps)
        return max(1, min(by_registers, 64 // self.warps, 233472 // (self.shared + 1024), 32))

    @property
    def resident_warps(self) -> int:
        return self.resident_programs * self.warps

    @property
    def elements_per_thread(self) -> float:
        return self.tile / (32 * self.warps)

    @property
    def main_loops(self) -> list[tuple[int, int, int]]:
        """Those that go over the tiles of x."""
        return [loop for loop in self.loops if loop[1]] if self.tile and "single" not in self.kernel else []

    @property
    def instructions_per_element(self) -> float:
        """Of a thread: in the loops over tiles, or in all where there is none."""
        return (sum(loop[0] for loop in self.main_loops) or self.instructions) / max(1.0, self.elements_per_thread)


@dataclass(frozen=True)
class Prediction:
    """Of the kernels of a direction: the seconds that they take, beside lower bounds of other ways."""

    seconds: float
    limited_by: list[str]
    copy_seconds: float
    """Of a copy of the least bytes that must be moved."""
    two_pass_seconds: float
    """The least of any two kernels, the first reading and the second reading again and writing, and in backward of a
    small one: each limited by its bytes, or by one load."""


def predict(kernels: list[tuple[KernelCode, int, int]], direction: str, tensor_bytes: int) -> Prediction:
    """From each kernel's code, programs, and tiles of a program; tensor_bytes are those of x."""
    tensors = 1 if direction == "forward" else 2  # that are read
    cached = min(1.0, L2_BYTES / (tensors * tensor_bytes))
    parts = [_seconds(*kernel, tensors, tensor_bytes, cached) for kernel in kernels]
    copy = LAUNCH + (tensors + 1) * tensor_bytes / BANDWIDTH
    two_pass = 2 * LAUNCH + max(tensors * tensor_bytes / BANDWIDTH, LOAD + TAIL + REDUCTION * BARRIER)
    two_pass += max(_moving(tensors * tensor_bytes, cached, tensor_bytes), LOAD + TAIL)
    if direction == "backward":
        two_pass += LAUNCH + SMALL_KERNEL
    total = sum(seconds for seconds, _ in parts)
    return Prediction(total, [limit for _, limit in parts], copy, two_pass)


def predict_least(kernels: Iterable[tuple[int, int, int]]) -> float:
    """The least that kernels can take which read and write so many bytes and execute so many instructions: each limited
    by its bytes, by its instructions, or by one load."""
    seconds = left = 0.0
    for read, written, instructions in kernels:
        moved = _moving(read, min(1.0, left / max(1, read)), written)
        seconds += LAUNCH + max(moved, instructions / WARP_INSTRUCTIONS, LOAD + TAIL)
        left = L2_BYTES
    return seconds


def _moving(read: int, cached: float, written: int) -> float:
    """Seconds for so many bytes, of which a share of those that are read is in L2."""
    return (read * (1 - cached) + written) / BANDWIDTH + read * cached / L2_BANDWIDTH


def _seconds(
    code: KernelCode, programs: int, tiles: int, tensors: int, tensor_bytes: int, cached: float
) -> tuple[float, str]:
    if code.kernel in SMALL:
        return LAUNCH + SMALL_KERNEL, "latency"
    read = tensors * tensor_bytes
    loops = code.main_loops
    outside = code.instructions - sum(loop[0] for loop in loops)
    resident = min(code.resident_programs, -(-programs // MULTIPROCESSORS))
    rounds = -(-programs // (MULTIPROCESSORS * code.resident_programs))

    def issue(instructions: float) -> float:
        """Seconds of a program, beside the others of its multiprocessor."""
        return instructions * code.warps * resident / 4 / CLOCK

    if "single_pass" in code.kernel:
        moved = (read + tensor_bytes) / BANDWIDTH
        executed = 0.9 * code.instructions
        latency = LOAD + issue(executed) / 2
    elif "two_pass" in code.kernel:
        moved = (read + tensor_bytes) / BANDWIDTH
        first, second = (loops * 2)[:2]
        executed = outside + tiles * (first[0] + second[0])
        latency = tiles * (max(LOAD / AHEAD, issue(first[0])) + max(CACHED_LOAD / AHEAD, issue(second[0])))
    else:
        writes = "normalize" in code.kernel or "dx" in code.kernel
        again = cached if writes else 0.0
        moved = _moving(read, again, writes * tensor_bytes)
        body = loops[0][0] if loops else 0
        executed = outside + tiles * body
        latency = LOAD + (tiles - 1) * max(LOAD / AHEAD, issue(body)) + writes * CACHED_LOAD
    latency += code.barriers * BARRIER + TAIL
    limits = {
        "bytes": moved,
        "instructions": programs * code.warps * executed / WARP_INSTRUCTIONS,
        "latency": rounds * latency,
    }
    limit = max(limits, key=limits.__getitem__)
    return LAUNCH + limits[limit], limit
