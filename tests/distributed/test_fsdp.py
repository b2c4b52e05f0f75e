"""Runs that FSDP2 shards: DDP's numbers, and sharded checkpoints from which any launch resumes."""

import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gnunet.ablation.study_runner import StudyRunner
from gnunet.checkpoint import checkpoint as checkpoints
from gnunet.checkpoint.checkpoint import checkpoint_files, newest_checkpoint, open_tensors
from gnunet.checkpoint.sharded_tensors import (
    POWER_EMAS,
    TENSOR_FILES,
    UNSHARDED,
    ShardedTensorReader,
    ShardId,
    file_name,
)
from gnunet.checkpoint.trained_model import load_trained_model
from gnunet.config import unet_kwargs
from gnunet.distributed import fsdp
from gnunet.distributed.accelerator import open_accelerator
from gnunet.errors import CheckpointError, ConfigError
from gnunet.models import UNet2D
from gnunet.training import StepInfo
from gnunet.training.post_hoc_ema import reconstruct
from gnunet.training.session import Session
from tests.runs import ROOT, SHARDED, assert_same_run, read_log, to_device_with

FLAGS = ["--train.sample_every", "0", "--train.validate_every", "32", "--train.log_every", "8"]
LAUNCHES = {**SHARDED, "ddp": {}}
SHORT = ["--train.total_images", "40"]
FINAL = "checkpoints/000000040"


def launched(rank: int, kind: str, stop_at: int | None = None) -> Callable[[StepInfo], None]:
    """Launch as a kind, and stop the run in the step after `stop_at` images."""
    os.environ.update(LAUNCHES[kind])
    return lambda step: signal.raise_signal(signal.SIGTERM) if step.images == stop_at else None


def assert_same_curve(run: Path, other: Path) -> None:
    """To the rounding of sums in another order, which the steps of these runs raise to less than 1e-5."""
    for line, theirs in zip(read_log(run), read_log(other), strict=True):
        assert line.keys() == theirs.keys()
        for name in line.keys() & {"loss", "grad_norm", "validation_loss"}:
            assert math.isclose(line[name], theirs[name], rel_tol=1e-5), (line, theirs)


def joined(checkpoint: Path, kind: str) -> dict[str, torch.Tensor]:
    files = [load_file(file) for file in open_tensors(checkpoint, kind).files]
    rows = {name: [file[name] for file in files if name in file] for name in {**files[0], **files[-1]}}
    return {name: torch.cat(parts) if parts[0].dim() else parts[0] for name, parts in rows.items()}


@pytest.mark.slow
def test_sharded_runs_match_ddp_and_any_launch_resumes_them(tiny, run_ranks, tmp_path):
    run_ranks(2, tiny("whole", *FLAGS, *SHORT))
    sizes = {name: (tmp_path / "whole" / FINAL / f"{name}.safetensors").stat().st_size for name in TENSOR_FILES}
    for kind in SHARDED:
        run_ranks(2, tiny(kind, *FLAGS, *SHORT), launched, kind)
        assert_same_curve(tmp_path / kind, tmp_path / "whole")
        # No file holds a model, and together they hold it once.
        for name, size in sizes.items():
            for number in range(2):
                part = tmp_path / kind / FINAL / file_name(name, ShardId(number, 2))
                assert part.stat().st_size < 0.6 * size
        for name in ("model", "ema"):
            whole = load_file(tmp_path / "whole" / FINAL / f"{name}.safetensors")
            parts = joined(tmp_path / kind / FINAL, name)
            assert whole.keys() == parts.keys()
            for key, value in whole.items():
                # Adam takes steps of the learning rate, 1e-3, in the direction of gradients however small.
                torch.testing.assert_close(parts[key], value, rtol=0, atol=1e-4)

    # Stopped at 16 images and resumed by other launches; the last resumes what one process has written meanwhile.
    run_ranks(2, tiny("moved", *FLAGS, *SHORT), launched, "fsdp", 8, status=143)
    launches = {
        "same": [(2, "fsdp", None)],
        "ddp": [(2, "ddp", None)],
        "four": [(4, "zero2", None)],
        "back": [(1, "ddp", 24), (2, "zero2", None)],
    }
    for name, parts in launches.items():
        shutil.copytree(tmp_path / "moved", tmp_path / name)
        for world, how, stop_at in parts:
            said = run_ranks(world, tiny(name, *FLAGS, *SHORT), launched, how, stop_at, status=143 if stop_at else 0)[0]
            assert "resuming" in said
            newest = newest_checkpoint(tmp_path / name / "checkpoints")
            assert newest.name == f"{stop_at + 8 if stop_at else 40:09d}"
            assert (newest / file_name("model", ShardId(0, 1 if how == "ddp" else world))).is_file()
        assert_same_curve(tmp_path / name, tmp_path / "whole")
        assert load_trained_model(tmp_path / name / "model").network.config.sample_size == 16
    assert_same_run(tmp_path / "same", tmp_path / "fsdp")

    for name in [*checkpoint_files(2), "manifest.json"]:
        for damage in (Path.unlink, cut, flip):
            whole = (file := tmp_path / "fsdp" / FINAL / name).read_bytes()
            damage(file)
            assert newest_checkpoint(tmp_path / "fsdp/checkpoints").name == "000000024", (name, damage)
            file.write_bytes(whole)
    assert newest_checkpoint(tmp_path / "fsdp/checkpoints").name == "000000040"


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def in_bf16(rank: int, kind: str) -> Callable[[StepInfo], None]:
    """A launch of one process, and an error where a convolution does not compute in bf16."""
    launched(rank, kind)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")

    def check(module, arguments, output):
        assert output.dtype == torch.bfloat16

    def after_step(step: StepInfo) -> None:
        if step.images == 8:
            step.session.unet.mid_block.resnets[0].conv1.register_forward_hook(check)

    return after_step


