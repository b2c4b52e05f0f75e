"""A model of how long the operator's kernels take on an H100, from their machine code: predictions, not measurements.

A kernel takes the longest of what its bytes and one load take, its instructions, and its programs one wave after
another, each with the latency of its loads and barriers. Nothing of it has been compared with a GPU yet: the constants
are the data sheet's and what others have measured, and what it says of small tensors may be off by 40%, of large ones
by 25%.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarking.sass import Loop, counts, cuobjdump, loops, widths

MULTIPROCESSORS = 132
CLUSTER_SITES = (16,) * 6 + (18,) * 2
"""Multiprocessors of each part of the chip that a cluster runs within."""
CLOCK = 1.755e9
WARP_INSTRUCTIONS = MULTIPROCESSORS * 4 * CLOCK * 0.85
"""A second, of the whole chip."""
BANDWIDTH = 3.0e12
"""Bytes a second of a copy."""
L2_BANDWIDTH, L2_BYTES = 5.5e12, 30e6
"""Bytes a second, and what is left of a tensor for the kernel after the one that read it."""
ONE_BANDWIDTH = 60e9
"""Bytes a second of one multiprocessor, where the others are idle."""
AHEAD = 2
"""Tiles that a program has asked for at a time."""
LAUNCH = 2e-6
"""Seconds from one kernel of a graph to the next: drain, launch, ramp."""
LOAD, CACHED_LOAD = 0.75e-6, 0.30e-6
"""Latency of a load from memory under load, and from a cache."""
BARRIER, CLUSTER_BARRIER = 0.05e-6, 0.25e-6
REDUCTION = 4
"""Barriers of a reduction over a program."""
TAIL = 0.5e-6
"""Seconds of a program before its first load and after its last."""
SMALL_KERNEL = 1.5e-6
"""Seconds of a kernel that adds up rows of sums."""
SMALL = ("bwd_combine_sums", "bwd_dweight_dbias")
OUTSIDE, OUTSIDE_AFTER = 0.6, 0.4
"""Of the instructions outside of a cluster kernel's loops over vectors, what a thread executes, and what of them after
the loads: the rest are slow paths of divisions and the work of single warps."""
STAGES = 4
"""Of a cluster kernel's loads: the last one's elements are added up when all have come."""


@dataclass(frozen=True)
class KernelCode:
    """What one compiled kernel needs.

    tile: elements that a program has in its registers at a time. tiles: how many of them, one after the other. loops:
    the innermost. loads, stores: how many instructions move how many bytes from and to global memory. ranks: programs
    of a cluster, 0 where the kernel is not one of clusters. vector: elements that a thread of those loads at a time.
    """

    kernel: str
    warps: int
    registers: int
    shared: int
    stack: int
    spills: int
    barriers: int
    instructions: int
    loops: list[Loop]
    tile: int
    loads: dict[str, int]
    stores: dict[str, int]
    ranks: int = 0
    cluster_barriers: int = 0
    vector: int = 1

    @classmethod
    def read(cls, cubin: bytes, **others: Any) -> "KernelCode":
        """From machine code; the others are what does not stand in it."""
        usage, code = (cuobjdump(option, cubin) for option in ("--dump-resource-usage", "--dump-sass"))
        numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
        names = counts(code)
        return cls(
            registers=numbers["REG"],
            stack=numbers["STACK"],
            spills=names["LDL"] + names["STL"],
            barriers=names["BAR"],
            instructions=names.total(),
            loops=loops(code),
            loads=widths("LDG", code) | {f"copy {width}": n for width, n in widths("LDGSTS", code).items()},
            stores=widths("STG", code),
            cluster_barriers=names["UCGABAR_WAIT"],
            **others,
        )

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
    def main_loops(self) -> list[Loop]:
        """Those that go over the tiles of x."""
        if self.ranks:
            return [loop for loop in self.loops if loop.copies or self._computes(loop)]
        return [loop for loop in self.loops if loop.loads] if self.tile and "single" not in self.kernel else []

    def _computes(self, loop: Loop) -> bool:
        """Whether it computes on vectors of one tensor or two, in shared memory or not."""
        loads = max(loop.shared_loads, loop.loads)
        return 1 <= loads <= 2 and loop.floats >= 3 * self.vector

    @property
    def instructions_per_element(self) -> float:
        """Of a thread: in the loops over tiles, or in all where there is none."""
        loops = sum(loop.instructions for loop in self.main_loops)
        return (loops or self.instructions) / max(1.0, self.elements_per_thread)

    @property
    def outside(self) -> int:
        """Instructions outside of the innermost loops, or of the main ones."""
        loops = self.loops if self.ranks else self.main_loops
        return self.instructions - sum(loop.instructions for loop in loops)


@dataclass(frozen=True)
class Work:
    """Of a launch: its programs, the tiles of each, and how it moves its tensors.

    held: the share of what is read that stays on chip until the end. overhead: bytes of the sectors that are touched,
    over those that are wanted. last_loads: how many loads, one after the other, add up the sums of all samples.
    """

    programs: int
    tiles: int
    held: float = 1.0
    overhead: float = 1.0
    last_loads: int = 0


@dataclass(frozen=True)
class Prediction:
    """Of the kernels of a direction: the seconds that they take, beside lower bounds of other ways."""

    seconds: float
    limited_by: list[str]
    copy_seconds: float
    """Of a copy of the least bytes that must be moved: limited by them, or by one load."""
    two_pass_seconds: float
    """The least of any two kernels, the first reading and the second reading again and writing, and in backward of a
    small one: each limited by its bytes, or by one load."""

    @property
    def share_of_copy(self) -> float:
        return self.copy_seconds / self.seconds


def predict(kernels: list[tuple[KernelCode, Work]], direction: str, tensor_bytes: int) -> Prediction:
    """From the kernels of a direction; tensor_bytes are those of x."""
    tensors = 1 if direction == "forward" else 2  # that are read
    cached = min(1.0, L2_BYTES / (tensors * tensor_bytes))
    parts = [_seconds(code, work, tensors, tensor_bytes, cached) for code, work in kernels]
    copy = LAUNCH + max((tensors + 1) * tensor_bytes / BANDWIDTH, LOAD + TAIL)
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


def _moving(read: float, cached: float, written: float) -> float:
    """Seconds for so many bytes, of which a share of those that are read is in L2."""
    return (read * (1 - cached) + written) / BANDWIDTH + read * cached / L2_BANDWIDTH


def _seconds(code: KernelCode, work: Work, tensors: int, tensor_bytes: int, cached: float) -> tuple[float, str]:
    if code.kernel in SMALL:
        return LAUNCH + SMALL_KERNEL, "latency"
    if code.ranks or "single_pass" in code.kernel:
        return _one_pass_seconds(code, work, tensors, tensor_bytes)
    read = tensors * tensor_bytes
    loops, outside = code.main_loops, code.outside
    resident = min(code.resident_programs, -(-work.programs // MULTIPROCESSORS))
    rounds = -(-work.programs // (MULTIPROCESSORS * code.resident_programs))

    def issue(instructions: float) -> float:
        """Seconds of a program, beside the others of its multiprocessor."""
        return instructions * code.warps * resident / 4 / CLOCK

    if "two_pass" in code.kernel:
        moved = read / BANDWIDTH + _moving(read, 1.0, tensor_bytes)
        first, second = (loop.instructions for loop in (loops * 2)[:2])
        executed = outside + work.tiles * (first + second)
        latency = work.tiles * (max(LOAD / AHEAD, issue(first)) + max(CACHED_LOAD / AHEAD, issue(second)))
    else:
        writes = "normalize" in code.kernel or "dx" in code.kernel
        again = cached if writes else 0.0
        moved = _moving(read, again, writes * tensor_bytes)
        body = loops[0].instructions if loops else 0
        executed = outside + work.tiles * body
        latency = LOAD + (work.tiles - 1) * max(LOAD / AHEAD, issue(body)) + writes * CACHED_LOAD
    latency += code.barriers * BARRIER + TAIL
    limits = {
        "bytes": moved + LOAD + TAIL,
        "instructions": work.programs * code.warps * executed / WARP_INSTRUCTIONS,
        "latency": rounds * latency,
    }
    limit = max(limits, key=limits.__getitem__)
    return LAUNCH + limits[limit], limit


def _one_pass_seconds(code: KernelCode, work: Work, tensors: int, tensor_bytes: int) -> tuple[float, str]:
    """Of a kernel that holds what it has read until it writes.

    Between the two a program moves nothing. What that takes adds to the time of the bytes once, and again in each
    round in which others do not move theirs meanwhile.
    """
    moved_bytes = (tensors + 1) * tensor_bytes
    moved = max(moved_bytes / BANDWIDTH, moved_bytes * work.overhead / L2_BANDWIDTH)
    resident = code.resident_programs
    at_once = MULTIPROCESSORS * resident
    if code.ranks:
        at_once = max(1, sum(sites * resident // code.ranks for sites in CLUSTER_SITES)) * code.ranks
    again = (1 - work.held) * tensors * tensor_bytes
    running = min(1.0, at_once / work.programs) * tensors * tensor_bytes
    moved += _moving(again, min(1.0, L2_BYTES / running), 0)
    busiest = -(-work.programs // MULTIPROCESSORS) * moved_bytes / work.programs
    moved = max(moved, busiest * work.overhead / ONE_BANDWIDTH)
    if code.ranks:
        loops = code.main_loops
        sums = next((loop.instructions for loop in loops if not (loop.copies or loop.stores)), 0)
        executed = OUTSIDE * code.outside + work.tiles * sum(loop.instructions for loop in loops)
        after_loads = OUTSIDE_AFTER * code.outside + work.tiles * sums / STAGES
    else:
        executed = 0.9 * code.instructions
        after_loads = executed / 2
    rounds = -(-work.programs // at_once)
    beside = min(resident, -(-work.programs // MULTIPROCESSORS))
    between = code.barriers * BARRIER + code.cluster_barriers * (CLUSTER_BARRIER if code.ranks > 1 else BARRIER)
    between += after_loads * code.warps * beside / 4 / CLOCK
    latency = LOAD + between + TAIL + (rounds - 1) * (LOAD + between) / resident
    latency += CACHED_LOAD * work.last_loads
    limits = {
        "bytes": moved + latency,
        "instructions": work.programs * code.warps * executed / WARP_INSTRUCTIONS,
    }
    limit = max(limits, key=limits.__getitem__)
    return LAUNCH + limits[limit], "latency" if limit == "bytes" and latency > moved else limit
