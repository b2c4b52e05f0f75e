"""NaN and infinity in an image, a gradient or a weight: skipped on all processes alike, counted and named."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file

from gnunet.checkpoint.checkpoint import list_checkpoints, read_state
from gnunet.distributed.accelerator import make_accelerator
from gnunet.errors import DivergenceError
from gnunet.training import StepInfo, fit, run_log
from gnunet.training.session import Session, build_session
from gnunet.training.trainer import train_step
from tests.runs import FINAL, LITTLE, assert_same_run, fit_until, poisoned, read_log

LATE = ["--train.log_every", "32", "--train.sample_every", "0", "--train.validate_every", "0", *LITTLE]


def poison(rank: int, what: str, value: float, folder: Path) -> Callable[[StepInfo], None]:
    """Spoil something on rank 1: examples 16 to 23, or a weight after 24; write a digest after each step."""
    if what == "image":
        Session.to_device = poisoned({21}, value)  # rank 1 has 20 to 23

    def after_step(step: StepInfo) -> None:
        session = step.session
        weight = session.unet.conv_in.weight
        digest = hashlib.sha256()
        for tensor in [*session.unet.parameters(), *session.ema.model.parameters()]:
            digest.update(tensor.detach().contiguous().numpy().tobytes())
        with (folder / f"weights-{rank}.txt").open("a") as file:
            file.write(f"{step.images} {digest.hexdigest()}\n")
        if rank == 1 and step.images == 24 and what == "weight":
            weight.data[0, 0, 0, 0] = value
        if rank == 1 and step.images == 16 and what == "gradient":  # after DDP, which would have given it to all
            clip = session.strategy.clip

            def clip_spoiled(max_norm: float) -> torch.Tensor:
                session.strategy.clip = clip
                weight.grad[0, 0, 0, 0] = value
                return clip(max_norm)

            session.strategy.clip = clip_spoiled

    return after_step


@pytest.mark.parametrize(("what", "value"), [("image", math.nan), ("gradient", math.inf)])
def test_one_process_spoils_a_step_and_all_skip_it(tiny, run_ranks, tmp_path, what, value):
    said = run_ranks(2, tiny("run", *LATE), poison, what, value, tmp_path)
    zero, one = ((tmp_path / f"weights-{rank}.txt").read_text().splitlines() for rank in (0, 1))
    digests = [line.split()[1] for line in zero]
    assert zero == one and [i for i in range(1, 8) if digests[i] == digests[i - 1]] == [2]  # the third step is skipped
    assert [line["nonfinite"] for line in read_log(tmp_path / "run", "loss")] == [1, 1]
    named = [line.get("nonfinite_examples") for line in read_log(tmp_path / "run", "loss")]
    assert named == ([[21], None] if what == "image" else [None, None])
    assert "skipped the step over examples 16 to 23" in said[0]
    assert ("not finite: 21 (image " in said[0]) == (what == "image")


def test_a_weight_that_one_process_has_spoiled_ends_all_and_the_run_goes_on(tiny, run_ranks, tmp_path):
    """No step can be taken with it; the checkpoint from before has it whole."""
    flags = [*LATE, "--train.checkpoint_every", "16", "--train.total_images", "40"]
    run_ranks(2, tiny("whole", *flags))
    config = tiny("run", *flags, "--train.max_nonfinite_steps", "4")
    said = run_ranks(2, config, poison, "weight", math.nan, tmp_path, status=2)
    assert all("at 32 images (processes: 1)" in text for text in said)
    assert [path.name for path in list_checkpoints(tmp_path / "run/checkpoints")] == ["000000016"]
    run_ranks(2, tiny("run", *flags))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_resumed_run_names_the_same_examples(tiny, tmp_path, monkeypatch):
    """Spoiled in the step after 16 images, stopped in the one after it, logged at 32."""
    monkeypatch.setattr(Session, "to_device", poisoned({18, 20}, math.inf))
    fit(tiny("whole", *LATE))
    fit_until(16, tiny("run", *LATE))
    assert read_state(tmp_path / "run/checkpoints/000000024").nonfinite_examples == [18, 20]
    fit(tiny("run", *LATE))
    assert read_log(tmp_path / "run", "loss")[0]["nonfinite_examples"] == [18, 20]
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_many_examples_are_named_in_part(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_log, "MAX_NAMED_EXAMPLES", 3)
    monkeypatch.setattr(Session, "to_device", poisoned(set(range(8, 24)), math.nan))
    fit(tiny("run", *LATE))
    assert read_log(tmp_path / "run", "loss")[0]["nonfinite_examples"] == [8, 9, 10]
    assert "10 (image " in (said := capsys.readouterr().out) and " and 5 more" in said


def test_an_example_is_named_with_the_image_it_shows(tiny, tmp_path):
    session = build_session(tiny("run"), make_accelerator(tiny("run")))
    rows = session.train_set.image_rows([3, 21])
    images = session.train_set.__getitems__([3, 21])["images"]
    for row, image in zip(rows, images, strict=True):
        original = torch.from_numpy(session.train_set.table.images[row].copy()).permute(2, 0, 1)
        assert torch.equal(image, original) or torch.equal(image, original.flip(-1))


def test_running_statistics_stay_finite(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Session, "to_device", poisoned({18}, math.nan))
    fit(tiny("run", *LATE, "--model.norm.kind", "batch"))
    for name in ("model", "ema"):
        tensors = load_file(tmp_path / "run" / FINAL / f"{name}.safetensors")
        assert "down_blocks.0.resnets.0.norm1.running_var" in tensors
        assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_checkpoint_of_broken_weights_is_never_written(tiny, tmp_path):
    """Broken in the step that a checkpoint follows, so that no loss has shown it yet."""

    def breaking(step):
        if step.images == 48:
            step.session.unet.conv_out.bias.data[0] = math.inf

    flags = [*LATE, "--train.checkpoint_every", "24"]
    fit(tiny("whole", *flags))
    with pytest.raises(DivergenceError, match="at 48 images"):
        fit(tiny("run", *flags), breaking)
    assert [path.name for path in list_checkpoints(tmp_path / "run/checkpoints")] == ["000000024"]
    fit(tiny("run", *flags))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.fixture
def scaled(tiny):
    """A session whose loss is scaled as under fp16 and whose gradients overflow as fp16's, computed in fp32."""
    session = build_session(tiny("run"), make_accelerator(tiny("run")))
    accelerator = session.accelerator
    for parameter in session.unet.parameters():
        parameter.register_hook(lambda gradient: gradient.half().float())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
    accelerator.scaler, accelerator.native_amp = scaler, True
    accelerator.state._mixed_precision = "fp16"
    session.strategy.optimizer = AcceleratedOptimizer(session.strategy.adamw, scaler=scaler)
    accelerator._optimizers = [session.strategy.optimizer]
    return session


