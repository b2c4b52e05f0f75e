"""Run a study of normalizations, or any other study of configurations, and write its report.

gnunet ablate configs/ablations/kinds.yaml --dry_run          # the plan, and how long it will take
gnunet ablate configs/ablations/kinds.yaml --budget cpu       # run what has no record yet
gnunet ablate configs/ablations/kinds.yaml --budget cpu --report
accelerate launch -m gnunet ablate STUDY.yaml                           # one cell at a time, on all processes
gnunet ablate STUDY.yaml --train.images 64                    # flags of the configuration, for every cell

A study crosses arms with axes and seeds; each combination is a cell, a training run of its own. Its record is in
FOLDER/records, written when it is trained and measured. The same command goes on where an earlier one was stopped or
killed. A cell that diverges is a result. --report needs the study file and FOLDER/records and FOLDER/samples alone.
"""

import argparse
from pathlib import Path

from gnunet.ablation.study_runner import StudyRunner
from gnunet.commands.options import positive
from gnunet.config.cli import parse_flags
from gnunet.errors import run_cli
from gnunet.training import spawn_cpu_processes


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what it says of the configuration."""
    parser = argparse.ArgumentParser(
        prog="gnunet ablate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("study", metavar="STUDY", type=Path, help="study file, such as configs/ablations/smoke.yaml")
    parser.add_argument("--budget", metavar="NAME", help="one of the study's budgets (default: its first)")
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", help="run these arms alone")
    parser.add_argument(
        "--jobs", type=positive, metavar="N", help="cells at a time (default: one on each GPU, or on each core)"
    )
    parser.add_argument("--folder", type=Path, help="where records go (default: runs/ablations/STUDY[-BUDGET])")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry_run", action="store_true", help="print the plan and the time it will take")
    mode.add_argument("--report", action="store_true", help="write the report of the records that there are")
    own, flags = split_flags(argv)
    arguments = parser.parse_args(own)
    if arguments.report and arguments.only:
        parser.error("--report is of all arms; leave --only out")
    return arguments, flags


def split_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """This program's own words, and `--section.key VALUE` flags with the words behind them."""
    own: list[str] = []
    flags: list[str] = []
    into = own
    for word in argv:
        if word.startswith("--"):
            into = flags if "." in word.partition("=")[0] else own
        into.append(word)
    return own, flags


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    arguments, flags = parse_arguments(argv)

    def ablate() -> int:
        laboratory = StudyRunner.open(
            arguments.study, budget=arguments.budget, folder=arguments.folder, only=arguments.only,
            flags=parse_flags(flags),
        )  # fmt: skip
        if arguments.report:
            print(laboratory.report())
            return 0
        spawn_cpu_processes()
        return laboratory.run(arguments.jobs, dry_run=arguments.dry_run)

    return run_cli(ablate)
