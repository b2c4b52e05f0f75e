"""What a run logs: the sums of its steps, what is due when, and messages."""

import math
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from gnunet.checkpoint.checkpoint import TrainState
from gnunet.config import Config
from gnunet.errors import DivergenceError
from gnunet.training.lr_schedule import learning_rate
from gnunet.training.progress import Display
from gnunet.training.session import Session

MAX_NAMED_EXAMPLES = 64  # examples with a non-finite loss that the log names between two lines, at most

MAX_CPU_WORK = 10**12  # parameters times images that take hours on a CPU at 32x32 pixels


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, the same on every rank."""

    images: int  # images seen, including those of this step
    loss: float  # mean loss over the global batch
    grad_norm: float  # global norm of the gradients before clipping
    finite: bool  # whether both are finite; otherwise weights and EMA are unchanged
    overflow: bool  # not finite only because the fp16 gradient scale is still being searched
    nonfinite_examples: tuple[int, ...]
    """The examples whose own loss is not finite, in order; empty if only a gradient is not."""
    stop: bool  # some rank was asked to stop

    @classmethod
    def from_totals(
        cls, session: Session, images: int, losses: list[tuple[Tensor, Tensor]], totals: list[float]
    ) -> "StepResult":
        """From the sums over all ranks of losses, gradient norm and stop requests; all ranks call this.

        `losses` are indices and losses of this rank's examples, each (N,), by micro-batch.
        """
        accelerator, scaler = session.accelerator, session.accelerator.scaler
        loss, grad_norm = totals[0] / session.config.train.batch_size, totals[1] / accelerator.num_processes
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        overflow = scaler is not None and not finite and math.isfinite(loss) and scaler.get_scale() > 1
        nonfinite: list[int] = []
        if not math.isfinite(loss):
            marked = [torch.where(x.isfinite(), -1, index.to(x.device)) for index, x in losses]
            nonfinite = sorted(index for index in accelerator.gather(torch.cat(marked)).tolist() if index >= 0)
        return cls(images, loss, grad_norm, finite, overflow, tuple(nonfinite), stop=totals[2] > 0)


def cpu_warning(session: Session) -> str | None:
    """What makes a run slow on a CPU; None on a GPU and for a run that takes minutes."""
    parameters = sum(parameter.numel() for parameter in session.unet.parameters())
    is_bf16 = session.config.train.mixed_precision == "bf16"
    if session.accelerator.device.type != "cpu" or not (is_bf16 or parameters * session.total_images > MAX_CPU_WORK):
        return None
    precision = " in bf16, which CPUs without bf16 instructions emulate (train.mixed_precision no)" if is_bf16 else ""
    return (
        f"training on the CPU{precision}: {session.total_images} images, {parameters / 1e6:.1f} million parameters; "
        "configs/folder_small.yaml is made for a CPU"
    )


def count_step(session: Session, state: TrainState, result: StepResult, display: Display) -> None:
    """Add a step to the sums of the next log line; DivergenceError after too many non-finite ones in a row."""
    if result.finite:
        state.loss_sum += result.loss
        state.grad_norm_sum += result.grad_norm
        state.steps += 1
        state.nonfinite_in_a_row = 0
    display.step(result.images, state.loss_sum / state.steps if state.steps else None)
    if result.finite:
        return
    state.nonfinite += 1
    state.nonfinite_in_a_row += not result.overflow
    state.nonfinite_examples = [*state.nonfinite_examples, *result.nonfinite_examples][:MAX_NAMED_EXAMPLES]
    display.message(skipped_step_message(session, result))
    if state.nonfinite_in_a_row >= session.config.train.max_nonfinite_steps:
        raise DivergenceError(
            f"{state.nonfinite_in_a_row} steps in a row had a non-finite loss or gradient, the last at "
            f"{result.images} images; they changed no weights. Lower train.learning_rate, set train.mixed_precision "
            "to no, or raise train.max_nonfinite_steps, in a new run_dir.",
            images=result.images,
            nonfinite=state.nonfinite,
        )


def skipped_step_message(session: Session, result: StepResult) -> str:
    """The log's message about a step that was not finite."""
    text = (
        f"skipped the step over examples {result.images - session.config.train.batch_size} to {result.images - 1}: "
        f"loss {result.loss}, gradient norm {result.grad_norm}"
    )
    if named := result.nonfinite_examples[:MAX_NAMED_EXAMPLES]:
        rows = session.train_set.image_rows(named)
        text += "; not finite: " + ", ".join(f"{i} (image {row})" for i, row in zip(named, rows, strict=True))
        if more := len(result.nonfinite_examples) - len(named):
            text += f" and {more} more"
    return text


def training_metrics(session: Session, state: TrainState) -> tuple[dict, dict[str, str]]:
    """The means since the last log line, for metrics.jsonl and for the terminal; begins the next sums."""
    record = {
        "images": state.images,
        "loss": state.loss_sum / state.steps,
        "learning_rate": learning_rate(session.config.train, state.images),
        "grad_norm": state.grad_norm_sum / state.steps,
        "nonfinite": state.nonfinite,
    }
    line = {
        "loss": f"{record['loss']:.5f}",
        "lr": f"{record['learning_rate']:.2e}",
        "grad": f"{record['grad_norm']:.3f}",
    }
    if state.nonfinite_examples:
        record["nonfinite_examples"] = state.nonfinite_examples
    state.loss_sum, state.grad_norm_sum, state.steps, state.nonfinite_examples = 0.0, 0.0, 0, []
    return record, line


def due_tasks(config: Config, state: TrainState, total: int) -> set[str]:
    """What is due at `state.images` and not yet reported: each every N images; only at the end of the run if N is 0."""
    every = {
        "log": config.train.log_every,
        "validate": config.train.validate_every,
        "sample": config.train.sample_every,
        "evaluate": config.evaluate.every,
        "snapshot": config.train.ema_snapshot_every,
        "checkpoint": config.train.checkpoint_every,
    }
    if state.images == state.reported:
        return set()
    return {
        task
        for task, n in every.items()
        if n is not None and (state.images >= total or (n > 0 and state.images // n > state.reported // n))
    }


def memory_mib(device: torch.device) -> float:
    """Peak memory allocated on a GPU, or the process's resident memory, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return psutil.Process().memory_info().rss / 2**20
