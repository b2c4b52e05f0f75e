"""A signal while a run validates or samples: it ends soon, with a checkpoint, and the resumed run does it again. So it
does if a loader's worker is killed."""

import multiprocessing
import shutil
import signal
from pathlib import Path

import pytest

from gnunet.checkpoint import trained_model as loading
from gnunet.checkpoint.checkpoint import newest_checkpoint, read_state
from gnunet.errors import TrainingError
from gnunet.evaluation import validation
from gnunet.training import fit
from tests.runs import assert_same_run


def signal_in(rank: int, what: str, folder: Path) -> None:
    """SIGTERM to rank 1 in the first batch of the first validation or grid; count the batches and steps begun."""
    module, name = {"validation": (validation, "per_example_errors"), "sampling": (loading, "ImageSampler")}[what]
    work, begun = getattr(module, name), folder / f"begun-{rank}"

    def struck(*arguments, **settings):
        if rank == 1 and not begun.exists():
            signal.raise_signal(signal.SIGTERM)
        check = settings.get("check", lambda: None)

        def counted():
            check()
            note()

        def note():
            with begun.open("a") as file:
                file.write(".")

        if what == "sampling":
            settings["check"] = counted
        else:
            note()
        return work(*arguments, **settings)

    begun.unlink(missing_ok=True)
    if not (folder / "run").exists():  # the resumed run goes through
        setattr(module, name, struck)


def test_it_ends_soon_with_a_checkpoint_and_goes_on_with_the_same_bits(tiny, run_ranks, tmp_path):
    flags = ["--validation.batch_size", "2"]
    run_ranks(2, tiny("whole", *flags))
    for what in ("validation", "sampling"):
        said = run_ranks(2, tiny("run", *flags), signal_in, what, tmp_path, status=143)
        assert "stopped at 32 images" in said[0]
        # One batch of 8 for each process, or no step of 4 in any batch.
        begun = [tmp_path / f"begun-{rank}" for rank in range(2)]
        assert [file.exists() and file.read_text() for file in begun] == [what == "validation" and "."] * 2
        newest = newest_checkpoint(tmp_path / "run/checkpoints")
        assert newest.name == "000000032" and read_state(newest).reported < 32
        assert "resuming" in run_ranks(2, tiny("run", *flags))[0]
        assert_same_run(tmp_path / "run", tmp_path / "whole")
        shutil.rmtree(tmp_path / "run")


def test_worker_that_is_killed_ends_the_run(tiny):
    def kill_worker(step):
        multiprocessing.active_children()[0].kill()

    with pytest.raises(TrainingError, match="worker .*data.num_workers"):
        fit(tiny("run", "--data.num_workers", "1"), kill_worker)
