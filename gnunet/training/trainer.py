"""The training loop: one optimizer step after another over examples 0, 1, 2, ... of a run, and what is due between."""

import math
import re
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import DistError

from gnunet.checkpoint.checkpoint import TrainState
from gnunet.checkpoint.run_dir import RunDir
from gnunet.config import Config
from gnunet.data.loader import worker_failure
from gnunet.diffusion import NoiseLevel
from gnunet.distributed.accelerator import close, fresh_accelerate_state, keep_freed_memory, make_accelerator
from gnunet.distributed.launch import is_distributed_launch
from gnunet.distributed.signals import StopRequested, StopSignal
from gnunet.errors import DISK_ERRORS, TrainingError
from gnunet.norms import force_weight_norm
from gnunet.random_streams import Stream, StreamKey
from gnunet.training import cuda_graph
from gnunet.training.checkpointing import resume_or_start, save, save_snapshot
from gnunet.training.ema import ema_decays
from gnunet.training.evaluation import (
    check_enough_images,
    check_extractors,
    evaluate,
    format_scores,
    sample_grid,
    save_grid,
    update_best,
    validate,
)
from gnunet.training.lr_schedule import learning_rate
from gnunet.training.optimizer import check_optimizer
from gnunet.training.progress import Display
from gnunet.training.run_log import StepResult, count_step, cpu_warning, due_tasks, memory_mib, training_metrics
from gnunet.training.session import Session, build_session


@dataclass(frozen=True)
class StepInfo:
    """What a callback of `fit` receives after each optimizer step."""

    images: int  # images seen, including those of this step
    total_images: int  # images seen when the run ends
    loss: float | None
    """The newest loss that the host has read, averaged over the global batch. With CUDA graphs on a GPU, which results
    are copied from while the next step runs, it is that of the step before; None after the first step."""
    session: Session  # network, EMA weights, optimizer and data of the run


Callback = Callable[[StepInfo], None]


@fresh_accelerate_state()
def fit(config: Config, callback: Callback | None = None) -> Path:
    """Train as `config` says, resuming the run in its folder if there is one.

    Args:
        config: what to train, and where.
        callback: called on every process after each optimizer step, which it does not wait for: reading its argument
            causes no synchronization with the device. What it raises ends the run without a checkpoint.

    Returns:
        The run's folder, once the run is complete.

    Raises:
        GnunetError: an error that the user can fix; earlier checkpoints of the run stay valid.
        SystemExit: a signal stopped the run after a checkpoint was written; the code is 128 + signal number.
    """
    keep_freed_memory()
    run = RunDir(config)
    try:
        with _errors_for_users(run):
            # The run's folder is checked before anything is built, and written only once everything is.
            accelerator = make_accelerator(config)
            run.check()
            signum = _run_training(run, run.config, accelerator, callback)
            close(accelerator)  # here, since no frame holds a network any more
    finally:
        run.lock.release()
    if signum is not None:
        raise SystemExit(128 + signum)
    return run.path


def _run_training(run: RunDir, config: Config, accelerator: Accelerator, callback: Callback | None) -> int | None:
    """Build or resume the run and train it; returns the signal that stopped it, None if it is complete."""
    check_extractors(config.evaluate)
    check_optimizer(config.train)
    session = build_session(config, accelerator)
    check_enough_images(session)
    state, loaded = resume_or_start(session, run)
    display = Display(images=state.images, total=session.total_images, enabled=accelerator.is_main_process)
    stop = StopSignal(display.announce)
    with stop, display:
        for text in filter(None, (session.data_summary[1], loaded, cpu_warning(session))):
            display.message(text)
        try:
            train(session, run, state, stop, display, callback)
        except StopRequested:
            save(session, run, state, with_model=False)  # launchers kill soon after they signal
            display.message(f"stopped at {state.images} images, checkpoint written; the same command resumes the run")
            # Every rank returns the same signal, whichever of them received it.
            signum = torch.tensor([stop.signum or 0], device=accelerator.device)
            return accelerator.gather(signum).max().item() or signal.SIGTERM
        display.message(f"done: {state.images} images; samples in {run.samples}, model in {run.model}")
        display.message(f"to train longer: the same command with --train.total_images {2 * state.images}")
    return None


