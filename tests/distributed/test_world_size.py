"""The same run on 1, 2 and 4 processes and with other accumulations: the same examples, curves that agree."""

import hashlib
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open

from gnunet.checkpoint.checkpoint import newest_checkpoint
from gnunet.training import StepInfo
from gnunet.training.session import Session
from tests.runs import read_log, signal_in_step, to_device_with

BATCH, IMAGES, LEARNING_RATE, CLIP = 8, 40, 1e-3, 1.0
FLAGS = ["--train.total_images", str(IMAGES), "--train.log_every", str(BATCH), "--train.checkpoint_every", "0",
         "--train.sample_every", "0", "--train.validate_every", "0", "--train.max_grad_norm", str(CLIP),
         "--train.learning_rate", str(LEARNING_RATE), "--sampling.num_images", "1",
         "--data.condition.kind", "mask", "--data.condition_dropout", "0.3"]  # fmt: skip
SPLITS = [(1, 2), (2, 4), (4, 1)]
"""Processes and micro-batch sizes, in addition to one process and whole batches: accumulation 4, 1, 2."""


def record_draws(rank: int, folder: Path) -> Callable[[StepInfo], None]:
    """Have a process write down, for each step, the examples it gets and a digest of all that belongs to each."""
    drawn: dict[int, str] = {}

    def note(session, batch, images):
        for i, index in enumerate(batch["index"].tolist()):
            parts = [batch[name][i].contiguous().numpy().tobytes() for name in sorted(batch)]
            drawn[index] = hashlib.sha256(b"".join(parts)).hexdigest()

    def after_step(step: StepInfo) -> None:
        with (folder / f"draws-{rank}.jsonl").open("a") as file:
            file.write(json.dumps([step.images - BATCH, drawn]) + "\n")
        drawn.clear()

    Session.to_device = to_device_with(note)
    return after_step


def draws(folder: Path) -> dict[int, dict[int, str]]:
    """By images seen: the digest of each example of the step, over all processes; none may come twice."""
    steps: dict[int, dict[int, str]] = {}
    for path in sorted(folder.glob("draws-*.jsonl")):
        for line in path.read_text().splitlines():
            images_seen, drawn = json.loads(line)
            step = steps.setdefault(images_seen, {})
            assert not step.keys() & drawn.keys()
            step.update(drawn)
    return steps


def bounds(run: Path) -> list[float]:
    """How far another split may move the loss of each step of a run, to first order in the roundings.

    Another split adds the same fp32 numbers in another order: over examples, over processes, and within a
    convolution, which may block a batch of another size in another way. A sum of n terms then moves by at most
    log2(n) u of the sum of their magnitudes where it is a tree, u = 2^-24; some such sums follow each other from an
    image to the loss and back to a weight's gradient, K units in all. So the loss moves by K u loss, and the gradient
    g of P weights by a vector e of norm K u |g|, both after clipping to CLIP.

    AdamW moves weight i by lr m / (sqrt(v) + eps), which is about lr whatever the size of g_i. An error e_i thus moves
    the weight by at most lr min(2, e_i / |g_i|), also where it turns g_i's sign, and the next loss by |g_i| times
    that: summed over the weights by lr |e|_1 <= lr sqrt(P) K u |g|, at each step.

        |loss_t - loss'_t|  <=  K u (loss_t + sqrt(P) sum over s < t of lr_s |g_s|)
    """
    roundings = 64 * 2.0**-24  # K: the tiny network is some 20 sums deep there and back, of 8 to 600 terms
    with safe_open(next((run / "checkpoints").iterdir()) / "model.safetensors", "pt") as file:
        weights = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    moved, result = 0.0, []
    for line in read_log(run, "loss"):
        result.append(roundings * (line["loss"] + math.sqrt(weights) * moved))
        moved += LEARNING_RATE * min(CLIP, line["grad_norm"])
    return result


def assert_same_curve(run: Path, reference: Path) -> None:
    lines = list(zip(read_log(run, "loss"), read_log(reference, "loss"), bounds(reference), strict=True))
    assert [ours["images"] for ours, _, _ in lines] == list(range(BATCH, IMAGES + 1, BATCH))
    for ours, theirs, bound in lines:
        assert abs(ours["loss"] - theirs["loss"]) <= bound, f"at {ours['images']} images"


def test_every_split_draws_the_same_examples_and_has_the_same_curve(tiny, run_ranks, tmp_path):
    run_ranks(1, tiny("whole", *FLAGS), record_draws, tmp_path)
    expected = draws(tmp_path)
    assert [(step, list(drawn)) for step, drawn in expected.items()] == [
        (seen, [str(index) for index in range(seen, seen + BATCH)]) for seen in range(0, IMAGES, BATCH)
    ]
    for world, micro in SPLITS:
        name = f"{world}x{micro}"
        (folder := tmp_path / f"{name}.draws").mkdir()
        run_ranks(world, tiny(name, *FLAGS, "--train.micro_batch_size", str(micro)), record_draws, folder)
        assert draws(folder) == expected, name
        assert_same_curve(tmp_path / name, tmp_path / "whole")


def test_a_run_moves_between_numbers_of_processes(tiny, run_ranks, tmp_path):
    """Stopped on two, on one and on four by a signal to one rank, within the step; all ranks end with its status."""
    run_ranks(1, tiny("whole", *FLAGS))
    config = tiny("run", *FLAGS)
    stops = [(2, 0, 1, signal.SIGTERM), (1, 8, 0, signal.SIGINT), (4, 16, 2, signal.SIGINT)]
    for world, images, asked, number in stops:
        run_ranks(world, config, signal_in_step, asked, images, number, status=128 + number)
        assert newest_checkpoint(tmp_path / "run/checkpoints").name == f"{images + BATCH:09d}"
    run_ranks(2, config)
    assert_same_curve(tmp_path / "run", tmp_path / "whole")


def test_a_batch_that_the_new_processes_cannot_split_is_rejected_before_anything_changes(tiny, run_ranks, tmp_path):
    config = tiny("run", *FLAGS)
    run_ranks(1, config, signal_in_step, 0, 8, signal.SIGTERM, status=128 + signal.SIGTERM)
    before = files_and_times(tmp_path / "run")
    said = run_ranks(3, config, status=2)
    assert all("train.batch_size" in text and "Traceback" not in text for text in said)
    assert files_and_times(tmp_path / "run") == before


def files_and_times(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
