"""Records: written and read back, corrupted ones named, and their metrics."""

import math
import os

import pytest

from gnunet import files
from gnunet.ablation.records import metric_names, metric_value, rank, read_records, save_bank, write_record
from gnunet.config import Config
from gnunet.errors import CheckpointError


@pytest.fixture
def record() -> dict:
    return {
        "format": 1, "cell": "0123456789ab", "config": {}, "outcome": "complete",
        "errors": {"running": [1.0, 2.0, 6.0], "precise": [1.0, 1.0, 1.0], "batch": None},
        "bank": {"bins": [0, 0, 2], "log_snr_edges": [-3.0, -1.0, 1.0, 3.0]},
        "metrics": {"kid_x": 0.5, "recall_x": 0.25},
        "nearest": {"extractor": "x", "distance_ratio": 2.0, "near_share": 0.0},
        "saved_mib": 7.0,
        "times": {"images_per_second": 10.0, "wall_seconds": 5.0, "peak_memory_mib": None, "norm_share": 0.1},
    }  # fmt: skip


def test_are_read_back(record, tmp_path):
    path = write_record(tmp_path, record)
    assert path == tmp_path / "records" / "0123456789ab.json"
    assert read_records(tmp_path) == {"0123456789ab": record}
    assert len(path.read_text().splitlines()) == len(record) + 2  # a line for each key


def test_have_no_numbers_that_json_lacks(record, tmp_path):
    record["errors"]["running"] = [math.nan, math.inf, 1.0]
    record["nearest"]["distance_ratio"] = -math.inf
    write_record(tmp_path, record)
    (found,) = read_records(tmp_path).values()
    assert found["errors"]["running"] == [None, None, 1.0] and found["nearest"]["distance_ratio"] is None


@pytest.mark.parametrize("text", ['{"format": 99}', "{}", "{", "[]", "[" * 100_000, "{" * 3 + "\0"])
def test_corrupted_records_and_other_formats_are_named(record, tmp_path, text):
    write_record(tmp_path, record).write_text(text)
    with pytest.raises(CheckpointError, match=r"0123456789ab\.json"):
        read_records(tmp_path)


def test_metrics(record):
    assert metric_value(record, "validation_loss") == (1.5 + 6) / 2  # the mean of the bins, empty ones left out
    assert metric_value(record, "validation_loss_precise") == 1
    assert metric_value(record, "validation_loss_batch") == (1.5 + 6) / 2  # as the plain one
    assert metric_value(record, "nearest_distance_ratio") == 2 and metric_value(record, "kid_x") == 0.5
    assert metric_value(record, "images_per_second") == 10 and metric_value(record, "saved_mib") == 7
    assert metric_value(record, "peak_memory_mib") is None and metric_value(record, "fd_x") is None
    record["errors"]["running"][1] = None
    assert metric_value(record, "validation_loss") is None


def test_rank_is_lower_for_what_is_better(record):
    assert rank(record, "kid_x") == 0.5 and rank(record, "recall_x") == -0.25 and rank(record, "fd_x") == math.inf
    assert rank({**record, "outcome": "diverged"}, "kid_x") == math.inf


def test_names_are_those_that_are_measured():
    config = Config()
    assert "kid_efficientnet_lite0" not in metric_names(config) and "validation_loss_batch" in metric_names(config)
    evaluated = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"every": 0})})
    assert {"kid_efficientnet_lite0", "nearest_near_share"} <= set(metric_names(evaluated))


def test_two_trials_may_write_their_bank_at_once(tmp_path, monkeypatch):
    """The second does so while the first has written it under a temporary name."""
    fsync, others = files.fsync_path, [os.getpid() + 1]

    def fsync_path(path):
        if others:
            other = others.pop()
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: other)
                save_bank(tmp_path, "b", {"rows": [1]})
        fsync(path)

    monkeypatch.setattr(files, "fsync_path", fsync_path)
    save_bank(tmp_path, "b", {"rows": [1]})
    assert not others and [path.name for path in (tmp_path / "banks").iterdir()] == ["b.json"]
