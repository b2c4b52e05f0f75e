"""`gnunet evaluate`: models, folders, launches, interruptions, invalid arguments."""

import json
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.launcher import api

from gnunet.commands import evaluate as evaluate_script
from gnunet.commands import sample
from gnunet.commands.evaluate_inputs import open_reference, open_subject
from gnunet.errors import ConfigError
from gnunet.processes import single_threaded
from gnunet.safe_io import MAX_YAML_BYTES


class Coarse(torch.nn.Module):
    """The means of quarters of an image: cheap features."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


@pytest.fixture(scope="session")
def coarse(tmp_path_factory):
    """Arguments that measure by a TorchScript file of Coarse."""
    file = tmp_path_factory.mktemp("extractor") / "coarse.pt"
    torch.jit.script(Coarse()).save(str(file))
    names = [f"{statistic}_coarse" for statistic in ("fd", "kid", "precision", "recall")]
    return ["--extractors", f"coarse={file}", "--metrics", *names]


@pytest.fixture
def evaluate(tmp_path, monkeypatch, capsys):
    """`evaluate(*arguments, status=0, out="out")`: run the command in this process, with caches in the test's folder;
    returns its output and metrics.json."""
    monkeypatch.setenv("GNUNET_CACHE", str(tmp_path / "cache"))

    def run(*arguments, status: int = 0, out: str = "out") -> tuple[str, dict]:
        actual = evaluate_script.main([*map(str, arguments), "--out", str(tmp_path / out)])
        output = "".join(capsys.readouterr())
        assert actual == status, output
        file = tmp_path / out / "metrics.json"
        return output, json.loads(file.read_text()) if file.exists() else {}

    return run


@pytest.fixture
def pictures(tmp_path):
    """`pictures(name, noise=0, channels=3)`: write a folder of 24 noised copies of the same pictures of 8 x 8."""

    def write(name: str, noise: float = 0, channels: int = 3) -> Path:
        rng = np.random.default_rng(0)
        clean = rng.integers(96, 160, (24, 8, 8, channels))
        folder = tmp_path / name
        folder.mkdir()
        for i, image in enumerate(clean + noise * rng.standard_normal(clean.shape) ** 2):
            pixels = image.clip(0, 255).round().astype(np.uint8)
            Image.fromarray(pixels.squeeze()).save(folder / f"{i:02d}.png")
        return folder

    return write


def means(record: dict) -> dict[str, float]:
    return {name: entry["mean"] for name, entry in record["metrics"].items()}


class TestFolders:
    def test_distances_are_zero_to_itself_and_grow_with_noise(self, evaluate, pictures, coarse):
        clean = pictures("clean")
        out, record = evaluate(clean, "--reference", clean, *coarse)
        assert means(record) == {
            "fd_coarse": pytest.approx(0, abs=1e-12), "kid_coarse": pytest.approx(0, abs=1e-12),
            "precision_coarse": 1, "recall_coarse": 1,
        }  # fmt: skip
        assert "clean: n = 24" in out and f"against {clean}: 24 images of 8 x 8" in out
        assert "fd_coarse of 24 images against 24 is biased upwards" in out
        found = [means(record)]
        for noise in (5, 10, 20):
            found.append(means(evaluate(pictures(f"noise{noise}", noise), "--reference", clean, *coarse)[1]))
        for name in ("fd_coarse", "kid_coarse"):
            values = [each[name] for each in found]
            assert values == sorted(values) and len(set(values)) == 4

    def test_by_the_packaged_extractor(self, evaluate, pictures):
        clean = pictures("clean")
        _, record = evaluate(clean, "--reference", clean)
        assert means(record) == {
            "kid_efficientnet_lite0": pytest.approx(0, abs=1e-9), "fd_efficientnet_lite0": pytest.approx(0, abs=1e-6),
        }  # fmt: skip
        (note,) = record["notes"]
        assert "fewer images than the 1280 features prefer kid_efficientnet_lite0" in note

    def test_only_the_split_of_a_reference_counts(self, evaluate, pictures, coarse, tmp_path):
        clean = pictures("clean")
        for split in ("train", "test"):
            shutil.copytree(clean, tmp_path / "data" / split)
        (tmp_path / "data/train/00.png").unlink()
        Image.new("RGB", (4, 4)).save(tmp_path / "data/small.png")
        _, record = evaluate(clean, "--reference", tmp_path / "data", "--split", "test", *coarse)
        assert record["reference"]["num_images"] == 24 and means(record)["precision_coarse"] == 1
        out, _ = evaluate(clean, "--reference", tmp_path / "data", "--split", "tset", *coarse, status=2, out="other")
        assert "data.split" in out and "test, train" in out

    def test_repeats_measure_other_images(self, evaluate, pictures, coarse):
        clean, noised = pictures("clean"), pictures("noised", 10)
        out, record = evaluate(noised, "--reference", clean, *coarse, "--repeat", 3, "--num_images", 8)
        entry = record["metrics"]["fd_coarse"]
        assert record["repeats"] == 3 and record["num_images"] == 8 and "3 times n = 8" in out
        assert len(set(entry["values"])) == 3
        assert entry["mean"] == pytest.approx(np.mean(entry["values"]))
        assert entry["standard_deviation"] == pytest.approx(np.std(entry["values"], ddof=1))
        assert len(record["metrics"]["kid_coarse"]["standard_errors"]) == 3
        part = noised.parent / "part"
        part.mkdir()
        for i in range(1, 24, 3):  # the second of three
            (noised / f"{i:02d}.png").rename(part / f"{i:02d}.png")
        _, alone = evaluate(part, "--reference", clean, *coarse)
        assert alone["metrics"]["fd_coarse"]["mean"] == pytest.approx(entry["values"][1])

    def test_grey_images_are_compared_in_grey(self, evaluate, pictures, coarse):
        grey = pictures("grey", channels=1)
        _, record = evaluate(grey, "--reference", pictures("colour"), *coarse)
        assert record["reference"]["channels"] == record["images"]["channels"] == 1

    def test_nearest_finds_the_originals_of_copies(self, evaluate, pictures, coarse, tmp_path):
        clean = pictures("clean")
        out, record = evaluate(pictures("copies", 0.3), "--reference", clean, *coarse, "--nearest", 2)
        nearest = record["nearest"]
        assert [row[0] for row in nearest["rows"]] == list(range(24))
        assert nearest["near_duplicate_rate"] == 1 and nearest["distance_ratio"] < 0.1
        assert "near-duplicate rate  1 " in out
        with Image.open(tmp_path / "out" / "nearest.png") as picture:
            assert picture.size == (3 * 96 + 10, 24 * (96 + 14 + 2))
        _, record = evaluate(pictures("other", 20), "--reference", clean, *coarse, "--nearest", 2)
        assert record["nearest"]["near_duplicate_rate"] < 0.2 and record["nearest"]["distance_ratio"] > 0.8

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ("{empty}", "{empty}"),
            ("{tmp}/nowhere", "{tmp}/nowhere"),
            ("{clean}", "--reference"),
            ("{clean} --reference ./nowhere", "./nowhere"),
            ("{clean} --reference {clean} --metrics fd_corse", "'fd_coarse'?"),
            ("{clean} --reference {clean} --repeat 2 --num_images 20", "at most 12"),
            ("{clean} --reference {clean} --num_images 3", "at least 4, which precision_coarse"),
            ("{clean} --reference {clean} --nearest 24", "--nearest: given 24"),
            ("{clean} --reference {two}", "given 2 reference images; valid: at least 4, which precision_coarse"),
            ("{clean} --reference {clean} --extractors coarse={clean}/00.png", "00.png is not a TorchScript file"),
            (
                "{clean} --reference {clean} --metrics fd_dinov2 --extractor_weights dinov2={tmp}/absent.pth",
                "absent.pth",
            ),
            ("{clean} --reference {clean} --seed 3", "--seed"),
            ("{clean} --reference {clean} --guidance_scale 3", "--guidance_scale"),
            ("{clean} --split test", "--split"),
            ("{clean} --reference {small}", "0.png is 4 x 4"),
            ("{odd} --reference {clean}", "1.png is 16 x 16"),
        ],
    )
    def test_invalid_inputs_are_named(self, evaluate, pictures, coarse, tmp_path, arguments, named):
        folders = {"tmp": tmp_path, "clean": pictures("clean")}
        for name, sizes in {"empty": [], "two": [8, 8], "small": [4], "odd": [8, 16]}.items():
            (folder := tmp_path / name).mkdir()
            folders[name] = folder
            for i, size in enumerate(sizes):
                Image.new("RGB", (size, size)).save(folder / f"{i}.png")
        source, *more = arguments.format(**folders).split()
        out, record = evaluate(source, *coarse, *more, status=2)
        assert named.format(**folders) in out and "Traceback" not in out and not record

    def test_resolution_resizes_images(self, evaluate, pictures, coarse):
        clean = pictures("clean")
        Image.new("RGB", (16, 16)).save(clean / "odd.png")
        _, record = evaluate(clean, "--reference", clean, *coarse, "--resolution", 4)
        assert record["num_images"] == 25 and record["images"]["resolution"] == 4


class TestModels:
    def test_run_measures_as_the_folder_of_its_samples(self, evaluate, finished, coarse, tmp_path):
        out, record = evaluate(finished, "--num_images", 10, *coarse)
        assert len(record["images"].pop("checkpoint")) == 64
        assert record["images"] == {
            "resolution": 16, "channels": 3, "sampler": "euler", "steps": 4, "guidance": 1.0, "batch_size": 4,
            "seeds": [0],
        }  # fmt: skip
        assert record["reference"]["num_images"] == 16 and record["num_images"] == 10
        assert "run-000000064 (euler, 4 steps, guidance 1, seed 0): n = 10" in out
        with single_threaded():
            assert sample.main([str(finished), "--num_images", "10", "--out", str(tmp_path / "samples")]) == 0
        _, of_folder = evaluate(tmp_path / "samples", "--reference", finished, *coarse)
        assert of_folder["num_images"] == 10  # grid.png is not counted
        assert of_folder["images"]["seeds"] == [0] and of_folder["images"]["checkpoint"]  # from samples.json
        assert means(of_folder) == pytest.approx(means(record), rel=1e-9)
        assert of_folder["reference"]["fingerprint"] == record["reference"]["fingerprint"]

    def test_results_of_other_settings_are_kept(self, evaluate, finished, coarse, tmp_path, monkeypatch):
        """By default; a run, another seed, its samples, and the same again."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("GNUNET_CACHE", str(tmp_path / "cache"))
        for _ in range(2):
            assert sample.main([str(finished), "--num_images", "6", "--out", "run-000000064"]) == 0
            for more in ([finished], [finished, "--seed", 1], ["run-000000064", "--reference", finished]):
                assert evaluate_script.main([*map(str, more), *coarse, *(["--num_images", "6"])]) == 0
        folders = sorted(path.parent for path in Path("evaluations").glob("*/metrics.json"))
        assert [path.name for path in folders] == ["run-000000064", "run-000000064-2", "run-000000064-images"]
        seeds = [json.loads((path / "metrics.json").read_text())["images"]["seeds"] for path in folders]
        assert seeds == [[0], [1], [0]]
        for _ in range(2):
            assert evaluate_script.main([str(finished), "--validation_loss"]) == 0
        assert [path.parent.name for path in Path("evaluations").glob("*/validation_loss.json")] == ["run-000000064"]

    def test_settings_and_seeds(self, evaluate, finished, coarse):
        _, plain = evaluate(finished, "--num_images", 6, *coarse)
        _, again = evaluate(finished / "checkpoints" / "000000064", "--num_images", 6, *coarse)
        assert again["metrics"] == plain["metrics"]
        _, twice = evaluate(finished, "--num_images", 6, *coarse, "--repeat", 2)
        assert twice["images"]["seeds"] == [0, 1]
        assert twice["metrics"]["fd_coarse"]["values"][0] == plain["metrics"]["fd_coarse"]["mean"]
        _, second = evaluate(finished, "--num_images", 6, *coarse, "--seed", 1)
        assert twice["metrics"]["fd_coarse"]["values"][1] == second["metrics"]["fd_coarse"]["mean"]
        for flags in ("--num_inference_steps 2", "--sampler heun", "--guidance_scale 3", "--weights raw"):
            _, other = evaluate(finished, "--num_images", 6, *coarse, *flags.split())
            assert other["metrics"] != plain["metrics"]
        assert other["name"] == "run-000000064-raw"

    def test_diffusers_folders_and_other_references(self, evaluate, finished, coarse, images, pictures):
        flags = ["--num_images", 6, "--num_inference_steps", 4, "--batch_size", 4, *coarse]
        _, exported = evaluate(finished / "model", *flags, "--reference", images)
        _, run = evaluate(finished, *flags, "--reference", images)
        assert exported["metrics"] == run["metrics"] and run["reference"]["num_images"] == 20
        out, _ = evaluate(finished / "model", *flags, status=2)
        assert "--reference" in out
        out, _ = evaluate(pictures("small"), "--reference", finished, *coarse, status=2)
        assert "(16, 16, 3)" in out and "small has (8, 8, 3)" in out
        out, _ = evaluate(finished, *coarse, "--sampler", "ddim", status=2)
        assert "ddim" in out and "euler, heun" in out

    def test_changed_training_images_raise(self, evaluate, finished, coarse, images):
        extra = images / "dark" / "new.png"
        Image.new("RGB", (16, 16)).save(extra)
        try:
            out, _ = evaluate(finished, "--num_images", 6, *coarse, status=2)
        finally:
            extra.unlink()
        assert "run-000000064" in out and str(images) in out

    def test_untrusted_run_as_reference_chooses_no_paths(self, evaluate, finished, coarse, images, tmp_path):
        untrusted, elsewhere = tmp_path / "untrusted", tmp_path / "elsewhere"
        untrusted.mkdir()
        config = (finished / "config.yaml").read_text()
        assert "cache_dir: null" in config
        (untrusted / "config.yaml").write_text(config.replace("cache_dir: null", f"cache_dir: {elsewhere}"))
        _, record = evaluate(images, "--reference", untrusted, *coarse)
        assert not elsewhere.exists()
        _, of_run = evaluate(images, "--reference", finished, *coarse)
        assert record["reference"]["fingerprint"] == of_run["reference"]["fingerprint"]
        (untrusted / "config.yaml").write_text("#" * MAX_YAML_BYTES + config)
        out, _ = evaluate(images, "--reference", untrusted, *coarse, status=2)
        assert "config.yaml" in out and str(MAX_YAML_BYTES) in out

    @pytest.mark.parametrize("flags", ["--num_images 3", "--seed 3", "--metrics fid", "--reference x"])
    def test_flags_that_the_validation_loss_does_not_use_are_refused(self, finished, capsys, flags):
        with pytest.raises(SystemExit):
            evaluate_script.main([str(finished), "--validation_loss", *flags.split()])
        assert flags.split()[0] in capsys.readouterr().err.splitlines()[-1]

    def test_split_of_a_run_as_reference_is_refused(self, finished, coarse):
        for reference in (None, finished):
            with pytest.raises(ConfigError, match="--split: given test"):
                open_reference(reference, "test", open_subject(finished, 4, 1, None, {}), allow_enlarging=False)

    def test_validation_loss(self, evaluate, finished, tmp_path):
        out, _ = evaluate(finished, "--validation_loss")
        record = json.loads((tmp_path / "out" / "validation_loss.json").read_text())
        logged = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
        assert record["bank"]["fingerprint"].startswith(logged["validation_bank"]) and logged["validation_bank"] in out
        ema, raw = record["weights"]["ema"], record["weights"]["raw"]
        assert ema["validation_loss"] == pytest.approx(logged["validation_loss"], rel=1e-6)
        assert ema["by_log_snr"] == pytest.approx(logged["validation_loss_by_log_snr"], rel=1e-5)
        assert raw["validation_loss"] != ema["validation_loss"] and raw["standard_error"] > 0
        assert [len(raw[key]) for key in ("by_log_snr", "by_log_snr_standard_errors")] == [4, 4]
        assert record["bank"]["bins"] == [[-8, -4], [-4, 0], [0, 4], [4, 8]] and "-8 to -4" in out
        assert f"{ema['validation_loss']:.5f}" in out


