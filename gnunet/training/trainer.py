"""The training loop: one linear function over examples 0, 1, 2, ... of a run."""

import errno
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from gnunet.checkpoint.checkpoint import (
    TrainState,
    load_checkpoint,
    load_weights,
    newest_checkpoint,
    read_state,
    rotate_checkpoints,
    save_checkpoint,
    write_best_pointer,
)
from gnunet.checkpoint.export import export_model, exported_images
from gnunet.checkpoint.run_dir import RunDir
from gnunet.config import Config, to_yaml
from gnunet.distributed.accelerator import close, keep_freed_memory, make_accelerator
from gnunet.distributed.collectives import run_on_main_rank
from gnunet.distributed.fsdp import to_local
from gnunet.distributed.signals import StopRequested, StopSignal
from gnunet.errors import CheckpointError, ConfigError, DataError, DivergenceError, TrainingError
from gnunet.evaluation import validation_loss
from gnunet.models import UNet2D
from gnunet.processes import Processes
from gnunet.training.evaluation import (
    check_enough_images,
    check_extractors,
    evaluate,
    format_scores,
    sample_grid,
    save_grid,
    update_best,
)
from gnunet.training.lr_schedule import learning_rate
from gnunet.training.messages import NAMED_EXAMPLES, is_lost_process, lost_words, shown, skipped
from gnunet.training.progress import Display
from gnunet.training.session import Session, Step, build_session

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""What the system says of a disk that is full or broken."""


@dataclass(frozen=True)
class StepInfo:
    """What a callback of `fit` receives after each optimizer step."""

    images: int
    """Images seen, including those of this step."""
    total_images: int
    """Images seen when the run ends."""
    loss: float | None
    """The newest loss that the host has read, averaged over the global batch. With CUDA graphs on a GPU, which results
    are copied from while the next step runs, it is that of the step before; None after the first step."""
    session: Session
    """Network, EMA weights, optimizer and data of the run."""


Callback = Callable[[StepInfo], None]


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
        SystemExit: SIGINT or SIGTERM stopped the run after a checkpoint was written; the code is 128 + signal number.
    """
    keep_freed_memory()
    # The run's folder is checked before anything is built, and written only once everything is.
    accelerator = make_accelerator(config)
    run = RunDir(config)
    run.check(config)
    try:
        signum = train_in(run, config, accelerator, callback)
        close(accelerator)  # here, where no network of train_in is left
        if signum is not None:
            raise SystemExit(128 + signum)
        return run.path
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in DISK_ERRORS:
            raise
        raise TrainingError(
            f"{run.path}: cannot be written ({error}); its checkpoints are as they were, and the same command goes on "
            "from the newest when it can"
        ) from error
    except RuntimeError as error:
        if not is_lost_process(error, accelerator):
            raise
        raise TrainingError(
            f"another process of this run has ended or does not answer ({lost_words(error)}); the same command goes on "
            "from the newest checkpoint"
        ) from error
    finally:
        run.lock.release()