@pytest.mark.parametrize("kind", SHARDED)
def test_one_launched_process_in_bf16(tiny, run_ranks, tmp_path, kind):
    run_ranks(1, tiny("run", *FLAGS, "--train.total_images", "16", "--train.mixed_precision", "bf16"), in_bf16, kind)
    checkpoint = newest_checkpoint(tmp_path / "run/checkpoints")
    weights, average = joined(checkpoint, "model"), joined(checkpoint, "ema")
    assert all(value.dtype == torch.float32 for value in weights.values())
    torch.manual_seed(0)
    assert any(not torch.equal(value, weights[name]) for name, value in average.items())
    initial = UNet2D(**unet_kwargs(tiny("run"), 2)).state_dict()
    assert all(not torch.equal(value, initial[name]) for name, value in average.items() if "conv" in name)


@pytest.mark.parametrize("kind", SHARDED)
def test_ablations_are_rejected(monkeypatch, tmp_path, kind):
    for name, value in LAUNCHES[kind].items():
        monkeypatch.setenv(name, value)
    study = ROOT / "configs/ablations/smoke.yaml"
    with pytest.raises(ConfigError, match="given FSDP for an ablation"):
        StudyRunner(study, budget=None, folder=tmp_path, only=[], flags={}).run(1, dry_run=True)


