"""scripts/soak.py watches a run and says what it takes early and late."""

import pytest

import soak


def test_quantities_early_and_late():
    names = ("resident memory, MiB", "file descriptors", "threads", "run folder, MiB", "files in it")
    samples = [dict.fromkeys(names, 10.0 + i) | {"CPU seconds": 2.0 * i, "images": 1000 * i} for i in range(8)]
    found = soak.table(samples)
    rows = list(zip(*(list(column.cells) for column in found.columns), strict=True))
    assert rows[0] == ("resident memory, MiB", "13.0", "16.0") and len(rows) == 6
    assert rows[-1] == ("CPU time of an image, ms", "2.00", "2.00")


@pytest.mark.slow
def test_a_run_is_watched_and_stopped(capsys):
    assert soak.main(["--minutes", "0.1", "--evaluate.every", "null"]) == 0
    said = capsys.readouterr().out
    assert "images in 0.1 minutes" in said and "file descriptors" in said and "CPU time of an image" in said


def test_a_run_that_ends_early_is_an_error(capsys, tmp_path):
    assert soak.main(["--minutes", "1", "--data.source", str(tmp_path / "nothing")]) == 2
    assert "train.py has ended with status 2" in capsys.readouterr().err
