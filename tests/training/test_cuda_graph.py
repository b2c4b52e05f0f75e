"""train.cuda_graph changes no bit of a run, with a tape on the CPU in a CUDA graph's place."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gnunet.distributed.accelerator import make_accelerator
from gnunet.errors import ConfigError, DivergenceError
from gnunet.training import cuda_graph, fit
from gnunet.training.session import Session, build_session
from gnunet.training.trainer import train_step
from tests.runs import LITTLE, assert_same_run, fit_until, poisoned

ON, OFF = ["--train.cuda_graph", "auto"], ["--train.cuda_graph", "false"]
READS_LATE = Session.reads_late
LONG = ["--train.batch_size", "12", "--train.total_images", "72", "--train.log_every", "24",
        "--train.checkpoint_every", "48"]  # fmt: skip


class Tape(TorchDispatchMode):
    """The operations that a function consists of and their tensors, to be run again on these as a CUDA graph's kernels.

    Numbers of the host are on it as they were, so that one that changes between steps gives wrong results.

    Raises:
        RuntimeError: a number of the device is read by the host.
    """

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a number is read by the host")
        results = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, tree_leaves(results)))
        return results

    @torch.no_grad()
    def play(self):
        for operation, args, kwargs, results in self.operations:
            for mine, new in zip(results, tree_leaves(operation(*args, **kwargs)), strict=True):
                if isinstance(new, torch.Tensor) and mine.untyped_storage()._cdata != new.untyped_storage()._cdata:
                    mine.copy_(new)


def record(function, *, pool, stream):
    """In the place of `cuda_graph.capture`; what is recorded has been run, so that the first replay does nothing."""
    tape, played = Tape(), []
    with tape:
        result = function()

    def replay():
        if played:
            tape.play()
        played.append(True)
        return result

    return replay


def graphs_on_cpu(rank: int = 0, capture=record, late: bool = False, broken: tuple[int, ...] = ()) -> None:
    """Have a process train as on a GPU; captures fail on the ranks named in `broken`."""
    cuda_graph.DEVICES = ("cuda", "cpu")
    cuda_graph.capture = fail if rank in broken else capture
    if late:
        Session.reads_late = property(lambda session: session.graphs is not None)


def fail(function, *, pool, stream):
    raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors")


AT_ONCE, LATE = (pytest.param(late, id="late" if late else "at_once") for late in (False, True))


@pytest.fixture(params=[AT_ONCE, LATE])
def on_cpu(request, monkeypatch):
    """Graphs on the CPU; results are read at once, or one step late."""
    for owner, name in ((cuda_graph, "DEVICES"), (cuda_graph, "capture"), (Session, "reads_late")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    graphs_on_cpu(late=request.param)


CASES = {
    "plain": [],
    "accumulation, weights normalized": [*LONG, "--train.micro_batch_size", "4", "--model.norm.kind", "weight_norm"],
    "power, recompute": ["--train.ema_kind", "power", "--train.weight_decay", "0.1", "--train.max_grad_norm", "null",
                         "--model.activation_checkpointing", "norm", "--train.ema_snapshot_every", "16"],
    "dropout, magnitudes": [*LONG, "--train.micro_batch_size", "6", "--model.dropout", "0.3", "--diffusion.kind", "edm",
                            "--model.norm.kind", "magnitude_preserving"],
    "unlabelled": ["--data.class_conditional", "false", "--diffusion.kind", "ddpm", "--train.mixed_precision", "bf16"],
    "precise": ["--model.norm.kind", "batch_renorm", "--train.bn_update_batches", "2"],
    "learned weighting, augmentation": ["--train.loss_weighting", "learned", "--diffusion.prediction_type", "sample",
                                        "--data.augment", "0.5"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "on_cpu"),
    [*((case, LATE) for case in CASES), ("plain", AT_ONCE), ("accumulation, weights normalized", AT_ONCE)],
    indirect=["on_cpu"],
)
def test_graphs_do_not_change_a_run(tiny, tmp_path, on_cpu, monkeypatch, case):
    """Also after a skipped step among the replayed ones, which a checkpoint follows at once."""
    monkeypatch.setattr(Session, "to_device", poisoned({44, 49, 50}))
    fit(tiny("without", *LITTLE, *CASES[case], *OFF))
    fit(tiny("with", *LITTLE, *CASES[case], *ON))
    assert "nonfinite_examples" in (tmp_path / "with/metrics.jsonl").read_text()
    assert_same_run(tmp_path / "with", tmp_path / "without")


@pytest.mark.parametrize("micro", ["4", "2"])
def test_graphs_do_not_change_a_run_of_two_processes(tiny, run_ranks, tmp_path, micro):
    flags = [*LITTLE, "--train.total_images", "40", "--train.micro_batch_size", micro, "--model.norm.kind", "batch"]
    run_ranks(2, tiny("without", *flags, *OFF))
    run_ranks(2, tiny("with", *flags, *ON), graphs_on_cpu, record, True)
    assert_same_run(tmp_path / "with", tmp_path / "without")


@pytest.mark.parametrize("on_cpu", [LATE], indirect=True)
@pytest.mark.parametrize("modes", [(ON, OFF), (OFF, ON)], ids=["on_then_off", "off_then_on"])
def test_a_stopped_run_resumes_in_the_other_mode(tiny, finished, tmp_path, on_cpu, modes):
    fit_until(32, tiny("run", *modes[0]))
    fit(tiny("run", *modes[1]))
    assert_same_run(tmp_path / "run", finished)


def test_a_stop_that_is_read_late_is_one_step_late(tiny, tmp_path, on_cpu):
    late = tiny("run", *ON, "--train.log_every", "64", "--train.checkpoint_every", "0", "--train.sample_every", "0")
    fit_until(40, late)
    [checkpoint] = (tmp_path / "run/checkpoints").iterdir()
    assert int(checkpoint.name) == 48 + 8 * (Session.reads_late is not READS_LATE)
    assert json.loads((checkpoint / "state.json").read_text())["steps"] == int(checkpoint.name) // 8


def test_too_many_skipped_steps_end_a_run_as_without_graphs(tiny, on_cpu, monkeypatch, capsys):
    monkeypatch.setattr(Session, "to_device", poisoned({26, 33}))
    errors, said = [], []
    for name, mode in (("without", OFF), ("with", ON)):
        with pytest.raises(DivergenceError) as caught:
            fit(tiny(name, *mode, *LITTLE, "--train.max_nonfinite_steps", "2", "--train.log_every", "64"))
        errors.append((str(caught.value), caught.value.images, caught.value.nonfinite))
        said.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped")])
    assert errors[0] == errors[1] and errors[0][1:] == (40, 2)
    assert said[0] == said[1] and len(said[0]) == 2


@pytest.mark.parametrize("on_cpu", [LATE], indirect=True)
def test_a_capture_that_fails_changes_nothing(tiny, tmp_path, on_cpu, monkeypatch, caplog):
    """The capture of a part fails after others were captured."""
    flags = [*LITTLE, "--train.total_images", "40", "--train.micro_batch_size", "2"]
    fit(tiny("without", *flags, *OFF))
    for number, name in enumerate(("first", "next", "clip", "update"), 1):
        captured = []

        def capture(function, *, pool, stream, captured=captured, number=number):
            captured.append(function)
            return (fail if len(captured) == number else record)(function, pool=pool, stream=stream)

        monkeypatch.setattr(cuda_graph, "capture", capture)
        caplog.clear()
        with caplog.at_level("WARNING"):
            fit(tiny(name, *flags, *ON))
        [warning] = [entry.message for entry in caplog.records if "cuda_graph" in entry.message]
        assert "operation not permitted when stream is capturing" in warning
        assert_same_run(tmp_path / name, tmp_path / "without")
        captured.clear()
        with pytest.raises(ConfigError, match="train.cuda_graph: given true"):
            fit(tiny(f"must_{name}", *flags, "--train.cuda_graph", "true"))


def test_a_capture_that_fails_on_one_process_is_given_up_on_all(tiny, run_ranks, tmp_path):
    flags = [*LITTLE, "--train.total_images", "40"]
    run_ranks(2, tiny("without", *flags, *OFF))
    said = run_ranks(2, tiny("with", *flags, *ON), graphs_on_cpu, record, True, (1,))
    assert [text.count("the step cannot be captured") for text in said] == [1, 0]
    assert_same_run(tmp_path / "with", tmp_path / "without")
    must = tiny("must", "--train.cuda_graph", "true")
    said = run_ranks(2, must, graphs_on_cpu, record, False, (1,), status=2)
    assert all("train.cuda_graph: given true" in text for text in said)


@pytest.mark.parametrize(
    ("flags", "valid"),
    [
        ([], "given true on a device of type cpu; valid: auto or false"),
        (["--train.mixed_precision", "fp16"], "valid: auto or false with train.mixed_precision fp16"),
        (["--model.gradient_checkpointing", "true"], "auto or false with model.gradient_checkpointing true"),
        (["--train.optimizer", "muon"], "auto or false with train.optimizer muon"),
        (["--train.compile", "reduce-overhead"], "auto or false with train.compile reduce-overhead"),
    ],
    ids=["cpu", "fp16", "checkpointing", "muon", "compile"],
)
def test_unsupported_settings_are_rejected(tiny, tmp_path, flags, valid):
    with pytest.raises(ConfigError) as caught:
        fit(tiny("run", "--train.cuda_graph", "true", *flags))
    assert "train.cuda_graph: given true" in str(caught.value) and valid in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_sync_batch_on_several_processes_is_rejected_or_trains_without_graphs(tiny, run_ranks):
    norm = ["--model.norm.overrides", "{encoder: {kind: sync_batch}}"]
    said = run_ranks(2, tiny("true", *norm, "--train.cuda_graph", "true"), graphs_on_cpu, status=2)
    assert all("train.cuda_graph: given true with sync_batch" in text for text in said)
    run_ranks(2, tiny("auto", *norm, *ON, *LITTLE, "--train.total_images", "32"), refuse_captures)


def refuse_captures(rank: int) -> None:
    def capture(*_, **options):
        raise AssertionError("captured")

    graphs_on_cpu(capture=capture)


def test_the_optimizer_keeps_no_tensor_of_a_step(tiny, on_cpu):
    config = tiny("run", *ON)
    session = build_session(config, make_accelerator(config))
    batches = session.batches(0)
    for seen in range(0, 64, 8):
        train_step(session, batches, seen)()
    [group] = session.strategy.adamw.state_dict()["param_groups"]
    assert isinstance(group["lr"], float) and group["capturable"] is False
    assert not hasattr(session.strategy.adamw, "found_inf")
