"""Run an ablation study, of normalization layers or of any other configurations, and write its report.

gnunet ablate kinds --dry_run                                 # print the plan and the expected time
gnunet ablate kinds --budget cpu                              # run the trials without a record
gnunet ablate kinds --report                                  # write the report of the records
gnunet ablate STUDY.yaml --train.total_images 64              # flags of the configuration, for every trial
accelerate launch -m gnunet ablate STUDY.yaml                 # one trial at a time, on all processes

A study crosses variants with axes and seeds. Each combination is a trial: a training run whose record is written to
FOLDER/records once it is trained and measured. After a stop or a kill the same command resumes. A trial that diverges
is a result. --report reads only the study file and FOLDER; without the run's --budget, --folder and flags it finds the
study's only run in runs/ablations.
"""

import argparse
from pathlib import Path

from gnunet.commands.options import Parser, integer
from gnunet.errors import run_cli


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own arguments, and flags of the configuration."""
    parser = Parser("ablate", __doc__)
    parser.add_argument("study", metavar="STUDY", type=Path, help="study file, or the name of a shipped one: smoke")
    parser.add_argument("--budget", metavar="NAME", help="one of the study's budgets (default: its first)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="VARIANT", help="only these variants; in a report, and the baseline"
    )
    parser.add_argument(
        "--jobs", type=integer(), metavar="N", help="trials at a time (default: one for each GPU, or for each core)"
    )
    parser.add_argument(
        "--folder", type=Path, help="where records are written (default: runs/ablations/STUDY[-BUDGET])"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry_run", action="store_true", help="print the plan and the expected time")
    mode.add_argument("--report", action="store_true", help="write the report of the existing records")
    own, flags = split_flags(argv)
    return parser.parse_args(own), flags


def split_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """Separate the command's own arguments from `--section.key VALUE` flags and their values."""
    own: list[str] = []
    flags: list[str] = []
    target = own
    for word in argv:
        if word.startswith("--"):
            target = flags if "." in word.partition("=")[0] else own
        target.append(word)
    return own, flags


def main(argv: list[str]) -> int:
    arguments, flags = parse_arguments(argv)
    return run_cli(lambda: ablate(arguments, flags))


def ablate(arguments: argparse.Namespace, flags: list[str]) -> int:
    # Imported here so that --help does not wait for torch.
    from gnunet.ablation.study_runner import StudyRunner
    from gnunet.config.cli import parse_flags
    from gnunet.config.load import SHIPPED
    from gnunet.distributed.launch import check_launch

    shipped = SHIPPED / "ablations" / f"{arguments.study}.yaml"
    study = shipped if shipped.is_file() and not arguments.study.exists() else arguments.study
    runner = StudyRunner(
        study, budget=arguments.budget, folder=arguments.folder, only=arguments.only, flags=parse_flags(flags)
    )
    if arguments.report:
        print(runner.report())
        return 0
    check_launch()
    return runner.run(arguments.jobs, dry_run=arguments.dry_run)
