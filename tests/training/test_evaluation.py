"""Evaluation in training: what it writes, that signals and resuming change no bit of it, and the best checkpoint."""

import json
import shutil
import signal

import pytest
import torch

from gnunet.checkpoint.checkpoint import TrainState, list_checkpoints
from gnunet.checkpoint.trained_model import find_checkpoint, is_model_path, load_trained_model
from gnunet.config import EvaluateConfig
from gnunet.distributed.signals import StopSignal
from gnunet.errors import CheckpointError, ConfigError, DataError
from gnunet.training import evaluation, fit, progress, trainer
from gnunet.training.evaluation import update_best
from tests.runs import FINAL, LITTLE, assert_same_run, fit_until, read_log

EXTRACTOR = """
import torch

class Coarse(torch.nn.Module):
    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
"""
NAME = "fd_coarse"


@pytest.fixture
def evaluated(tiny, tmp_path, monkeypatch):
    """The tiny run, evaluated every 32 images by a small extractor, with more flags."""
    (tmp_path / "tiny_extractor.py").write_text(EXTRACTOR)
    monkeypatch.syspath_prepend(tmp_path)
    flags = [
        "--evaluate.every", "32", "--evaluate.num_images", "6", "--evaluate.metrics", NAME, "kid_coarse",
        "--evaluate.extractors", "{coarse: 'tiny_extractor:Coarse'}",
    ]  # fmt: skip
    return lambda name, *more: tiny(name, *flags, *more)


def stop_after(patch: pytest.MonkeyPatch, what: str, rounds: int) -> None:
    """Make the run receive SIGTERM after a number of rounds of an evaluation."""
    seen = 0
    show = progress.Display.progress

    def count(self, text, done, total):
        nonlocal seen
        show(self, text, done, total)
        seen += what in text
        if seen == rounds:
            signal.raise_signal(signal.SIGTERM)

    patch.setattr(progress.Display, "progress", count)


def test_metrics_and_their_settings_are_logged_and_the_best_is_noted(evaluated, tmp_path):
    fit(evaluated("run", "--evaluate.monitor", NAME, "--train.keep_checkpoints", "1"))
    found = read_log(tmp_path / "run", NAME)
    assert [line["images"] for line in found] == [32, 64]
    best = min(found, key=lambda line: line[NAME])
    pointer = json.loads((tmp_path / "run/checkpoints/best").read_text())
    assert (pointer["images"], pointer["value"]) == (best["images"], best[NAME])
    for line in found:
        assert len(line.pop("evaluation_reference")) == 16
        assert line[NAME] > 0 and line["kid_coarse_standard_error"] > 0
        assert {key: value for key, value in line.items() if key.startswith("evaluation_")} == {
            "evaluation_num_images": 6, "evaluation_sampler": "euler", "evaluation_steps": 4,
            "evaluation_guidance": 1.0, "evaluation_batch_size": 4, "evaluation_seed": 0,
            "evaluation_reference_images": 16,
        }  # fmt: skip
    assert found[0][NAME] != found[1][NAME]


def test_metrics_are_those_of_the_checkpoints_samples(evaluated, tmp_path):
    """Rule 3: what is scored are the images that anybody samples from the checkpoint."""
    config = evaluated("run")
    fit(config)
    session = trainer.build_session(config, trainer.make_accelerator(config))
    open_weights = load_trained_model(tmp_path / "run").network.state_dict()
    session.ema.model.load_state_dict(open_weights)
    again = evaluation.evaluate(session, 64, stop=StopSignal(), display=quiet())
    assert again == read_log(tmp_path / "run", NAME)[-1]


def quiet() -> progress.Display:
    return progress.Display(images=0, total=1, enabled=False)


def test_evaluation_changes_nothing_of_the_training(evaluated, finished, tmp_path):
    fit(evaluated("with"))
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert (tmp_path / "with" / FINAL / name).read_bytes() == (finished / FINAL / name).read_bytes()
    assert [line for line in read_log(tmp_path / "with") if NAME not in line] == read_log(finished)


def test_stopped_in_an_evaluation_and_resumed_is_the_same_run(evaluated, tmp_path, monkeypatch):
    """In the reference's statistics; between the batches of the first evaluation; in the second one."""
    best = [*LITTLE, "--evaluate.monitor", NAME]
    fit(evaluated("whole", *best, "--data.cache_dir", str(tmp_path / "other_cache")))
    for what, rounds in (("training images", 1), ("samples", 1), ("samples", 3)):
        with monkeypatch.context() as patch:
            stop_after(patch, what, rounds)
            with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
                fit(evaluated("stopped", *best))
        seen = 64 if rounds == 3 else 32
        assert [line["images"] for line in read_log(tmp_path / "stopped", NAME)] == ([32] if seen == 64 else [])
        assert not [line for line in read_log(tmp_path / "stopped") if line["images"] == seen]
        fit(evaluated("stopped", *best))
        assert_same_run(tmp_path / "stopped", tmp_path / "whole")
        shutil.rmtree(tmp_path / "stopped")


