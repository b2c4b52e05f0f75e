"""What a run shows: one bar, lines without one, the mean loss, and nothing where its output is gone."""

import io
import logging
import os
import sys

import pytest

from gnunet.distributed.accelerator import open_accelerator
from gnunet.training import fit, progress
from gnunet.training.progress import Display
from tests.runs import read_log


@pytest.fixture
def clock(monkeypatch):
    """The time of displays, as a list of one number."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(("seconds", "estimated"), [(10.0, True), (0.02, False)])
def test_without_a_terminal_there_are_lines_at_intervals_and_an_estimate_of_a_long_run(
    clock, capsys, seconds, estimated
):
    display = Display(images=0, total=40_000, enabled=True)
    with display:
        for step in range(1, 10):
            clock[0] += 10 * seconds
            display.step(10 * step, 0.5)
            display.set_status("training")
    out = capsys.readouterr().out
    assert ("images 40/40000  loss 0.50000" in out) == estimated
    assert ("Ctrl-C" in out and " h " in out) == estimated


def test_a_dumb_terminal_gets_lines(clock, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    with Display(images=0, total=100, enabled=True) as display:
        clock[0] += 60
        display.step(10, None)
        display.set_status("training")
    assert "images 10/100  loss ?" in capsys.readouterr().out


def test_only_the_main_process_says_that_it_stops(capfd, monkeypatch):
    monkeypatch.setattr(sys, "__stdout__", os.fdopen(os.dup(1), "w"))
    for enabled in (True, False):
        Display(images=0, total=1, enabled=enabled).announce(f"stopping {enabled}")
    assert capfd.readouterr().out == "stopping True\n"


def test_the_loss_shown_is_the_mean_that_is_logged(tiny, tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(Display, "step", lambda self, images, loss: shown.update({images: loss}))
    fit(tiny("run", "--train.sample_every", "0", "--train.validate_every", "0", "--sampling.num_images", "1"))
    logged = read_log(tmp_path / "run", "loss")
    assert logged and [shown[line["images"]] for line in logged] == [line["loss"] for line in logged]


def test_messages_of_the_log_go_through_the_live_view(monkeypatch):
    """Which replaces sys.stderr; written past it they would leave a second bar behind."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    open_accelerator("no", cpu=True)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    logging.getLogger("gnunet").warning("above the bar")
    assert sys.stderr.getvalue() == "above the bar\n"


def test_output_whose_reader_is_gone_stops_nothing(monkeypatch):
    reader, writer = os.pipe()
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    with Display(images=0, total=100, enabled=True) as display:
        os.close(reader)
        for _ in range(2):
            display.message("x" * 100_000)
