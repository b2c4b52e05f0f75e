"""Running trials in parallel, each in a separate process, with tuning, divergence and errors."""

import os
import subprocess
import sys

import pytest
import torch
import yaml

from gnunet.ablation.plan import Plan, Trial
from gnunet.ablation.progress import TimeEstimate, trial_work
from gnunet.ablation.runner import pending_trials, slots
from gnunet.ablation.study_runner import StudyRunner
from gnunet.config import Config, from_yaml
from gnunet.errors import ConfigError
from gnunet.training.progress import format_duration


@pytest.fixture
def study_runner(tiny_flags, tmp_path):
    """Opens a study of tiny runs with the given keys."""
    _, file, _, source, _, cache, *_ = tiny_flags("unused")

    def open_study(only=(), **keys) -> StudyRunner:
        base = {"data.source": source, "data.cache_dir": cache, "train.max_nonfinite_steps": 1, **keys.pop("base", {})}
        study = {"title": "T", "question": "Q", "config": file, "baseline": "group", "base": base, **keys}
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(study, sort_keys=False))
        return StudyRunner(path, budget=None, folder=tmp_path / "study", only=only, flags={})

    return open_study


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def test_tuning_divergence_errors_and_shared_trials(study_runner, tmp_path, capfd):
    """One study with all of them: a rate that diverges, a variant that is another's double, one without its data."""
    nowhere = str(tmp_path / "nowhere")
    variants = {"group": {}, "double": {"model.norm.kind": "group"}, "broken": {"data.source": nowhere}}
    keys = {"variants": variants, "tuning": {"key": "train.learning_rate", "values": [1e-3, 1e30], "seeds": [100]}}
    study = study_runner(**keys)
    assert study.run(2) == 1
    out = capfd.readouterr().out
    assert "6 trials, 2 of them shared: 0 done, 4 to run" in out
    assert "failed: broken, seed 100, trying 1.0e+30: error:" in out and nowhere in out
    assert "not run: the reported trials of 1 settings" in out

    assert "│ double" in out and out.splitlines()[-1].startswith("report: gnunet ablate ")  # the results

    plan, records = study.plan()
    assert len(records) == 3  # two that tune and one that is reported, each for both variants
    assert plan.pending_tuning == [("broken", ())] and plan.chosen == {("group", ()): "0.001", ("double", ()): "0.001"}
    tuned, diverged = (records[trial.name] for trial in plan.tuning_trials[:2])
    assert (diverged["outcome"], diverged["diverged_at"], diverged["images"]) == ("diverged", 16, 16)
    assert diverged["nonfinite_steps"] == 1 and diverged["errors"]["running"] is None and diverged["saved_mib"] is None
    assert diverged["parameters"] == tuned["parameters"] and diverged["times"]["norm_share"] is None
    assert tuned["outcome"] == "complete" and tuned["config"]["train"]["learning_rate"] == 1e-3

    record = records[plan.trials[0].name]
    assert record["cell"] == plan.trials[0].name == plan.trials[1].name and record["seed"] == 0
    assert "run_dir" not in record["config"] and "cache_dir" not in record["config"]["data"]
    assert Config.model_validate(record["config"]).train == plan.trials[0].config.train
    assert [line["images"] for line in record["curve"]] == [16, 32, 48, 64]
    assert record["environment"]["threads"] == 1 and record["times"]["peak_memory_mib"] > 10
    run = tmp_path / "study" / "trials" / record["cell"]
    grid = (tmp_path / "study" / "samples" / f"{record['cell']}.png").read_bytes()
    assert grid == (run / "samples" / "000000064.png").read_bytes()
    assert "done: 64 images" in (run / "log.txt").read_text()
    assert from_yaml((run / "config.yaml").read_text(), "x").run_dir == str(run)

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "study" / "records").iterdir()}
    assert study_runner(**keys, only=["group"]).run(1) == 0
    assert "nothing to run" in capfd.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "study" / "records").iterdir()}