def train(
    session: Session, run: RunDir, state: TrainState, stop: StopSignal, display: Display, callback: Callback | None
) -> None:
    """Train from `state` to the end of the run. Raises StopRequested after a signal: `state` is to be saved."""
    config, accelerator, total = session.config, session.accelerator, session.total_images
    batches = session.batches(state.images)
    pending: deque[Callable[[], StepResult]] = deque()  # steps whose results have not been read yet
    last_loss: float | None = None
    seconds, timed_images = 0.0, 0  # of the steps since the last log line

    def write(record: dict, line: dict[str, str], timing: dict | None = None) -> None:
        """Log to metrics.jsonl (and timing.jsonl), the trackers and the terminal."""
        timing = timing or {}
        if accelerator.is_main_process:
            run.metrics.write(record)
            if timing:
                run.timing.write({"images": state.images, **timing})
        numbers = {key: value for key, value in {**record, **timing}.items() if isinstance(value, int | float)}
        accelerator.log(numbers, step=state.images)
        display.log(state.images, line)

    due = due_tasks(config, state, total)
    while True:
        # All that is due is computed before any of it is written: after a signal the resumed run repeats it.
        scores = evaluate(session, state.images, stop=stop, display=display) if "evaluate" in due else None
        validation = validate(session, state.images, stop=stop, display=display) if "validate" in due else None
        grid = sample_grid(session, stop=stop, display=display) if "sample" in due else None

        if "log" in due and state.steps:
            record, line = training_metrics(session, state)
            speed = timed_images / seconds if seconds else None
            memory = memory_mib(accelerator.device)
            line |= {"speed": f"{speed:.1f} images/s" if speed else "?", "memory": f"{memory:.0f} MiB"}
            write(record, line, {"images_per_second": speed, "memory_mib": memory})
            seconds, timed_images = 0.0, 0
        for result in (validation, scores):
            if result is not None:
                write(result, format_scores(result, config.evaluate.metrics))
                if update_best(state, config.evaluate, result):
                    due.add("checkpoint")
        if grid is not None and accelerator.is_main_process:
            display.log(state.images, {"samples": str(save_grid(session, run.samples, grid, state.images))})
        changes = [each for each in state.changes if state.reported <= each["images"] < state.images]
        if changes and accelerator.is_main_process:
            run.metrics.write({"images": state.images, "changes": changes})
        state.reported = state.images
        if "snapshot" in due:
            save_snapshot(session, run, state)
        if "checkpoint" in due:
            save(session, run, state)
        if state.images >= total:
            return

        display.set_status("training")
        start = time.perf_counter()
        pending.append(train_step(session, batches, state.images, stop=stop))
        state.images += config.train.batch_size
        timed_images += config.train.batch_size
        due = due_tasks(config, state, total)
        # With CUDA graphs a result is read when the next step is queued, so that the device always has work.
        stopped, late = False, session.reads_late and not due
        while len(pending) > (late and not stopped):
            result = pending.popleft()()
            count_step(session, state, result, display)
            last_loss, stopped = result.loss, stopped or result.stop
        seconds += time.perf_counter() - start
        if callback is not None:
            callback(StepInfo(state.images, total, last_loss, session))
        if stopped:
            raise StopRequested