def test_fp16_scaling_recovers(scaled):
    """The scale is halved by every overflow and doubled by three steps in a row; none counts as a divergence."""
    batches, scaler = scaled.batches(0), scaled.accelerator.scaler
    before = [parameter.detach().clone() for parameter in scaled.unet.parameters()]
    expected, in_a_row, taken = scaler.get_scale(), 0, []
    for seen in range(0, 64, 8):
        result = train_step(scaled, batches, seen)()
        assert math.isfinite(result.loss) and not result.nonfinite_examples
        assert result.overflow == (not result.finite)
        taken.append(result.finite)
        assert all(map(torch.equal, before, scaled.unet.parameters())) == (not any(taken))
        in_a_row = in_a_row + 1 if result.finite else 0
        expected *= 1 if result.finite else 0.5
        if in_a_row == 3:
            expected, in_a_row = 2 * expected, 0
        assert scaler.get_scale() == expected
    assert not taken[0] and sum(taken) >= 4


def test_fp16_a_broken_image_lowers_the_scale_and_counts_as_not_finite(scaled, monkeypatch):
    scaler = scaled.accelerator.scaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**16})
    monkeypatch.setattr(Session, "to_device", poisoned({9}, math.nan))
    batches = scaled.batches(0)
    results = [train_step(scaled, batches, seen)() for seen in range(0, 24, 8)]
    assert [(r.finite, r.overflow, r.nonfinite_examples) for r in results] == [
        (True, False, ()), (False, False, (9,)), (True, False, ())
    ]  # fmt: skip
    assert scaler.state_dict()["scale"] == 2.0**15 and scaler.state_dict()["_growth_tracker"] == 1
