"""Trials of a classifier: what they measure and record, and what they share with others of their study."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gnunet.ablation.classifier import ClassifierRun, run_classifier, seconds_per_image
from gnunet.ablation.plan import Trial
from gnunet.ablation.records import metric_names, metric_value, outcome_of, read_record
from gnunet.errors import ConfigError

GHOST = ("--model.norm.kind", "ghost_batch", "--model.norm.ghost_size", "1")
CPU = torch.device("cpu")


@pytest.fixture
def trial(tiny):
    """A tiny trial, as `trial("--key", "value", ...)`."""
    return lambda *flags: Trial("v", (), 0, tiny("run", "--train.deterministic", "true", *flags), task="classification")


def test_a_killed_trial_has_the_record_of_one_that_was_not(trial, tmp_path, monkeypatch):
    made, records = trial(*GHOST), []

    def kill(run):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ClassifierRun, "measure", kill)
        run_classifier(made, tmp_path / "killed")
    for name in ("killed", "whole"):
        assert run_classifier(made, tmp_path / name) == 0
        records.append(read_record(tmp_path / name, made.name))
    missing = [name for name in metric_names(made.config, "classification") if metric_value(records[0], name) is None]
    assert missing == ["norm_share"]
    for record in records:
        del record["times"]
    assert records[0] == records[1]
    assert [line["images"] for line in records[0]["curve"]] == [32, 64]
    assert records[0]["outcome"] == "complete" and records[0]["task"] == "classification"
    chance = records[0]["bank"]["chance"]
    assert outcome_of(records[0]) == ("collapsed" if metric_value(records[0], "error_rate") >= chance else "complete")
    rows, errors = records[0]["bank"]["rows"], records[0]["errors"]["running"]
    assert len(set(rows)) == len(errors) == 3 and records[0]["bank"]["bins"] == [0, 0, 0]
    assert records[0]["validation"][-1]["validation_loss"] == pytest.approx(np.mean(errors), rel=1e-6)


def test_errors_are_those_of_each_image_alone(trial):
    """Also by the statistics of the batch, where ghost batches have one image."""
    run = ClassifierRun(trial(*GHOST).config, CPU)
    for start in run.starts:
        run.step(start)
    measured, network = run.measure(), run.ema.model
    images, labels = run.inputs(run.val_set.batch(range(3)))
    for statistics in ("running", "batch"):
        logits = torch.cat([network.train(statistics == "batch")(image[None]) for image in images]).detach()
        errors = F.cross_entropy(logits, labels, reduction="none")
        assert measured["errors"][statistics] == pytest.approx(errors.tolist(), rel=1e-4)
        assert measured["wrong"][statistics] == (logits.argmax(1) != labels).tolist()
    assert measured["errors"]["precise"] not in (None, measured["errors"]["running"])


def test_trials_of_a_seed_share_images_order_and_initial_weights(trial):
    group, ghost = (ClassifierRun(trial(*flags).config, CPU) for flags in ((), GHOST))
    for ours, theirs in zip(group.batch(8), ghost.batch(8), strict=True):
        assert torch.equal(ours, theirs)
    shared = {name: weight for name, weight in ghost.network.named_parameters() if "conv" in name or "linear" in name}
    assert len(shared) > 8
    assert all(torch.equal(group.network.get_parameter(name), weight) for name, weight in shared.items())
    assert group.measure()["errors"]["batch"] is None
    tuning = ClassifierRun(trial("--validation.draw", "1").config, CPU)
    assert not set(tuning.val_set.rows) & set(group.val_set.rows)
    assert seconds_per_image(group.config) > 0
    with pytest.raises(ConfigError, match="model.norm: .*'decoder'.*encoder"):
        ClassifierRun(trial("--model.norm.overrides", "{decoder: {kind: layer}}").config, CPU)


def test_a_loss_that_is_not_finite_ends_a_trial(trial, tmp_path):
    made = trial("--train.learning_rate", "1e30")
    assert run_classifier(made, tmp_path) == 0
    record = read_record(tmp_path, made.name)
    assert (record["outcome"], record["diverged_at"], record["images"]) == ("diverged", 16, 16)
    assert metric_value(record, "error_rate") is None
