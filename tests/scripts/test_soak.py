"""The soak's trends tell a leak from noise, its watcher sees what a process takes, and a short one leaves a record."""

import json
import mmap
import os
import subprocess
import sys
import tempfile
import time

import numpy as np
import psutil
import pytest
from scipy.stats import theilslopes

import soak
from gnunet.ablation.history import read_lines
from soaking.trend import Quantity, judge, theil_sen
from soaking.watch import LOG, QUANTITIES, Sample, Watcher, of_folder, windows

HOURS = np.linspace(0.25, 1, 30)
MEMORY = Quantity("memory", "MiB", 8)


def noise(scale: float) -> np.ndarray:
    return scale * np.random.default_rng(0).standard_normal(len(HOURS))


class TestTrend:
    @pytest.mark.parametrize("count", [5, 6, 17, 30])
    def test_slopes_are_scipys(self, count):
        values = np.random.default_rng(count).standard_normal(count).cumsum()
        found, wanted = theil_sen(HOURS[:count], values), theilslopes(values, HOURS[:count], 0.95)
        np.testing.assert_allclose(
            [found.value, found.low, found.high], [wanted.slope, wanted.low_slope, wanted.high_slope]
        )

    def test_a_leak_grows_and_noise_is_flat(self):
        assert judge(MEMORY, HOURS, 500 + noise(0.5))["verdict"] == "flat"
        leak = judge(MEMORY, HOURS, 500 + 20 * HOURS + noise(0.5))
        assert leak["verdict"] == "grows" and leak["slope"] == pytest.approx(20, abs=1)
        assert judge(MEMORY, HOURS, 500 - 20 * HOURS)["verdict"] == "flat"
        assert judge(MEMORY, HOURS, 500 + noise(50))["verdict"] == "open"

    def test_one_that_is_far_off_changes_nothing(self):
        values = 30 + np.zeros(len(HOURS))
        values[-1] = 500
        found = judge(Quantity("descriptors", "", 2), HOURS, values)
        assert (found["verdict"], found["slope"], found["median"]) == ("flat", 0, 30)

    def test_in_percent(self):
        found = judge(Quantity("time", "ms", 5, relative=True), HOURS, 2 + 0.2 * HOURS)
        assert found["slope"] == pytest.approx(100 * 0.2 / found["median"]) and found["slope_unit"] == "%/hour"
        assert found["verdict"] == "grows"

    def test_what_is_missing_or_has_no_limit_is_not_judged(self):
        values = np.full(len(HOURS), np.nan)
        assert judge(MEMORY, HOURS, values)["verdict"] == "open"
        values[::6] = 1000 * HOURS[::6]
        assert judge(MEMORY, HOURS, values)["verdict"] == "grows"
        assert judge(Quantity("load", "", None), HOURS, 1000 * HOURS)["verdict"] is None