def test_results_are_byte_identical_for_1_2_and_4_processes(evaluate, finished, coarse, run_ranks, tmp_path):
    arguments = [str(finished), "--num_images", "18", "--repeat", "2", "--nearest", "2", *coarse]
    evaluate(*arguments, out="1")
    for processes in (2, 4):
        out = tmp_path / str(processes)
        outputs = run_ranks(processes, partial(evaluate_script.main, [*arguments, "--out", str(out)]))
        assert [text.count("run-000000064 (euler") for text in outputs] == [1] + [0] * (processes - 1)
        for name in ("metrics.json", "nearest.png"):
            assert (out / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_killed_evaluation_starts_again(evaluate, finished, coarse, start_ranks, tmp_path, number):
    command = [str(finished), "--num_images", "120", "--num_inference_steps", "2000", *coarse]
    killed = [*command, "--out", str(tmp_path / "killed")]
    (process,) = ranks = start_ranks(1, partial(evaluate_script.main, killed))
    end = time.monotonic() + 600
    while not list((tmp_path / "cache").glob("reference-*.safetensors")):
        assert process.is_alive() and time.monotonic() < end, ranks.said
        time.sleep(0.05)
    time.sleep(0.5)  # it samples
    os.kill(process.pid, number)
    assert ranks.ended() == [130 if number == signal.SIGINT else -number] and "Traceback" not in ranks.said[0]
    assert list((tmp_path / "killed").iterdir()) == []
    command[2], command[4] = "10", "4"
    _, after = evaluate(*command, out="killed")
    (tmp_path / "cache").rename(tmp_path / "old_cache")
    _, fresh = evaluate(*command, out="fresh")
    assert after == fresh


def test_one_process_per_128_images_on_a_cpu_without_a_launcher(evaluate, finished, coarse, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3), raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    started = []

    def elastic_launch(config, entry):
        started.append(config.nproc_per_node)
        return lambda *arguments: None

    monkeypatch.setattr(api, "elastic_launch", elastic_launch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    evaluate(finished, "--num_images", 150, "--repeat", 2, *coarse)
    evaluate(finished, "--num_images", 5000, *coarse)
    assert started == [2, 3]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    noise = np.random.default_rng(0).integers(0, 256, (300, 16, 16, 3), np.uint8)
    sample = "gnunet.training.evaluation.TrainedModel.sample"
    monkeypatch.setattr(sample, lambda self, indices, *_, **__: noise[: len(indices)])
    evaluate(finished, "--num_images", 300, *coarse)
    assert len(started) == 2
