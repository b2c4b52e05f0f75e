"""Errors of one process that all of a launch are to raise."""

import errno

import pytest
from accelerate import Accelerator
from safetensors import SafetensorError

from gnunet.distributed.accelerator import run_on_all_ranks, run_on_main_rank
from gnunet.errors import CheckpointError, TrainingError
from gnunet.training import checkpointing, fit


def test_results_and_errors():
    accelerator = Accelerator(cpu=True)
    assert run_on_all_ranks(accelerator, lambda: 3) == [3] and run_on_main_rank(accelerator, lambda: "a") == "a"

    def fail(error: Exception):
        raise error

    with pytest.raises(CheckpointError, match="torn"):
        run_on_all_ranks(accelerator, lambda: fail(CheckpointError("torn")))
    with pytest.raises(OSError, match="No space left") as caught:
        run_on_main_rank(accelerator, lambda: fail(SafetensorError("No space left")))
    assert caught.value.errno == errno.EIO


def test_a_disk_that_fills_up_in_an_export_is_said_in_a_line(tiny, monkeypatch):
    def refuse(*arguments, **settings):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(checkpointing, "export_model", refuse)
    with pytest.raises(TrainingError, match="run: cannot be written .*No space left on device"):
        fit(tiny("run"))
    monkeypatch.undo()
    fit(tiny("run"))
