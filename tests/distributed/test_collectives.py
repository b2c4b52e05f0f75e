"""Errors of one process that all of a launch are to raise."""

import errno

import pytest
from accelerate import Accelerator
from safetensors import SafetensorError

from gnunet.distributed.collectives import on_all, on_main
from gnunet.errors import CheckpointError, TrainingError
from gnunet.training import fit, trainer


def test_results_and_errors():
    accelerator = Accelerator(cpu=True)
    assert on_all(accelerator, lambda: 3) == [3] and on_main(accelerator, lambda: "a") == "a"

    def fail(error: Exception):
        raise error

    with pytest.raises(CheckpointError, match="torn"):
        on_all(accelerator, lambda: fail(CheckpointError("torn")))
    with pytest.raises(OSError, match="No space left") as caught:
        on_main(accelerator, lambda: fail(SafetensorError("No space left")))
    assert caught.value.errno == errno.EIO


def test_a_disk_that_fills_up_in_an_export_is_said_in_a_line(tiny, monkeypatch):
    def refuse(*arguments, **settings):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(trainer, "export_model", refuse)
    with pytest.raises(
        TrainingError, match="run: cannot be written .*No space left on device.* goes on from the newest"
    ):
        fit(tiny("run"))
    monkeypatch.undo()
    fit(tiny("run"))