def test_a_second_runner_in_a_folder_is_an_error(study_runner, tmp_path):
    (tmp_path / "study").mkdir()
    hold = "import fcntl; file = open('.lock', 'w'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", hold], cwd=tmp_path / "study", stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        other.stdout.readline()
        with pytest.raises(ConfigError, match="--folder: .*study"):
            study_runner(variants={"group": {}}).run(1)
    finally:
        other.communicate(b"\n")


def test_missing_trials_come_seed_by_seed(tmp_path):
    configs = {
        (variant, seed): Config(seed=seed, train=Config().train.model_copy(update={"total_images": images}))
        for variant, images in (("a", 1), ("b", 2), ("same as a", 1))
        for seed in (5, 3)
    }
    trials = [Trial(variant, (), seed, config) for (variant, seed), config in configs.items()]
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / f"{trials[2].name}.json").touch()
    found = pending_trials(trials, tmp_path)
    assert [(trial.seed, trial.config.train.total_images) for trial in found] == [(5, 1), (3, 1), (3, 2)]


def test_slots(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert slots(3) == [None] * 3
    assert slots(None) == [None] * len(os.sched_getaffinity(0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert slots(None) == ["0", "1"] and slots(5) == ["0", "1", "0", "1", "0"] and slots(1) == ["0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-abc")
    assert slots(None) == ["4", "GPU-abc"]


class TestTimeEstimate:
    def trial(self, variant: str, setting=(), seed: int = 0, images: int = 100) -> Trial:
        train = Config().train.model_copy(update={"total_images": images})
        return Trial(variant, setting, seed, Config(seed=seed, run_dir=f"{variant}{setting}", train=train))

    def record(self, seconds: float, of_training: float = 0.0) -> dict:
        return {"images": 100, "times": {"cell_seconds": seconds, "wall_seconds": of_training}}

    def test_by_the_nearest_trials_that_are_done(self):
        two, four = (("batch", "2"),), (("batch", "4"),)
        expected = TimeEstimate(Plan(), {})
        assert expected.seconds([self.trial("a")], 1) is None and expected.source is None
        expected.probed = 3.0, 0.5
        assert expected.seconds([self.trial("a"), self.trial("b")], 1) == 6 + trial_work(self.trial("a").config)
        assert "probe" in expected.source
        for trial, seconds in ((self.trial("a", two), 10), (self.trial("a", four), 30), (self.trial("b", two), 100)):
            expected.update(trial, self.record(seconds))
        assert expected.seconds([self.trial("a", two)], 1) == pytest.approx(10)
        assert 10 < expected.seconds([self.trial("a", two, images=200)], 1) < 20  # is measured once, too
        assert expected.seconds([self.trial("a", (("batch", "8"),))], 1) == pytest.approx(20)  # of the same variant
        assert expected.seconds([self.trial("c")], 1) == pytest.approx(30)  # of any
        assert expected.seconds([self.trial("a", two)] * 4, 2) == pytest.approx(20)
        assert expected.seconds([self.trial("a", two)], 8) == pytest.approx(10) and expected.seconds([], 2) == 0

    def test_a_resumed_trial_counts_its_training_before(self):
        expected = TimeEstimate(Plan(), {})
        expected.update(self.trial("a"), self.record(1, of_training=50))
        assert expected.seconds([self.trial("a")], 1) == pytest.approx(50)

    def test_the_work_of_a_trial(self):
        """In images of training, of which a forward pass is a third."""
        train = {"total_images": 900, "validate_every": 300, "sample_every": 0}
        sampling = {"num_images": 6, "num_inference_steps": 10}
        config = Config.model_validate({"train": train, "validation": {"num_examples": 30}, "sampling": sampling})
        assert trial_work(config) == 900 + (30 * (3 + 5) + 60) / 3
        evaluated = config.model_copy(
            update={"evaluate": config.evaluate.model_copy(update={"every": 450, "num_images": 12})}
        )
        assert trial_work(evaluated) == trial_work(config) + 12 * (2 + 1) * 10 / 3

    def test_format_duration(self):
        texts = [format_duration(seconds) for seconds in (3.4, 89, 600, 5000, 7200, 400_000)]
        assert texts == ["3 s", "89 s", "10 min", "83 min", "2 h 0 min", "4 days 15 h"]