def train_in(run: RunDir, config: Config, accelerator: Accelerator, callback: Callback | None) -> int | None:
    """Train in a folder that may hold the run of this configuration; returns the signal that stopped it, if any."""
    train = config.train
    check_extractors(config.evaluate)
    session = build_session(config, accelerator)
    check_enough_images(session)
    run_on_main_rank(accelerator, lambda: run.open(config))
    state = TrainState(data=session.data, normalized_by=session.batch_norm_scope)
    if (checkpoint := newest_checkpoint(run.checkpoints)) is not None:
        check_same_run(read_state(checkpoint), session, checkpoint)
        state = load_checkpoint(checkpoint, model=session.unet, ema=session.ema.model, optimizer=session.strategy.adamw)
        if state.scaler and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state.scaler)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        run.metrics.truncate_after(state.reported)
        run.timing.truncate_after(state.reported)
        if checkpoint is not None:
            # What the run had still to do when it ended just behind its checkpoint.
            prune_checkpoints(run, config, state)
            if exported_images(run.model) != state.images:
                export(session, run, state, checkpoint)
    if train.trackers:
        accelerator.init_trackers("gnunet", config={"config": to_yaml(config)})

    total = session.total_images
    batches = session.batches(state.images)
    stop = StopSignal()
    display = Display(images=state.images, total=total, run_dir=config.run_dir, enabled=accelerator.is_main_process)
    unread: deque[tuple[int, Step]] = deque()  # steps whose results are not read yet, and the images seen behind each
    last_loss: float | None = None
    seconds, timed_images = 0.0, 0  # of the steps since the last log line
    with stop, display:
        if checkpoint is not None:
            display.message(f"resuming {checkpoint}")
        while True:
            # What is due at this number of images; all of it is computed before any is written, since a signal
            # breaks it off, and the resumed run computes it anew.
            finished = state.images >= total
            checkpoint_due = is_due(train.checkpoint_every, state, finished)
            scores = validation = grid = None
            try:
                if is_due(config.evaluate.every, state, finished):
                    scores = evaluate(session, state.images, stop=stop, display=display)
                if is_due(train.validate_every, state, finished):
                    display.doing("validating")
                    validation = validate(session, state.images, stop)
                if is_due(train.sample_every, state, finished):
                    display.doing("sampling")
                    grid = sample_grid(session, partial(stop.check, accelerator))
            except StopRequested:
                return end_stopped(session, run, state, stop, display)
            if is_due(train.log_every, state, finished) and state.steps:
                values = {
                    "images": state.images,
                    "loss": state.loss_sum / state.steps,
                    "learning_rate": learning_rate(train, state.images),
                    "grad_norm": state.grad_norm_sum / state.steps,
                    "nonfinite": state.nonfinite,
                }
                speed = {
                    "images": state.images,
                    "images_per_second": timed_images / seconds if seconds else None,
                    "memory_mib": memory_mib(accelerator.device),
                }
                named = {"nonfinite_examples": state.nonfinite_examples} if state.nonfinite_examples else {}
                state.loss_sum, state.grad_norm_sum, state.steps, state.nonfinite_examples = 0.0, 0.0, 0, []
                seconds, timed_images = 0.0, 0
                if accelerator.is_main_process:
                    run.metrics.write({**values, **named})
                    run.timing.write(speed)
                accelerator.log({**values, **speed}, step=state.images)
                display.report(state.images, shown(values, speed))
            if validation is not None:
                if accelerator.is_main_process:
                    run.metrics.write(validation)
                accelerator.log({"validation_loss": validation["validation_loss"]}, step=state.images)
                checkpoint_due |= update_best(state, config.evaluate, validation)
                mean, error = validation["validation_loss"], validation["validation_loss_standard_error"]
                display.report(state.images, {"validation loss": f"{mean:.5f} (standard error {error:.5f})"})
            if grid is not None and accelerator.is_main_process:
                path = save_grid(run.samples, grid, state.images)
                display.report(state.images, {"samples": str(path)})
            if scores is not None:
                if accelerator.is_main_process:
                    run.metrics.write(scores)
                accelerator.log({key: scores[key] for key in scores if key != "images"}, step=state.images)
                checkpoint_due |= update_best(state, config.evaluate, scores)
                display.report(state.images, format_scores(scores, config.evaluate.metrics))
            state.reported = state.images
            if checkpoint_due:
                save(session, run, state)
            if finished:
                break

            # One step. Where its result is read late, it is that of the step before, while the device is at this one.
            display.doing("training")
            start = time.perf_counter()
            unread.append((state.images + train.batch_size, session.step(batches, state.images, stop=stop)))
            state.images += train.batch_size
            timed_images += train.batch_size
            stopped = False
            late = session.reads_late and not is_anything_due(config, state, total)
            while len(unread) > (late and not stopped):
                images, step = unread.popleft()
                result = step.wait()
                stopped |= result.stop
                if result.finite:
                    state.loss_sum += result.loss
                    state.grad_norm_sum += result.grad_norm
                    state.steps += 1
                    state.nonfinite_in_a_row = 0
                else:
                    state.nonfinite += 1
                    state.nonfinite_in_a_row += not result.overflow
                    state.nonfinite_examples = [*state.nonfinite_examples, *result.nonfinite_examples][:NAMED_EXAMPLES]
                    display.message(skipped(session, images, result))
                    if state.nonfinite_in_a_row >= train.max_nonfinite_steps:
                        raise DivergenceError(
                            f"{state.nonfinite_in_a_row} steps in a row had a non-finite loss or gradient, the last "
                            f"at {images} images; no weight was changed by them. Lower train.learning_rate, "
                            "set train.mixed_precision to no, or raise train.max_nonfinite_steps, in a new run_dir.",
                            images=images,
                            nonfinite=state.nonfinite,
                        )
                display.step(images, last_loss := result.loss)
            seconds += time.perf_counter() - start
            if callback is not None:
                callback(StepInfo(state.images, total, last_loss, session))
            if stopped:
                return end_stopped(session, run, state, stop, display)

    display.message(f"done: {state.images} images; samples in {run.samples}, model in {run.model}")
    return None


def check_same_run(saved: TrainState, session: Session, checkpoint: Path) -> None:
    """Refuse to go on from a checkpoint where the same configuration would now compute something else.

    Raises:
        DataError: the images are others.
        ConfigError: the norms depend on the batch, which is now split otherwise.
    """
    if saved.data != session.data:
        raise DataError(f"{session.config.data.source}: these are not the images that {checkpoint} was trained on")
    if saved.normalized_by != session.batch_norm_scope:
        before, now = (
            " and ".join(f"{name} {value}" for name, value in state.items())
            for state in (saved.normalized_by, session.batch_norm_scope)
        )
        raise ConfigError(
            f"model.norm: kind {session.config.model.norm.kind} normalizes by the batch at hand: {checkpoint} was "
            f"trained with {before}, now it would be {now}; valid: train.micro_batch_size and processes as before"
        )