def train_step(
    session: Session, batches: Iterator[dict[str, Tensor]], images_seen: int, *, stop: bool | StopSignal = False
) -> Callable[[], StepResult]:
    """One optimizer step over a global batch: forward and backward, clipping, weights, EMA.

    `stop` says whether this rank was asked to stop; it is read as late in the step as possible, and all ranks learn of
    it. Returns a function that waits for the device and returns the result, to be called on every rank in the order of
    steps.
    """
    config, accelerator, strategy = session.config, session.accelerator, session.strategy
    train, unet = config.train, session.unet
    # Parts of the step are functions, so that `Graphs` can replay them as CUDA graphs.
    run = session.graphs.run if session.graphs is not None else (lambda name, function, *inputs: function(*inputs))

    def forward_backward(images: Tensor, noise: Tensor, *tensors: Tensor) -> Tensor:
        count = len(fields(NoiseLevel))
        level, named = NoiseLevel(*tensors[:count]), dict(zip(others, tensors[count:], strict=True))
        losses, objective = session.process.loss_and_objective(strategy.network, images, noise, level, **named)
        # Gradients are averaged over the ranks: what remains is the mean over the global batch.
        strategy.backward(objective.sum() * (accelerator.num_processes / train.batch_size))
        return losses.detach()

    def zero_grad_forward_backward(*inputs: Tensor) -> Tensor:
        unet.zero_grad()  # also of what a failed capture has left
        return forward_backward(*inputs)

    def update_if_finite(totals: Tensor, lr: Tensor, *weights: Tensor) -> None:
        finite = totals[:2].isfinite().all()
        strategy.step_where(finite, lr)
        force_weight_norm(unet, where=finite)
        session.ema.update(*weights, where=finite)
        unet.zero_grad()  # a graph's own memory keeps them where it expects them

    loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    losses_by_example: list[tuple[Tensor, Tensor]] = []
    for i in range(session.accumulation):
        batch = next(batches)
        if config.model.dropout:
            seed = Stream(config.seed, StreamKey.DROPOUT).raw(int(batch["index"][0]), 1)
            torch.manual_seed(int(seed[0]) >> 1)
        images, noise, level, others = session.to_device(batch)
        with strategy.accumulate(is_last=i == session.accumulation - 1):
            name, function = ("next", forward_backward) if i else ("first", zero_grad_forward_backward)
            losses = run(name, function, images, noise, *vars(level).values(), *others.values()).clone()
        losses_by_example.append((batch["index"], losses))
        loss_sum += losses.sum(dtype=torch.float64)
    strategy.average_gradients(run)
    grad_norm = run("clip", partial(strategy.clip, train.max_grad_norm or math.inf))

    # The norm is the same on every rank, so its mean is exact; a rank where it is not finite makes the sum non-finite.
    totals = torch.stack([loss_sum, grad_norm.double(), loss_sum.new_full((), float(bool(stop)))])
    totals = accelerator.reduce(totals, "sum")
    session.all_reduce_running_stats()
    session.ema_stats_are_current = False

    lr = learning_rate(train, images_seen + train.batch_size / 2)
    weights = [1.0 - decay for decay in ema_decays(train, images_seen + train.batch_size)]
    result = partial(StepResult.from_totals, session, images_seen + train.batch_size, losses_by_example)
    if session.graphs is not None:  # the device decides whether the step is finite
        numbers = (totals.new_full((), value, dtype=torch.float32) for value in (lr, *weights))
        run("update", update_if_finite, totals, *numbers)
        session.graphs.end_step()
        values = cuda_graph.copy_to_host(totals)
        return lambda: result(values())
    step = result(totals.tolist())
    if step.finite:
        strategy.step(lr)
        force_weight_norm(unet)
        session.ema.update(*weights)
    else:
        strategy.skip_step()
    return lambda: step


@contextmanager
def _errors_for_users(run: RunDir) -> Iterator[None]:
    """Raise a failing disk, any error of the run's files and a lost rank as TrainingError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        inside = isinstance(error, OSError) and str(error.filename).startswith(str(run.path))
        if isinstance(error, OSError) and error.errno not in DISK_ERRORS and not inside:
            raise
        raise TrainingError(
            f"{run.path}: cannot be written ({error}); earlier checkpoints are intact, and the same command resumes "
            "from the newest"
        ) from error
    except RuntimeError as error:
        if "DataLoader worker" in str(error):  # torch raises it wherever the trainer is when a worker dies
            raise worker_failure(error) from error
        if not is_distributed_launch() or not (isinstance(error, DistError) or "gloo" in str(error)):
            raise
        # The first sentence, without the place in gloo's source that it begins with.
        reason = re.sub(r"^\[\S+\] ", "", str(error).partition("\n")[0]).partition(". ")[0]
        raise TrainingError(
            f"another process of this run has ended or does not respond ({reason}); the same command resumes from the "
            "newest checkpoint"
        ) from error
