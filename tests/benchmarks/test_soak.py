"""scripts/benchmarks/soak.py watches a run and says what it takes early and late."""

import json

import psutil
import pytest

import soak


def test_quantities_early_and_late():
    names = ("resident memory, MiB", "file descriptors", "threads", "run folder, MiB", "files in it")
    samples = [dict.fromkeys(names, 10.0 + i) | {"CPU seconds": 2.0 * i, "images": 1000 * i} for i in range(8)]
    found = soak.table(samples)
    rows = list(zip(*(list(column.cells) for column in found.columns), strict=True))
    assert rows[0] == ("resident memory, MiB", "13.0", "16.0") and len(rows) == 6
    assert rows[-1] == ("CPU time of an image, ms", "2.00", "2.00")


def test_files_are_counted_without_folders_and_what_grows(tmp_path):
    for name in ("checkpoints/8/model", "config.yaml", "samples/8.png", "metrics.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(2**19))
    (tmp_path / "timing.jsonl").write_text(json.dumps({"images": 8}) + "\n")
    found = soak.sample(psutil.Process(), tmp_path)
    assert (found["files in it"], found["run folder, MiB"], found["images"]) == (2, 1.0, 8)


@pytest.mark.slow
def test_a_run_is_watched_and_stopped(capsys):
    assert soak.main(["--minutes", "0.05", "--evaluate.every", "null"]) == 0
    said = capsys.readouterr().out
    assert "images in 0.05 minutes" in said and "file descriptors" in said and "CPU time of an image" in said


def test_a_run_that_ends_early_is_an_error(capsys, monkeypatch, tmp_path):
    (tmp_path / "train.py").write_text("raise SystemExit('no such source')")
    monkeypatch.setattr(soak, "ROOT", tmp_path)
    assert soak.main(["--minutes", "1"]) != 0
    error = capsys.readouterr().err
    assert "train.py has ended with status 1" in error and "no such source" in error