VARIANTS = {
    "accumulation, bf16, learned weighting of an image's prediction, augmentation": (
        "--train.micro_batch_size", "2", "--train.mixed_precision", "bf16", "--train.loss_weighting", "learned",
        "--diffusion.prediction_type", "sample", "--data.augment", "0.5",
    ),
    "gradient checkpointing, magnitudes brought back to 1, nothing clipped, guidance in the grid, metrics of samples": (
        "--model.gradient_checkpointing", "true", "--model.norm.kind", "magnitude_preserving",
        "--train.max_grad_norm", "null", "--data.label_dropout", "0.5", "--sampling.guidance_scale", "2",
        "--evaluate.every", "0", "--evaluate.num_images", "6", "--evaluate.metrics", "[kid_efficientnet_lite0]",
    ),
    "re-estimated running statistics, snapshots, scalar parameters, norms recomputed in the backward pass": (
        "--model.norm.kind", "sync_batch", "--train.bn_update_batches", "3", "--train.ema_snapshot_every", "8",
        "--model.activation_checkpointing", "norm", "--model.norm.overrides",
        "{decoder: {kind: derf}, middle: {kind: scaled_ws}, encoder: {kind: group, groups: 4}}",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(tiny, run_ranks, tmp_path, variant):
    flags = [*FLAGS, "--train.total_images", "16", *VARIANTS[variant]]
    run_ranks(2, tiny("whole", *flags))
    for kind in SHARDED:
        run_ranks(2, tiny(kind, *flags), launched, kind)
    rel = 1e-2 if "bf16" in flags else 1e-4
    whole = newest_checkpoint(tmp_path / "whole/checkpoints")
    for run in SHARDED:
        for line, theirs in zip(read_log(tmp_path / run), read_log(tmp_path / "whole"), strict=True):
            assert all(
                math.isclose(line[name], theirs[name], rel_tol=rel) for name in line.keys() & {"loss", "grad_norm"}
            )
        # Biases in front of a norm have gradients of rounding errors, which make steps of the learning rate, 1e-3.
        for kind in ("ema", *(POWER_EMAS if "--train.ema_snapshot_every" in flags else ())):
            average = joined(newest_checkpoint(tmp_path / run / "checkpoints"), kind)
            for name, value in joined(whole, kind).items():
                torch.testing.assert_close(average[name], value, rtol=0, atol=4e-3)
        if (tmp_path / run / "ema").is_dir():
            [ours, theirs] = (load_trained_model(reconstruct(tmp_path / each, 0.07)[0]) for each in (run, "whole"))
            for value, expected in zip(ours.network.parameters(), theirs.network.parameters(), strict=True):
                torch.testing.assert_close(value, expected, rtol=1e-3, atol=4e-3)


def spoil(rank: int, kind: str) -> None:
    """On one process and once each: images that are not numbers, infinite losses, gradients that are not numbers."""
    launched(rank, kind)
    faults = {12: "images", 28: "losses", 44: "gradients"}

    def act(session, batch, images):
        what = next((fault for index, fault in faults.items() if index in batch["index"].tolist()), None)
        if what == "images":
            images.fill_(math.nan)
        if what in (None, "images"):
            return
        compute, own = session.process.loss_and_objective, session.process.__dict__

        def spoilt(*given, **inputs):
            del own["loss_and_objective"]
            losses, objective = compute(*given, **inputs)
            if what == "losses":
                return losses + math.inf, objective + math.inf
            objective.register_hook(lambda gradient: gradient * math.nan)
            return losses, objective

        own["loss_and_objective"] = spoilt

    Session.to_device = to_device_with(act)


def test_what_is_not_finite_on_one_process_is_skipped_on_all(tiny, run_ranks, tmp_path):
    for kind in LAUNCHES:
        run_ranks(2, tiny(kind, *FLAGS, "--train.total_images", "56"), spoil, kind)
        found = read_log(tmp_path / kind, "loss")
        assert [line["images"] for line in found] == [8, 24, 40, 56]  # a step without a loss has no line
        assert [line["nonfinite"] for line in found] == [0, 1, 2, 3]
        assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in found)
    for kind in SHARDED:
        assert_same_curve(tmp_path / kind, tmp_path / "ddp")


def refuse_the_disk(rank: int) -> None:
    """The second process cannot write its weights at 16 images."""
    launched(rank, "fsdp")
    write = checkpoints.write_tensors

    def full(file, tensors, part):
        if rank == 1 and "000000016" in str(file):
            raise OSError(28, "No space left on device")
        write(file, tensors, part)

    checkpoints.write_tensors = full


def test_one_process_that_cannot_write_stops_all_and_leaves_the_last_checkpoint(tiny, start_ranks, run_ranks, tmp_path):
    config = tiny("run", *FLAGS, "--train.total_images", "24", "--train.checkpoint_every", "8")
    ranks = start_ranks(2, config, refuse_the_disk)
    assert ranks.ended() == [2, 2]
    for said in ranks.said:
        assert "checkpoint at 16 images" in said and "No space left on device" in said
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["000000008"]
    assert "resuming" in run_ranks(2, config, launched, "fsdp")[0]


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Two files of one kind, of 3 and 2 rows."""
    rows = torch.arange(10.0).view(5, 2)
    contents = [{"a": rows[:3].clone(), "b": torch.ones(())}, {"a": rows[3:].clone()}]
    files = [tmp_path / file_name("model", ShardId(number, 2)) for number in range(2)]
    for file, content in zip(files, contents, strict=True):
        checkpoints.write_tensors(file, content, UNSHARDED)
    return files


def test_rows_of_several_files_are_read_as_one_tensor(parts):
    into = {"a": torch.zeros(5, 2), "b": torch.zeros(())}
    found = ShardedTensorReader(parts)
    found.check(into)
    found.read(into)
    assert torch.equal(into["a"], torch.arange(10.0).view(5, 2)) and into["b"] == 1


@pytest.mark.parametrize("rows", [torch.ones(2, 3), torch.ones(()), torch.ones(2, 2, dtype=torch.int64)])
def test_shards_that_do_not_fit_together_are_rejected(parts, rows):
    checkpoints.write_tensors(parts[1], {"a": rows}, UNSHARDED)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors: a is"):
        ShardedTensorReader(parts)


def test_too_few_rows_are_rejected(parts):
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002.safetensors: belongs to another model: a is"):
        ShardedTensorReader(parts[:1]).check({"a": torch.zeros(5, 2), "b": torch.zeros(())})


@pytest.mark.parametrize(
    ("environment", "flags", "message"),
    [
        ({"FSDP_VERSION": "1", "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, [], "given 1; valid: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, [], "fsdp_offload_params: given true; valid: false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, [], "valid: false, and model.gradient_checkpointing"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, [], "rejected by Accelerate"),
        ({}, ["--train.compile", "true"], "train.compile: given true with FSDP; valid: false"),
        ({}, ["--train.optimizer", "muon"], "train.optimizer: given muon with FSDP; valid: adamw"),
        ({}, ["--train.mixed_precision", "fp16"], "given fp16 with FSDP; valid: no or bf16"),
    ],
)  # fmt: skip
def test_unsupported_options_of_a_launch_are_rejected(monkeypatch, tiny, environment, flags, message):
    for name, value in {**SHARDED["fsdp"], **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        fsdp.check_options(tiny("run", *flags))


@pytest.mark.parametrize("library", ["DEEPSPEED", "MEGATRON_LM"])
def test_other_libraries_are_rejected(monkeypatch, library):
    monkeypatch.setenv(f"ACCELERATE_USE_{library}", "true")
    with pytest.raises(ConfigError, match="DeepSpeed and Megatron-LM"):
        open_accelerator("no")
