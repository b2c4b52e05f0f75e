"""Run an ablation study, of normalization layers or of any other configurations, and write its report.

gnunet ablate configs/ablations/kinds.yaml --dry_run          # print the plan and the expected time
gnunet ablate configs/ablations/kinds.yaml --budget cpu       # run the trials without a record
gnunet ablate configs/ablations/kinds.yaml --budget cpu --report
accelerate launch -m gnunet ablate STUDY.yaml                 # one trial at a time, on all processes
gnunet ablate STUDY.yaml --train.total_images 64                    # flags of the configuration, for every trial

A study crosses variants with axes and seeds. Each combination is a trial: a training run whose record is written to
FOLDER/records once it is trained and measured. After a stop or a kill the same command resumes. A trial that diverges
is a result. --report reads only the study file, FOLDER/records and FOLDER/samples.
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
    parser.add_argument("--only", nargs="+", default=[], metavar="VARIANT", help="run only these variants")
    parser.add_argument(
        "--jobs", type=positive, metavar="N", help="trials at a time (default: one for each GPU, or for each core)"
    )
    parser.add_argument(
        "--folder", type=Path, help="where records are written (default: runs/ablations/STUDY[-BUDGET])"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry_run", action="store_true", help="print the plan and the expected time")
    mode.add_argument("--report", action="store_true", help="write the report of the existing records")
    own, flags = split_flags(argv)
    arguments = parser.parse_args(own)
    if arguments.report and arguments.only:
        parser.error("--report covers all variants; leave out --only")
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
        study_runner = StudyRunner.open(
            arguments.study, budget=arguments.budget, folder=arguments.folder, only=arguments.only,
            flags=parse_flags(flags),
        )  # fmt: skip
        if arguments.report:
            print(study_runner.report())
            return 0
        spawn_cpu_processes()
        return study_runner.run(arguments.jobs, dry_run=arguments.dry_run)

    return run_cli(ablate)
