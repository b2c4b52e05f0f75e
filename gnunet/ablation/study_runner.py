"""Runs a study from its file to its records and its report."""

import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from gnunet.ablation.find_records import find_runs
from gnunet.ablation.plan import Plan, budget_of, check_records, flatten, make_plan
from gnunet.ablation.progress import Display, TimeEstimate, print_plan, print_table
from gnunet.ablation.records import read_records
from gnunet.ablation.runner import fork_server, pending_trials, probe, run_in_process, run_parallel, slots
from gnunet.ablation.study import load_study
from gnunet.checkpoint.run_dir import RunLock
from gnunet.config.load import SHIPPED
from gnunet.config.yaml_io import format_value
from gnunet.distributed import fsdp
from gnunet.distributed.launch import is_distributed_launch
from gnunet.errors import ConfigError
from gnunet.evaluation.report import print_all
from gnunet.training.progress import format_duration

RUNS = Path("runs/ablations")


class StudyRunner:
    """A study at a budget, and the folder of its records; ConfigError if the file or the budget is not valid.

    Args:
        path: the study file.
        budget: None is the study's first, if it has any.
        folder: None is runs/ablations/STUDY[-BUDGET].
        only: the variants to run; empty is all.
        flags: overrides of the configuration from the command line, as a nested mapping.
    """

    def __init__(
        self, path: Path, *, budget: str | None, folder: Path | None, only: Sequence[str], flags: Mapping[str, Any]
    ):
        self.study, self.path, self.only, self.flags = load_study(path), path, only, flags
        self._given_budget, self._given_folder = budget, folder
        self.budget = budget_of(self.study, budget)
        self.folder = folder or self._default_folder(self.budget)

    def _default_folder(self, budget: str | None) -> Path:
        return RUNS / (self.path.stem if budget is None else f"{self.path.stem}-{budget}")

    def command(self, *more: str) -> str:
        """The command line of this run, without what is at its default, and `more` words."""
        is_shipped = self.path.parent == SHIPPED / "ablations"
        words = ["gnunet", "ablate", self.path.stem if is_shipped else str(self.path)]
        if self.budget is not None:
            words += ["--budget", self.budget]
        if self.folder != self._default_folder(self.budget):
            words += ["--folder", str(self.folder)]
        if self.only:
            words += ["--only", *self.only]
        for key, value in flatten(self.flags).items():
            words += [f"--{key}", format_value(value)]
        return shlex.join([*words, *more])

    def plan(self, *, processes: int | None = None) -> tuple[Plan, dict[str, dict[str, Any]]]:
        """The trials that are known so far, and the existing records.

        `processes` is the number of processes of a trial; None where none will run.

        Raises:
            ConfigError: an override is not valid.
            CheckpointError: a record is corrupted, or its trial would have another result now.
        """
        records = read_records(self.folder)
        plan = make_plan(self.study, self.path, budget=self.budget, only=self.only, flags=self.flags, records=records)
        check_records([*plan.tuning_trials, *plan.trials], records, self.folder, processes=processes)
        return plan, records

    def run(self, jobs: int | None, *, dry_run: bool = False) -> int:
        """Print the plan and the expected time and, unless `dry_run`, run the trials without a record.

        `jobs` trials run at a time, see `gnunet.ablation.runner.slots`; a launch of several processes runs one.
        Returns 0 when all have a record, 1 when some ended in an error, 128 + signal number after a signal.

        Raises:
            ConfigError, CheckpointError: as `plan`; also where the launch is for FSDP, or the folder is in use.
        """
        if fsdp.is_requested():
            raise ConfigError("accelerate launch: given FSDP for an ablation; valid: one process or DDP")
        plan, records = self.plan(processes=int(os.environ.get("WORLD_SIZE", "1")))
        estimate = TimeEstimate(plan, records)
        if is_distributed_launch():
            places, context = [None], None
        else:
            places, context = slots(jobs), fork_server()
            if estimate.source is None:
                trials = [*plan.trials, *plan.tuning_trials]
                trial = next((trial for trial in trials if trial.variant == self.study.baseline), trials[0])
                with tempfile.TemporaryDirectory() as scratch:
                    estimate.probed = probe(context, trial, Path(scratch), places[0])
        if _is_main():
            print_plan(self.study, plan, records)
            _print(self._expected_time(plan, estimate, len(places)))
        if dry_run:
            return 0
        lock = RunLock(self.folder, "--folder")
        try:
            if _is_main():
                self.folder.mkdir(parents=True, exist_ok=True)
                lock.acquire()
            return self._run(estimate, places, context)
        finally:
            lock.release()

    def _run(self, estimate: TimeEstimate, places: list[str | None], context: ForkServerContext | None) -> int:
        """Run the trials without a record: first those of tuning, then the reported ones."""
        failures: list[str] = []
        for stage in ("tuning_trials", "trials"):
            plan, _ = self.plan()  # tuning decides the reported trials
            if not (trials := pending_trials(getattr(plan, stage), self.folder)):
                continue
            display = Display(trials, self.folder, estimate, at_a_time=len(places), enabled=_is_main())
            if context is None:
                failed, signum = run_in_process(trials, self.folder, display)
            else:
                failed, signum = run_parallel(context, trials, self.folder, places, display)
            failures += failed
            if signum is not None:
                _print("stopped; the same command resumes")
                return 128 + signum
        _print(*failures)
        if plan.pending_tuning:
            _print(f"not run: the reported trials of {len(plan.pending_tuning)} settings, whose tuning is not complete")
        if _is_main():
            self._print_results()
        return 1 if failures else 0

    def _expected_time(self, plan: Plan, estimate: TimeEstimate, at_a_time: int) -> str:
        trials = pending_trials([*plan.tuning_trials, *plan.trials, *plan.pending_trials], self.folder)
        if not trials:
            return "nothing to run"
        seconds = estimate.seconds(trials, at_a_time)
        if seconds is None:
            return "expected time: unknown before the first trial is done"
        return f"expected time: {format_duration(seconds)}, {at_a_time} trials at a time, {estimate.source}"

    def report(self) -> Path:
        """Write the report of the existing records; returns its path.

        It is of all variants, or of those in `only` and the baseline. Where there are no records with this folder,
        budget and flags, those that were not given are taken from the study's only run that has records.

        Raises:
            ConfigError, CheckpointError: as `plan`; also where a package of the extra `ablation` is not installed, and
                where the records are of several runs.
        """
        try:  # optional packages: matplotlib, scipy
            from gnunet.ablation.analysis.report import write_report
        except ModuleNotFoundError as error:
            package = error.name.partition(".")[0]
            raise ConfigError(f"--report: needs {package}; pip install -e '.[ablation]'") from None
        self.study, self.only = self.study.restricted_to(self.only), ()
        plan, records = self.plan()
        if not any(trial.name in records for trial in [*plan.tuning_trials, *plan.trials]):
            self._take_only_run()
            plan, records = self.plan()
        return write_report(self.study, plan, records, self.folder, command=self.command())

    def _take_only_run(self) -> None:
        """Take folder, budget and flags of the study's only run with records; ConfigError where that is not clear."""
        names = [self._default_folder(budget) for budget in [None, *(self.study.budgets or [])]]
        given = self.budget if self._given_budget else None
        runs = find_runs(self.study, self.path, [self._given_folder] if self._given_folder else names, self.flags)
        commands = []
        for run in runs:
            self.folder, self.budget, self.flags = run
            commands.append(self.command("--report"))
        if len(runs) > 1 or (runs and given not in (None, self.budget)):
            raise ConfigError("\n  ".join(["--report: the records are of other runs; valid:", *commands]))
        if commands:
            _print(f"records of: {commands[0]}")

    def _print_results(self) -> None:
        """Print the table of the main metric, and the command that writes the report."""
        try:  # optional packages: scipy
            from gnunet.ablation.analysis.results import Results
            from gnunet.ablation.analysis.tables import main_table
        except ModuleNotFoundError:
            return
        command = self.command("--report")
        self.study, self.only = self.study.restricted_to(self.only), ()
        plan, records = self.plan()
        table = main_table(Results(self.study, plan, records, self.folder))
        print_table(table.headings, [[cell.text for cell in row] for row in table.rows])
        _print(f"report: {command}")


def _is_main() -> bool:
    """Whether this process prints and writes for all processes of a launch."""
    return os.environ.get("RANK", "0") == "0"


def _print(*lines: str) -> None:
    if _is_main():
        print_all(*lines)