def test_progress_is_shown(evaluated, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_LINE_INTERVAL", 0)
    fit(evaluated("run"))
    out = capsys.readouterr().out
    assert "evaluating: training images 16/16" in out and "evaluating: samples 4/6" in out
    assert f"{NAME} " in out and "kid_coarse " in out and "(standard error " in out and "n 6" in out


def test_missing_extractors_are_reported_before_anything_is_built(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "build_session", lambda *_: pytest.fail("built"))
    with pytest.raises(ConfigError, match="nowhere_to_be_found"):
        fit(tiny("run", "--evaluate.every", "8", "--evaluate.metrics", "fd_own", "--evaluate.extractors",
                 "{own: 'nowhere_to_be_found:Coarse'}"))  # fmt: skip
    with pytest.raises(ConfigError, match=r"absent\.pth"):
        fit(tiny("run", "--evaluate.every", "8", "--evaluate.metrics", "fd_dinov2", "--evaluate.weights",
                 f"{{dinov2: {tmp_path / 'absent.pth'}}}"))  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_too_few_training_images_are_rejected(evaluated, tmp_path):
    with pytest.raises(DataError, match="given 3 .*recall_coarse"):
        fit(evaluated("run", "--evaluate.metrics", "recall_coarse", "--data.validation_images", "17"))
    assert not (tmp_path / "run").exists()


LOSSES = {8: 3.0, 16: float("nan"), 24: 1.0, 32: 2.0, 40: 1.0, 48: 1.5, 56: 0.5, 64: 0.7}


@pytest.fixture
def monitored(tiny, monkeypatch):
    """The tiny run with LOSSES as validation losses by images seen, and checkpoints only of the best and the last."""
    measure = trainer.validate

    def validate(session, images, **options):
        return {**measure(session, images, **options), "validation_loss": LOSSES[images]}

    monkeypatch.setattr(trainer, "validate", validate)
    flags = ["--evaluate.monitor", "validation_loss", "--train.validate_every", "8", "--train.keep_checkpoints", "1",
             "--train.checkpoint_every", "0", *LITTLE]  # fmt: skip
    return lambda name: tiny(name, *flags)


def test_best_checkpoint_is_kept_next_to_the_newest(monitored, tmp_path):
    fit(monitored("run"))
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in list_checkpoints(folder)] == ["000000056", "000000064"]
    assert json.loads((folder / "best").read_text()) == {
        "checkpoint": "000000056", "images": 56, "metric": "validation_loss", "value": 0.5, "settings": {},
    }  # fmt: skip
    assert is_model_path(folder / "best") and find_checkpoint(folder / "best") == folder / "000000056"
    assert load_trained_model(folder / "best").name == "run-000000056"
    assert load_trained_model(tmp_path / "run").name == "run-000000064"


def test_best_checkpoint_survives_resuming_from_the_newest(monitored, tmp_path, capsys):
    fit(monitored("whole"))
    for seen, best in ((32, 24), (56, 24)):  # the signal comes before the validation at 56, which gives the best
        fit_until(seen, monitored("run"))
        folder = tmp_path / "run" / "checkpoints"
        assert {path.name for path in list_checkpoints(folder)} == {f"{i:09d}" for i in (best, seen)}
        (folder / "best").unlink()  # as if the machine had crashed before it was written
        fit(monitored("run"))
        assert f"resuming {folder / f'{seen:09d}'}" in capsys.readouterr().out
        assert_same_run(tmp_path / "run", tmp_path / "whole")
        assert [path.name for path in list_checkpoints(folder)] == ["000000056", "000000064"]
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "values", "kept"),
    [("fd_x", [3.0, 4.0, 3.0, 2.0], [True, False, False, True]),
     ("recall_x", [0.5, 0.4, 0.5, 0.6], [True, False, False, True]),
     ("validation_loss", [float("nan"), 1.0, float("inf"), 0.5], [False, True, False, True])],
)  # fmt: skip
def test_only_values_better_than_all_before_count(name, values, kept):
    settings = EvaluateConfig(metrics=["fd_x", "recall_x"], extractors={"x": "m:X"}, monitor=name)
    state = TrainState(0)
    assert [update_best(state, settings, {name: value}) for value in values] == kept
    assert state.best["value"] == values[-1] and not update_best(state, settings, {"other": 0.0})


def test_without_its_checkpoint_there_is_no_pointer(monitored, tmp_path):
    fit(monitored("run"))
    folder = tmp_path / "run" / "checkpoints"
    (folder / "000000056").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="000000056"):
        load_trained_model(folder / "best")
    fit(monitored("run"))
    assert not (folder / "best").exists()
    (folder / "best").write_text("{")
    with pytest.raises(CheckpointError, match="best"):
        load_trained_model(folder / "best")


def test_raw_weights_can_be_loaded(finished):
    ema, raw = load_trained_model(finished), load_trained_model(finished, "raw")
    assert (ema.name, raw.name) == ("run-000000064", "run-000000064-raw")
    assert not torch.equal(ema.network.conv_in.weight, raw.network.conv_in.weight)
    with pytest.raises(CheckpointError, match="valid: ema"):
        load_trained_model(finished / "model", "raw")
