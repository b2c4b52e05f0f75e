"""Run each part of the check within its time limit and print a verdict for every claim. gpu_check.sh calls this.

python -m gpu_check FOLDER [--only PART ...] [--seconds 590] [--started EPOCH] [--small]
python -m gpu_check FOLDER --compile ARCHIVE [--small]    # pack what the parts compile, and time nothing
"""

import argparse
import lzma
import os
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from common.record import FAKE, ROOT, origin

from . import kernels
from .claims import NOT_REACHED, PASSED, Claim, claims, of_packages, table
from .packages import unmet_requirements
from .parts import FULL_SECONDS, limits, parts, run

SECONDS_TO_REPORT = 5
MAX_LOG_BYTES = 12 * 2**20
"""Of the parts' output in the log. A device machine returns no file above 16 MiB."""
NAMES = [part.name for part in parts(Path())]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the log and the records are written")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="run these parts (default all)")
    parser.add_argument("--seconds", type=float, default=FULL_SECONDS, help=f"for all parts (default {FULL_SECONDS})")
    parser.add_argument("--started", type=float, default=time.time(), help="when they began to count (default now)")
    parser.add_argument("--wheels", type=Path, default=Path("wheels"), help="packages and kernels (default wheels)")
    parser.add_argument("--small", action="store_true", help="run a few tests and cases of each part")
    parser.add_argument("--compile", type=Path, metavar="ARCHIVE", help="pack compiled kernels into this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts and print the table.

    Returns:
        0 if all parts ended and all claims passed; on the fake device, if everything ran and no kernel that was brought
        along was compiled again. 2 if nothing was run.
    """
    arguments = parse(argv)
    deadline = arguments.started + arguments.seconds - SECONDS_TO_REPORT
    source = origin(torch.device("cuda", torch.cuda.current_device()), "triton", "diffusers", "accelerate", "numpy")
    if source["commit"] is None:
        print("gpu_check: git does not know the commit: set GIT_COMMIT to its hash", file=sys.stderr)
        return 2
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if [*arguments.folder.glob("*.json"), *arguments.folder.glob("*.jsonl")]:
        print(
            f"gpu_check: {arguments.folder} contains the results of another run: choose an empty one", file=sys.stderr
        )
        return 2
    with tempfile.TemporaryDirectory() as caches:
        return check(arguments, source, Path(caches), deadline)


def check(arguments: argparse.Namespace, source: dict, caches: Path, deadline: float) -> int:
    """Run the parts; `source` says where, and `caches` is a folder for compiled kernels."""
    log = (arguments.folder / "check.log").open("w", buffering=1)

    def say(line: str) -> None:
        print(line, flush=True)
        log.write(line + "\n")

    def say_of_part(line: str) -> None:
        if log.tell() < MAX_LOG_BYTES:
            say(line)

    is_fake = source["device"].startswith(FAKE)
    say(", ".join([source["device"], *(f"{name} {value}" for name, value in source.items() if name != "device")]))
    is_compiled = not arguments.compile and find_kernels(arguments.wheels / "kernels.tar.xz", caches, say)
    before = kernels.count(caches)
    environment = {**os.environ, **kernels.environment(caches), "HF_HUB_OFFLINE": "1"}
    todo = parts(arguments.folder, small=arguments.small, fake=is_fake, compiling=arguments.compile is not None)
    todo = [part for part in todo if part.name in arguments.only]
    outcomes = {}
    for part, limit in limits(todo, lambda: deadline - time.time()):
        say(f"== {part.name}: at most {limit:.0f} s")
        start = time.monotonic()
        outcomes[part.name] = run(part, limit, environment, say_of_part)
        say(f"== {part.name}: {outcomes[part.name]}, {time.monotonic() - start:.0f} s")
    has_ended = all(outcome == "ended" for outcome in outcomes.values())
    compiled = kernels.count(caches) - before

    say("== summary")
    say("; ".join(f"{name}: {outcome}" for name, outcome in outcomes.items()))
    say(f"compiled in this run: {compiled} kernels")
    found = [of_packages(unmet_requirements(arguments.wheels, ROOT / "pyproject.toml"))]
    found += claims(arguments.folder, todo)
    say(table(found))
    is_timed = not (arguments.small or arguments.compile)  # all claims are
    if not has_ended or any(is_missed(claim, is_fake, is_timed) for claim in found):
        return 1
    if arguments.compile:
        kernels.pack(caches, arguments.compile)
        say(f"{arguments.compile}: {arguments.compile.stat().st_size / 2**20:.1f} MiB")
    return int(is_fake and is_compiled and compiled > 0)


def find_kernels(archive: Path, caches: Path, say: Callable[[str], None]) -> bool:
    """Unpack compiled kernels; False if there are none. Without them everything is compiled as it is needed."""
    if not archive.exists():
        return False
    try:
        kernels.unpack(archive, caches)
    except (OSError, EOFError, ValueError, tarfile.TarError, lzma.LZMAError) as error:
        say(f"{archive} cannot be read: {error}")
        return False
    return True


def is_missed(claim: Claim, is_fake: bool, is_timed: bool) -> bool:
    """Whether a claim fails the check. Timings on the fake device need only exist."""
    if is_fake and claim.is_timing:
        return is_timed and claim.verdict == NOT_REACHED
    return claim.verdict != PASSED


if __name__ == "__main__":
    # A program that was started in the background ignores SIGINT, and so would the parts. SIGTERM ends them, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    sys.exit(main())
