"""Run the check's parts, each in its time, and say of every claim what came of it. gpu_check.sh calls this.

python -m gpu_check FOLDER [--only PART ...] [--seconds 590] [--started EPOCH] [--small]
python -m gpu_check FOLDER --compile ARCHIVE [--small]    # only to pack all that the parts compile
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarking.record import FAKE, ROOT, origin

from . import kernels
from .claims import NOT_REACHED, PASSED, Claim, claims, table
from .packages import unmet_requirements
from .parts import FULL_SECONDS, limits, parts, run

SECONDS_TO_REPORT = 5
"""What the table gets of the time."""
MOST_LOG_BYTES = 12 * 2**20
"""Files of 16 MiB come back, and no larger ones."""
NAMES = [part.name for part in parts(Path(), small=False, fake=False, compiling=False)]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the log and the records go")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="these parts (default all)")
    parser.add_argument("--seconds", type=float, default=FULL_SECONDS, help=f"for everything (default {FULL_SECONDS})")
    parser.add_argument("--started", type=float, default=time.time(), help="when they began to count (default now)")
    parser.add_argument("--wheels", type=Path, default=Path("wheels"), help="what travelled along (default wheels)")
    parser.add_argument("--small", action="store_true", help="a few tests and cases of each part")
    parser.add_argument("--compile", type=Path, metavar="ARCHIVE", help="pack what is compiled; nothing is timed")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the parts and print the table.

    Returns:
        0 where every claim has passed; on a device that computes nothing, where everything has run and nothing that
        travelled along was compiled again.
    """
    arguments = parse(argv)
    deadline = arguments.started + arguments.seconds - SECONDS_TO_REPORT
    source = origin(torch.device("cuda", torch.cuda.current_device()), "triton", "diffusers", "accelerate", "numpy")
    if source["commit"] is None:
        print("gpu_check: git cannot say which commit this is: set GIT_COMMIT to its hash", file=sys.stderr)
        return 2
    fake = source["device"].startswith(FAKE)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if any(arguments.folder.iterdir()):
        print(f"gpu_check: {arguments.folder} is not empty: results would be taken for this run's", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as root, (arguments.folder / "check.log").open("w", buffering=1) as log:

        def say(line: str) -> None:
            print(line, flush=True)
            if log.tell() < MOST_LOG_BYTES:
                log.write(line + "\n")

        say(", ".join([source.pop("device"), *(f"{name} {value}" for name, value in source.items())]))
        caches, archive = Path(root), arguments.wheels / "kernels.tar.xz"
        has_travelled = not arguments.compile and archive.exists()
        if has_travelled:
            kernels.unpack(archive, caches)
        before = kernels.count(caches)
        environment = {**os.environ, **kernels.environment(caches), "HF_HUB_OFFLINE": "1"}
        todo = parts(arguments.folder, small=arguments.small, fake=fake, compiling=arguments.compile is not None)
        todo = [part for part in todo if part.name in arguments.only]
        outcomes = {}
        for part, limit in limits(todo, lambda: deadline - time.time()):
            say(f"== {part.name}, {limit:.0f} s at most")
            start = time.monotonic()
            outcome = run(part, limit, environment, say)
            outcomes[part.name] = f"{outcome} ({time.monotonic() - start:.0f} s)"
            say(f"== {part.name}: {outcomes[part.name]}")
        made = {name: count - before[name] for name, count in kernels.count(caches).items()}

        say("== summary")
        say("; ".join(f"{name} {outcome}" for name, outcome in outcomes.items()))
        say("compiled here: " + ", ".join(f"{count} {name}" for name, count in made.items()))
        if arguments.compile:
            kernels.pack(caches, arguments.compile)
            say(f"{arguments.compile}: {arguments.compile.stat().st_size / 2**20:.1f} MiB")
        lacking = unmet_requirements(arguments.wheels, ROOT / "pyproject.toml")
        found = [Claim.of_packages(lacking), *claims(arguments.folder, [part.name for part in todo])]
        say(table(found))
    if not fake:
        return int(any(claim.verdict != PASSED for claim in found))
    # Speeds mean nothing here, and at a small size or where nothing is timed there are none of some kinds.
    must_be_timed = not (arguments.small or arguments.compile)
    missed = [claim for claim in found if claim.verdict != PASSED]
    wrong = [claim for claim in missed if not claim.is_number or (must_be_timed and claim.verdict == NOT_REACHED)]
    unfinished = [outcome for outcome in outcomes.values() if not outcome.startswith("ended")]
    return int(bool(wrong or unfinished or (has_travelled and any(made.values()))))


if __name__ == "__main__":
    sys.exit(main())
