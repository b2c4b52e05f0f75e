"""A run's own logs, as records have them."""

import json

import pytest

from gnunet.ablation.trial import times, training_history


@pytest.fixture
def log(tmp_path):
    def log(name: str, *lines: dict) -> None:
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    return log


def speed(images: int, per_second: float | None) -> dict:
    return {"images": images, "images_per_second": per_second, "memory_mib": 1.0}


def test_times_add_up_over_interruptions(log, tmp_path):
    log("timing.jsonl", speed(10, 5.0), speed(20, None), speed(30, 10.0), speed(34, 20.0))
    assert times(tmp_path) == {
        "images_per_second": 10.0, "wall_seconds": 4.2, "seconds_at": [[10, 2.0], [20, 3.0], [30, 4.0], [34, 4.2]],
    }  # fmt: skip


def test_a_run_that_logged_nothing_has_no_times(tmp_path):
    assert times(tmp_path) == {"images_per_second": None, "wall_seconds": None, "seconds_at": []}


def test_what_the_metrics_log_holds(log, tmp_path):
    loss = {"images": 8, "loss": 1.0, "learning_rate": 0.1, "grad_norm": 2.0, "nonfinite": 0}
    bins = {"validation_loss_by_log_snr": [3.0, None], "validation_bank": "x"}
    validation = {"images": 8, "validation_loss": 3.0, **bins}
    first, last = ({"images": n, "kid_x": n / 8, "evaluation_num_images": 4} for n in (8, 16))
    log("metrics.jsonl", loss, validation, first, last)
    assert training_history(tmp_path) == {
        "curve": [{"images": 8, "loss": 1.0, "grad_norm": 2.0, "learning_rate": 0.1}],
        "validation": [{"images": 8, "validation_loss": 3.0, "by_log_snr": [3.0, None]}],
        "metrics": {"kid_x": 2.0},
    }
