"""How long trials will take, from what others took."""

import statistics
from collections.abc import Iterable

from gnunet.ablation.plan import Plan, Records, Trial


class TimeEstimate:
    """Times of a plan's trials, by seconds per image: of records of the same variant in the same setting, of the
    variant, of any; or else of a probe.

    Args:
        plan: all trials, those that have records too.
        records: what there is so far.
    """

    def __init__(self, plan: Plan, records: Records):
        self.probed: float | None = None
        """Seconds for an image where there are no records."""
        self._known: dict[tuple, list[float]] = {}
        for trial in [*plan.tuning_trials, *plan.trials]:
            if record := records.get(trial.name):
                self.update(trial, record)

    def update(self, trial: Trial, record: dict) -> None:
        """Learn from the record of a trial."""
        times = record["times"]
        seconds = max(times["cell_seconds"], times["wall_seconds"] or 0.0) / record["images"]
        for key in ((trial.variant, trial.setting), (trial.variant,), ()):
            self._known.setdefault(key, []).append(seconds)

    @property
    def source(self) -> str | None:
        """What it is known from; None where nothing is known."""
        if self._known:
            return "by the trials that are done"
        return None if self.probed is None else "by a probe of training alone"

    def seconds(self, trials: Iterable[Trial], at_a_time: int) -> float | None:
        """How long trials will take, so many at a time; None where nothing is known."""
        each = [self._seconds_per_image(trial) for trial in trials]
        if None in each:
            return None
        total = sum(rate * trial.config.train.total_images for rate, trial in zip(each, trials, strict=True))
        return total / max(min(at_a_time, len(each)), 1)

    def _seconds_per_image(self, trial: Trial) -> float | None:
        for key in ((trial.variant, trial.setting), (trial.variant,), ()):
            if key in self._known:
                return statistics.median(self._known[key])
        return self.probed


def format_duration(seconds: float) -> str:
    """A duration to about two digits: 40 s, 12 min, 1 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