class TestWatcher:
    def test_sees_memory_descriptors_children_and_files(self, tmp_path):
        run = tmp_path / "run"
        (run / "samples").mkdir(parents=True)
        (run / "timing.jsonl").write_text('{"images": 8}\n{"images": 16}\n{"imag')  # the last line is being written
        watcher = Watcher(psutil.Process(), run)
        before = watcher.sample()
        taken = mmap.mmap(-1, 2**26)  # of its own: malloc may have freed memory at hand
        taken.write(b"1" * 2**26)
        with tempfile.TemporaryFile(), tempfile.TemporaryFile():
            child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
            for grows in ("samples/8.png", "metrics.jsonl", "kept"):
                (run / grows).write_bytes(bytes(2**20))
            time.sleep(0.1)
            after = watcher.sample()
        child.communicate(b"\n")
        taken.close()
        grown = {name: after.levels[name] - before.levels[name] for name in before.levels}
        assert grown["processes"] == 1 and grown["threads"] >= 1 and grown["descriptors"] >= 2 + 1 + 3
        assert grown["uss_mib"] > 60 and grown["rss_mib"] > 60
        assert (grown["folder_mib"], grown["folder_files"]) == (1, 1)
        assert before.images == 16 and after.seconds > before.seconds and after.cpu_seconds >= before.cpu_seconds

    def test_files_that_are_removed_meanwhile(self, tmp_path, monkeypatch):
        (tmp_path / "gone").mkdir()
        (tmp_path / "link").symlink_to("nowhere")
        (tmp_path / "file").write_bytes(b"1")
        scandir = os.scandir

        def raced(path):
            if path == str(tmp_path / "gone"):
                raise FileNotFoundError(path)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", raced)
        assert of_folder(tmp_path) == {"folder_mib": 2**-20, "folder_files": 1}

    def test_windows(self):
        def sample(seconds: float, images: int, cpu_seconds: float, descriptors: int) -> Sample:
            return Sample(seconds, images, cpu_seconds, load=1.0, levels={"descriptors": descriptors})

        samples = [
            sample(0, 100, 50, 7), sample(1, 100, 51, 9), sample(2, 200, 52, 8),  # the first of four windows
            sample(4, 200, 53, 8),  # in which the log says nothing new
            sample(6, 300, 56, 8), sample(8, 400, 58, 5),
        ]  # fmt: skip
        lines = [
            {"images": images, "images_per_second": speed, "memory_mib": memory}
            for images, speed, memory in ((100, None, 1.0), (200, 50.0, 2.0), (300, 100.0, 3.0), (400, 200.0, 4.0))
        ]
        found = windows(samples, lines, seconds=12, count=4)
        assert [window["minutes"] * 60 for window in found] == pytest.approx([1.5, 4.5, 7.5])
        assert [window["descriptors"] for window in found] == [8, 8, 6.5]
        np.testing.assert_allclose([window["cpu_ms"] for window in found], [20, np.nan, 30])
        np.testing.assert_allclose([window["wall_ms"] for window in found], [20, np.nan, 1000 / 150])
        np.testing.assert_allclose([window["logged_mib"] for window in found], [2, np.nan, 3.5])


class TestScript:
    def test_leaves_a_record_and_no_process(self, tiny_flags, tmp_path, capsys):
        out, others = tmp_path / "soak.json", psutil.Process().children(recursive=True)
        status = soak.main([*tiny_flags("run"), "--minutes", "0.1", "--out", str(out)])
        record = json.loads(out.read_text())
        printed = capsys.readouterr().out
        assert status == any(trend["verdict"] == "grows" for trend in record["trends"])  # so short a run says nothing
        assert [trend["quantity"] for trend in record["trends"]] == list(QUANTITIES)
        assert all(quantity.title in printed for quantity in QUANTITIES.values()) and str(out) in printed
        assert record["minutes"] == 0.1 and record["torch"] and record["device"] and "commit" in record
        assert record["done"]["steps"] * 8 == record["done"]["images"] > 0 and record["done"]["log_lines"] > 0
        assert record["samples"] >= len(record["windows"]) > 0
        assert all(window["rss_mib"] > window["uss_mib"] > 0 for window in record["windows"])
        assert all(window["processes"] == 1 and window["descriptors"] > 3 for window in record["windows"])
        assert not (tmp_path / "run").exists() and psutil.Process().children(recursive=True) == others

    def test_a_run_that_ends_before_its_time(self, tiny_flags, capsys):
        assert soak.main(tiny_flags("run", "--data.subset", "{nowhere: 1}", "--minutes", "5")) == 2
        said = capsys.readouterr().err
        assert "train.py has ended before its time with status 2" in said and "data.subset" in said

    @pytest.mark.parametrize(
        ("arguments", "words"), [(["--minutes", "0"], "above 0"), (["--train.batch_size", "0"], "train.batch_size")]
    )
    def test_refusals(self, arguments, words, capsys):
        try:
            assert soak.main(arguments) == 2
        except SystemExit as refused:
            assert refused.code == 2
        assert words in capsys.readouterr().err

    def test_the_tiny_run_repeats_every_part(self):
        config = soak.parse([], default_config=soak.TINY)
        train = config.train
        assert train.log_every < train.validate_every == train.sample_every == train.checkpoint_every
        assert config.evaluate.every == train.checkpoint_every and config.data.num_workers == 1


def test_lines_of_a_run_without_a_log(tmp_path):
    assert read_lines(tmp_path / LOG) == []
