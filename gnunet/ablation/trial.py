"""One trial: train it, measure it, write its record. A trial that was killed and resumed has the same record."""

import functools
import itertools
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState

from gnunet.ablation.bank import bank_name, bank_of
from gnunet.ablation.measure import activation_memory_mib, magnitudes, nearest, norm_kinds, step_cost, val_errors
from gnunet.ablation.plan import Trial
from gnunet.ablation.records import FORMAT, STATISTICS, bank_path, save_bank, write_record
from gnunet.checkpoint.checkpoint import checkpoint_name, load_checkpoint, newest_checkpoint
from gnunet.checkpoint.jsonl import read_jsonl
from gnunet.distributed.accelerator import close, fresh_accelerate_state, make_accelerator
from gnunet.distributed.launch import is_distributed_launch
from gnunet.environment import environment
from gnunet.errors import DivergenceError
from gnunet.files import atomic_write
from gnunet.training import fit
from gnunet.training.session import Session, build_session

_GROUP_NUMBERS = itertools.count()  # numbers of the process groups that this process has joined
CURVE = ("images", "loss", "grad_norm", "learning_rate")
VALIDATION = {"images": "images", "validation_loss": "validation_loss", "by_log_snr": "validation_loss_by_log_snr"}
"""A record's keys of what was validated -> those of metrics.jsonl."""
KEYS_NOT_RECORDED = {"run_dir": True, "data": {"cache_dir"}}  # keys that a record omits: locations of files
MEASUREMENTS = {"nearest": nearest, "magnitudes": magnitudes, "errors": val_errors, "saved_mib": activation_memory_mib}
"""In the order in which they are made: `val_errors` re-estimates the running statistics of the EMA weights."""


@fresh_accelerate_state()
def run_trial(trial: Trial, folder: Path) -> int:
    """Train a trial, resuming from its newest checkpoint if there is one, measure it, and write its record.

    A trial that diverges has a record too. All processes of a launch call this. Returns 0 when the record is written,
    128 + signal number when a signal stopped the training.
    """
    run = trial.run_dir(folder)
    config = trial.config.model_copy(update={"run_dir": str(run)})
    start = time.perf_counter()
    join_new_process_group()
    diverged: DivergenceError | None = None
    try:
        fit(config)
    except SystemExit as stopped:
        return stopped.code
    except DivergenceError as error:
        print(f"diverged: {error}")
        diverged = error.with_traceback(None)  # whose frames would keep the run's networks alive
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)  # MiB

    join_new_process_group()
    session = build_session(config, make_accelerator(config))
    history = training_history(run)
    ended = diverged or load_checkpoint(newest_checkpoint(run / "checkpoints"), session.models, session.strategy.adamw)
    is_complete = diverged is None and history["validation"][-1]["validation_loss"] is not None
    measured = {name: measure(session) if is_complete else None for name, measure in MEASUREMENTS.items()}
    measured["errors"] = measured["errors"] or dict.fromkeys(STATISTICS)
    cost = step_cost(session) if is_complete else None  # last, since it trains further
    record = {
        "format": FORMAT,
        "cell": trial.name,
        "config": config.model_dump(exclude=KEYS_NOT_RECORDED),
        "seed": config.seed,
        "outcome": "complete" if is_complete else "diverged",
        "diverged_at": diverged and diverged.images,
        "images": ended.images,
        "nonfinite_steps": ended.nonfinite,
        "parameters": sum(parameter.numel() for parameter in session.unet.parameters()),
        "norm_kinds": norm_kinds(session.unet.norm_layers().values()),
        "batch_dependent": bool(session.batch_norm_scope),
        "bank": {
            "fingerprint": session.val_set.fingerprint,
            "log_snr_edges": config.validation.bin_edges,
            "name": bank_name(session),
        },
        **history,
        **measured,
        "environment": environment(session.accelerator.device, session.accelerator.num_processes),
        "times": {
            **times(run),
            "peak_memory_mib": _peak_memory_mib(run, session, cost and cost.peak_memory_mib, peak),
            "norm_share": cost and cost.norm_share,
            "cell_seconds": round(time.perf_counter() - start, 3),
        },
    }
    if session.accelerator.is_main_process:
        if diverged is None:
            grid = run / "samples" / f"{checkpoint_name(ended.images)}.png"
            (folder / "samples").mkdir(parents=True, exist_ok=True)
            atomic_write(folder / "samples" / f"{trial.name}.png", grid.read_bytes())
        if not bank_path(folder, record["bank"]["name"]).exists():
            save_bank(folder, record["bank"]["name"], bank_of(session))
        write_record(folder, record)
    accelerator = session.accelerator
    accelerator.wait_for_everyone()
    del session
    close(accelerator)
    return 0


def training_history(run: Path) -> dict[str, Any]:
    """`curve`, `validation` and `metrics` of a record, from a run's metrics.jsonl."""
    lines = read_jsonl(run / "metrics.jsonl")
    evaluations = [line for line in lines if "evaluation_num_images" in line]
    metrics = evaluations[-1] if evaluations else {}
    return {
        "curve": [{key: line[key] for key in CURVE} for line in lines if "loss" in line],
        "validation": [
            {key: line[logged] for key, logged in VALIDATION.items()} for line in lines if "validation_loss" in line
        ],
        "metrics": {key: metrics[key] for key in metrics if key != "images" and not key.startswith("evaluation_")},
    }


def times(run: Path) -> dict[str, Any]:
    """Median `images_per_second`, `wall_seconds` and `seconds_at` of a run's training steps, over all interruptions.

    None and empty where nothing was timed.
    """
    lines = read_jsonl(run / "timing.jsonl")
    speeds = [line["images_per_second"] for line in lines if line["images_per_second"]]
    if not speeds:
        return {"images_per_second": None, "wall_seconds": None, "seconds_at": []}
    usual = statistics.median(speeds)
    images, seconds, seconds_at = 0, 0.0, []
    for line in lines:
        # A line after a stop may have no steps.
        seconds += (line["images"] - images) / (line["images_per_second"] or usual)
        images = line["images"]
        seconds_at.append([images, round(seconds, 3)])
    return {"images_per_second": usual, "wall_seconds": round(seconds, 3), "seconds_at": seconds_at}


def _peak_memory_mib(run: Path, session: Session, of_step: float | None, resident: float) -> float:
    """Peak memory: on a GPU of a step, including weights and optimizer; on a CPU of the process."""
    logged = [line["memory_mib"] for line in read_jsonl(run / "timing.jsonl")]
    if session.accelerator.device.type == "cpu":
        return max([resident, *logged])
    return max(logged, default=0.0) if of_step is None else of_step


def join_new_process_group() -> None:
    """In a launch, join a new process group with its other processes; an earlier run has ended the one before."""
    if not is_distributed_launch():
        return
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if dist.is_initialized():
        dist.destroy_process_group()
    store, rank, world_size = _rendezvous()
    on_cpus = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.cuda.is_available()
    # A new prefix, since the store keeps the addresses of earlier groups.
    store = dist.PrefixStore(f"run-{next(_GROUP_NUMBERS)}", store)
    dist.init_process_group("gloo" if on_cpus else "nccl", store=store, rank=rank, world_size=world_size)


@functools.cache
def _rendezvous() -> tuple[dist.Store, int, int]:
    """The store of a launch, this process's rank, and the world size."""
    return next(iter(dist.rendezvous("env://")))