def end_stopped(session: Session, run: RunDir, state: TrainState, stop: StopSignal, display: Display) -> int:
    """Write the checkpoint of a run that was asked to stop; returns the signal, the same on every process."""
    save(session, run, state, with_model=False)  # launchers kill soon after they signal
    display.message(f"stopped at {state.images} images, checkpoint written; the same command resumes the run")
    accelerator = session.accelerator
    signum = accelerator.gather(torch.tensor([stop.signum or 0], device=accelerator.device)).max().item()
    return signum or signal.SIGTERM


def is_due(every: int | None, state: TrainState, finished: bool) -> bool:
    """Whether something done `every` so many images (0: at the end only; None: never) is due since the last report."""
    if every is None or state.images == state.reported:
        return False
    return finished or (every > 0 and state.images // every > state.reported // every)


def is_anything_due(config: Config, state: TrainState, total: int) -> bool:
    """Whether there is anything to do at this number of images but the next step."""
    train = config.train
    every = (train.log_every, train.validate_every, train.sample_every, train.checkpoint_every, config.evaluate.every)
    return any(is_due(interval, state, state.images >= total) for interval in every)


def validate(session: Session, images: int, stop: StopSignal) -> dict[str, Any]:
    """The line of metrics.jsonl with the validation loss of the averaged weights.

    Raises:
        StopRequested: a stop was asked for meanwhile.
    """
    accelerator = session.accelerator
    result = validation_loss(
        session.ema_network, session.process, session.val_set, device=accelerator.device,
        batch_size=session.config.validation.batch_size, autocast=accelerator.autocast, 
        processes=Processes.of(accelerator),
        progress=lambda done: stop.check(accelerator),
    )  # fmt: skip
    return {
        "images": images,
        "validation_loss": result.mean,
        "validation_loss_standard_error": result.standard_error,
        "validation_loss_by_log_snr": result.bins,
        "validation_bank": session.val_set.fingerprint[:16],
    }


def save(session: Session, run: RunDir, state: TrainState, *, with_model: bool = True) -> None:
    """Write a checkpoint, and the exported model.

    Raises, on every process:
        CheckpointError: the disk refuses; earlier checkpoints are as they were.
        DivergenceError: see `check_finite`.
    """
    check_finite(session, state)
    accelerator = session.accelerator
    state.scaler = {} if accelerator.scaler is None else accelerator.scaler.state_dict()
    write = partial(
        save_checkpoint, run.checkpoints, model=session.unet, ema=session.ema_network,
        optimizer=session.strategy.adamw, state=state, config_text=to_yaml(session.config),
    )  # fmt: skip
    try:
        run_on_main_rank(accelerator, run.metrics.sync)
        checkpoint = (
            write(accelerator=accelerator)
            if session.strategy.state_is_sharded
            else run_on_main_rank(accelerator, write)
        )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{run.checkpoints}: the checkpoint at {state.images} images cannot be written ({error}); "
            "earlier ones are as they were, and the same command goes on from them"
        ) from None

    def follow() -> None:
        prune_checkpoints(run, session.config, state)
        if with_model:
            export(session, run, state, checkpoint)

    run_on_main_rank(accelerator, follow)


def check_finite(session: Session, state: TrainState) -> None:
    """Raise DivergenceError, on every process, where the weights of one or their average are not finite.

    Steps that are not finite change no weight, so that this is a device at fault or a layer that breaks its weights.
    """
    accelerator = session.accelerator
    tensors = [*session.unet.parameters(), *session.ema.model.parameters()]
    broken = ~torch.stack([to_local(tensor).isfinite().all() for tensor in tensors]).all()
    if ranks := accelerator.gather(broken.view(1)).nonzero().flatten().tolist():
        raise DivergenceError(
            f"weights are not finite at {state.images} images (processes: {', '.join(map(str, ranks))}); no checkpoint "
            "of them was written, and the same command goes on from the newest",
            images=state.images,
            nonfinite=state.nonfinite,
        )


def prune_checkpoints(run: RunDir, config: Config, state: TrainState) -> None:
    """Name the best checkpoint and remove those that are no longer kept, behind the one of `state`."""
    write_best_pointer(run.checkpoints, state.best)
    best = state.best.get("images")
    rotate_checkpoints(run.checkpoints, config.train.keep_checkpoints, newest=state.images, best=best)


def export(session: Session, run: RunDir, state: TrainState, checkpoint: Path) -> None:
    """Write the averaged weights to the run's model/; those of a sharded run are read from its checkpoint."""
    ema = session.ema.model
    if session.sharding is not None:
        ema = UNet2D.from_config(session.unet.config).eval()
        load_weights(checkpoint, "ema", ema)
    export_model(run.model, ema, session.process, images=state.images, data=session.data)


def memory_mib(device: torch.device) -> float:
    """Peak memory allocated on a GPU, or the process's resident memory, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return psutil.Process().memory_info().rss / 2**20
