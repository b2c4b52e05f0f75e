"""Going on: a run that is extended or changed when it resumes."""

import json
import shutil
from pathlib import Path

import pytest

from gnunet.checkpoint.checkpoint import TrainState, newest_checkpoint, read_state
from gnunet.checkpoint.run_dir import recorded_changes
from gnunet.config import EvaluateConfig
from gnunet.errors import ConfigError
from gnunet.training import fit
from gnunet.training.evaluation import update_best
from tests.runs import LITTLE, assert_same_run, contents, fit_until, read_log

CONSTANT = ["--train.lr_schedule", "constant", "--train.checkpoint_every", "16", *LITTLE]
RATE = "--train.learning_rate"


def changes(run: Path) -> list[tuple]:
    """The history of the newest checkpoint, which metrics.jsonl must have once each."""
    found = read_state(newest_checkpoint(run / "checkpoints")).changes
    assert [each for line in read_log(run, "changes") for each in line["changes"]] == found
    return [(each["images"], each["key"], each["before"], each["after"]) for each in found]


def test_a_finished_run_that_is_extended_is_the_longer_run(tiny, tmp_path, capsys):
    """To the bit, also where it is killed soon after; with the same schedule."""
    short, flags = [*CONSTANT, "--train.total_images", "32"], [*CONSTANT, "--train.total_images", "64"]
    fit(tiny("long", *flags))
    fit(tiny("run", *short))
    fit(tiny("run", *short))  # a finished run still says how to extend it
    assert capsys.readouterr().out.count("--train.total_images 64") == 2
    fit_until(40, tiny("run", *flags))
    fit(tiny("run", *flags, "--train.keep_checkpoints", "2"))
    assert changes(tmp_path / "run") == []
    assert_same_run(tmp_path / "run", tmp_path / "long")


def test_a_schedule_that_ends_later_is_in_the_history(tiny, tmp_path, run):
    fit(tiny("run", "--train.total_images", "96"))
    assert changes(run) == [(64, "train.total_images", 64, 96)]
    rates = {line["images"]: line["learning_rate"] for line in read_log(run, "loss")}
    assert rates[64] == 0 and rates[80] > rates[96] == 0


@pytest.mark.parametrize(("given", "expected"), [([], {"train.total_images": (32, 64)}), (["4"], {})])
def test_a_warmup_that_depends_on_the_length_is_in_the_history(tiny, given, expected):
    warmup = [f"--model.norm.renorm_warmup={value}" for value in given]
    flags = [*CONSTANT, "--model.norm.kind=batch_renorm", *warmup, "--train.total_images"]
    assert recorded_changes(tiny("run", *flags, "32"), tiny("run", *flags, "64")) == expected


def test_fewer_images_than_seen_are_rejected_by_the_key(tiny, run):
    before = contents(run)
    with pytest.raises(ConfigError, match=r"train\.total_images: given 48.*64 images"):
        fit(tiny("run", "--train.total_images", "48"))
    assert contents(run).keys() == before.keys()
    fit(tiny("run", "--train.total_images", "60"))  # the last batch makes it 64


def test_a_changed_learning_rate_is_in_the_history_once_where_it_took_effect(tiny, tmp_path, capsys):
    """Another change was lost before: the run was killed before it wrote a checkpoint."""
    fit_until(24, tiny("run", *LITTLE))  # before what is due at 32 is written
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    fit(tiny("other", *LITTLE, RATE, "2e-3"))
    assert f"{RATE[2:]} 0.001 -> 0.002" in capsys.readouterr().out
    assert changes(tmp_path / "other") == [(32, "train.learning_rate", 0.001, 0.002)]

    def kill(step):
        if step.images == 48:
            raise KeyError("killed")

    with pytest.raises(KeyError):
        fit(tiny("run", *LITTLE, RATE, "3e-3", "--train.checkpoint_every", "0"), kill)
    assert read_log(tmp_path / "run", "changes")
    fit(tiny("run", *LITTLE, RATE, "2e-3"))
    assert_same_run(tmp_path / "run", tmp_path / "other")


def test_intervals_and_what_is_drawn_may_change(tiny, tmp_path):
    fit_until(24, tiny("run"))
    fit(tiny("run", "--train.log_every", "8", "--train.sample_every", "0", "--train.validate_every", "8",
             "--sampling.num_images", "2", "--validation.batch_size", "7",
             "--evaluate.monitor", "validation_loss"))  # fmt: skip
    run = tmp_path / "run"
    assert [line["images"] for line in read_log(run, "loss")] == [16, 32, 40, 48, 56, 64]
    assert [path.name for path in (run / "samples").iterdir()] == ["000000064.png"]
    assert [key for _, key, _, _ in changes(run)] == ["sampling.num_images", "evaluate.monitor"]
    best = json.loads((run / "checkpoints/best").read_text())
    assert best["value"] == min(line["validation_loss"] for line in read_log(run, "validation_loss"))


def test_the_best_by_another_metric_or_other_settings_is_not_compared():
    keys = {"metrics": ["fd_x", "recall_x"], "extractors": {"x": "m:X"}}
    by = {name: EvaluateConfig(monitor=name, **keys) for name in ("fd_x", "recall_x", "validation_loss")}
    state = TrainState(0)

    def update(name, value, **settings):
        return update_best(state, by[name], {name: value, **{f"evaluation_{k}": v for k, v in settings.items()}})

    assert update("validation_loss", 0.1) and update("fd_x", 5.0, num_images=64, batch_size=8)
    assert not update("fd_x", 6.0, num_images=64, batch_size=4)
    assert update("fd_x", 6.0, num_images=32, batch_size=8) and update("fd_x", 5.5, num_images=32, batch_size=8)
    assert update("recall_x", 0.2, num_images=32) and update("validation_loss", 0.7)
    state.best = {"images": 8, "metric": "fd_x", "value": 1.0}  # of an earlier version
    assert not update("fd_x", 2.0, num_images=32)
