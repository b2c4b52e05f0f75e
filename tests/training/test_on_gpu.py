"""What only a GPU shows of training: bits that repeat in deterministic mode, fp16's scale, launches that split runs."""

import json
import math
import os
import signal
from collections.abc import Callable

import pytest
import torch

from gnunet.distributed.signals import StopRequested
from gnunet.training import StepInfo
from gnunet.training.session import Session
from tests.runs import FINAL, SHARDED, assert_same_run, poisoned, read_log

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def on_gpu(rank: int, launch: str | None = None, stop_at: int | None = None) -> Callable[[StepInfo], None]:
    """Refuse to train without a GPU; train as a launch of one process, and stop after `stop_at` images."""
    if launch is not None:
        os.environ.update(SHARDED[launch], MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")

    def after_step(step: StepInfo) -> None:
        assert step.session.accelerator.device.type == "cuda"
        if step.images == stop_at:
            signal.raise_signal(signal.SIGTERM)
            if not torch.ones((), device="cuda").item():
                raise StopRequested  # a device of rehearsals, which computes nothing, not even who received a signal

    return after_step


def spoiled_on_gpu(rank: int) -> Callable[[StepInfo], None]:
    """`on_gpu`, with a pixel of an example set to NaN."""
    Session.to_device = poisoned({50})
    return on_gpu(rank)


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_run_that_was_stopped_ends_with_the_bits_of_a_whole_one(tiny, run_ranks, tmp_path, precision):
    flags = ["--train.deterministic", "true", "--train.mixed_precision", precision, "--train.keep_checkpoints", "1"]
    run_ranks(1, tiny("whole", *flags), on_gpu)
    run_ranks(1, tiny("run", *flags), on_gpu, None, 24, status=143)
    assert "resuming" in run_ranks(1, tiny("run", *flags), on_gpu)[0]
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    state = json.loads((tmp_path / "whole" / FINAL / "state.json").read_text())
    assert ("scale" in state["scaler"]) == (precision == "fp16")


@pytest.mark.parametrize(
    "flags",
    [
        ["--model.norm.kind", "batch"],
        ["--train.mixed_precision", "bf16", "--train.micro_batch_size", "2", "--model.dropout", "0.3"],
    ],
    ids=["whole", "accumulated"],
)
def test_cuda_graphs_change_no_bit(tiny, run_ranks, tmp_path, flags):
    """Also where a step is skipped."""
    for name, mode in (("without", "false"), ("with", "true")):
        config = tiny(name, *flags, "--train.deterministic", "true", "--train.cuda_graph", mode)
        run_ranks(1, config, spoiled_on_gpu)
    assert_same_run(tmp_path / "with", tmp_path / "without")


@pytest.mark.parametrize("kind", SHARDED)
def test_launches_that_split_a_run_have_the_losses_of_a_plain_one(tiny, run_ranks, tmp_path, kind):
    flags = ["--train.deterministic", "true", "--train.total_images", "32", "--train.log_every", "8"]
    run_ranks(1, tiny("plain", *flags), on_gpu)
    run_ranks(1, tiny("split", *flags), on_gpu, kind)
    for line, theirs in zip(read_log(tmp_path / "plain"), read_log(tmp_path / "split"), strict=True):
        for name in line.keys() & {"loss", "grad_norm", "validation_loss"}:
            # Weights that lie otherwise go through other convolutions, in TF32.
            assert math.isclose(line[name], theirs[name], rel_tol=1e-2), (line, theirs)
