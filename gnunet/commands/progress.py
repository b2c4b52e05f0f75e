"""The progress bar of the subcommands."""

from collections.abc import Callable

from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar(Progress):
    """One bar per stage, on the main process."""

    def __init__(self, accelerator: Accelerator):
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        super().__init__(*columns, disable=not accelerator.is_main_process)

    def stage(self, description: str, total: int) -> Callable[[int], None]:
        """A callback for the number of items done; the bar appears at its first call."""
        task = self.add_task(description, total=total, visible=False)
        return lambda done: self.update(task, completed=min(done, total), visible=True)
