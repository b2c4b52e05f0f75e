"""When a run resumes, and what it writes with each checkpoint."""

import os
import secrets
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gnunet.checkpoint.checkpoint import (
    TrainState,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    open_tensors,
    optimizer_tensors,
    prune_checkpoints,
    read_state,
    save_checkpoint,
)
from gnunet.checkpoint.export import export_model, exported_images
from gnunet.checkpoint.model_card import CARD
from gnunet.checkpoint.run_dir import RunDir, recorded_changes
from gnunet.checkpoint.sharded_tensors import POWER_EMAS
from gnunet.config import from_yaml, to_yaml
from gnunet.config.yaml_io import format_value
from gnunet.distributed.accelerator import run_on_all_ranks, run_on_main_rank
from gnunet.distributed.fsdp import to_local
from gnunet.errors import CheckpointError, ConfigError, DataError, DivergenceError
from gnunet.files import atomic_directory, atomic_rmtree, atomic_write
from gnunet.models import UNet2D
from gnunet.safe_io import MAX_YAML_BYTES, read_text
from gnunet.training.curves import draw_curves
from gnunet.training.init_from import load_initial_weights
from gnunet.training.session import Session


def resume_or_start(session: Session, run: RunDir) -> tuple[TrainState, str | None]:
    """Open the run's folder and load its newest checkpoint, if any, or else train.init_from, into `session`; returns
    the state, and what was loaded and changed as a line for the terminal.

    Raises:
        CheckpointError, ConfigError, DataError: the folder or the checkpoint cannot be used, or would now be trained
            on other images or with other normalization batches.
    """
    accelerator = session.accelerator
    init: dict[str, Any] = {}
    message: str | None = None
    if session.config.train.init_from and run_on_main_rank(accelerator, lambda: not list_checkpoints(run.checkpoints)):
        init, message = run_on_all_ranks(accelerator, partial(load_initial_weights, session))[0]
    run_on_main_rank(accelerator, run.open)
    state = TrainState(0, data=session.train_set.metadata, normalized_by=session.batch_norm_scope, init=init)
    if (checkpoint := newest_checkpoint(run.checkpoints)) is not None:
        check_same_run(read_state(checkpoint), session, checkpoint)
        state = load_checkpoint(checkpoint, session.models, session.strategy.adamw)
        if state.scaler and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state.scaler)
        # Compared with the checkpoint's, since run.config_file also has changes that were lost with later images.
        saved = from_yaml(read_text(checkpoint / "config.yaml", MAX_YAML_BYTES), str(checkpoint / "config.yaml"))
        changed = recorded_changes(saved, session.config)
        for key, (before, after) in changed.items():
            state.changes.append({"images": state.images, "key": key, "before": before, "after": after})
        lines = [f"{key} {format_value(before)} -> {format_value(after)}" for key, (before, after) in changed.items()]
        message = "; ".join([f"resuming {checkpoint}", *lines])
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        run.write_settings(session.data_summary[0])
        if session.autoencoder is not None and not run.autoencoder.exists():
            with atomic_directory(run.autoencoder) as temporary:
                session.autoencoder.model.save_pretrained(temporary)
        run.metrics.truncate_after(state.reported)
        run.timing.truncate_after(state.reported)
        for later in (path for path in list_checkpoints(run.ema) if int(path.name) > state.images):
            atomic_rmtree(later)
        if checkpoint is not None:  # what the run had still to do when it was killed after writing it
            prune_checkpoints(run.checkpoints, session.config.train.keep_checkpoints, state)
            draw_curves(run.metrics.path, run.curves)
            if exported_images(run.model) != state.images or not (run.model / CARD).exists():
                export(session, run, state, checkpoint)
    run_on_all_ranks(accelerator, partial(start_trackers, session, run, state))
    return state, message


def start_trackers(session: Session, run: RunDir, state: TrainState) -> None:
    """Start train.trackers; those of a resumed run continue what they have of it. All ranks call this."""
    accelerator, trackers = session.accelerator, session.config.train.trackers
    options: dict[str, dict[str, Any]] = {}
    if state.images:
        options["tensorboard"] = {"purge_step": state.reported + 1}  # what the run writes again
    if "wandb" in trackers and accelerator.is_main_process:
        if not run.wandb_id.exists():
            atomic_write(run.wandb_id, os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
        name = os.environ.get("WANDB_NAME") or run.path.resolve().name
        identifier = read_text(run.wandb_id, 256).strip()
        options["wandb"] = {"id": identifier, "resume": "allow", "name": name, "dir": str(run.path.resolve())}
    config = None if state.images else {"config": to_yaml(session.config)}
    try:
        if trackers:
            accelerator.init_trackers("gnunet", config=config, init_kwargs=options)
    except Exception as error:  # of any kind, as each tracker's library has its own
        raise ConfigError(f"train.trackers: given {', '.join(trackers)}: cannot be started: {error}") from error


def check_same_run(saved: TrainState, session: Session, checkpoint: Path) -> None:
    """Raise an error if the same configuration would now compute something else than before the checkpoint, or does
    not get to its number of images."""
    train = session.config.train
    if saved.images % train.batch_size:
        valid = f"a multiple of train.batch_size, {train.batch_size}"
        raise CheckpointError(f"{checkpoint}: has {saved.images} images; valid: {valid}")
    if saved.images > session.total_images:
        given = f"given {train.total_images}; {checkpoint} has seen {saved.images} images"
        raise ConfigError(f"train.total_images: {given}; valid: at least as many, or another run_dir")
    metadata = session.train_set.metadata
    if session.autoencoder is not None and saved.data.get("autoencoder") == session.autoencoder.earlier_digest:
        metadata |= {"autoencoder": session.autoencoder.earlier_digest}
    if saved.data.get("autoencoder") != metadata.get("autoencoder"):
        given = f"given {session.config.data.autoencoder}; {checkpoint} was trained with another, or another scaling"
        raise ConfigError(f"data.autoencoder: {given}; valid: the same, of which a run has a copy in autoencoder/")
    if saved.data != metadata:
        source = f"data.source {session.config.data.source}"
        raise DataError(f"{source}: these are not the images and classes that {checkpoint} was trained on")
    if train.ema_snapshot_every is not None and not any(checkpoint.glob("ema_*")):
        given = f"given {train.ema_snapshot_every}; {checkpoint} has none of the averages, which begin with a run"
        raise ConfigError(f"train.ema_snapshot_every: {given}; valid: null, or another run_dir")
    if saved.normalized_by != session.batch_norm_scope:
        before, now = (
            " and ".join(f"{name} {value}" for name, value in scope.items())
            for scope in (saved.normalized_by, session.batch_norm_scope)
        )
        raise ConfigError(
            f"model.norm: kind {session.config.model.norm.kind} normalizes by the batch: {checkpoint} was trained with "
            f"{before}, given {now}; valid: train.micro_batch_size and number of processes as before"
        )


def save(session: Session, run: RunDir, state: TrainState, *, with_model: bool = True) -> None:
    """Write a checkpoint and, if `with_model`, the exported model. Every rank raises the error of any."""
    check_finite(session, state)
    accelerator = session.accelerator
    state.scaler = {} if accelerator.scaler is None else accelerator.scaler.state_dict()
    models = {**session.models, "ema": session.ema_network}
    tensors = {kind: model.state_dict() for kind, model in models.items()}
    tensors["optimizer"] = optimizer_tensors(session.strategy.adamw.state_dict()["state"], session.unet)
    try:
        run_on_main_rank(accelerator, run.metrics.sync)
        checkpoint = save_checkpoint(
            run.checkpoints, tensors, state=state, config_text=to_yaml(session.config), accelerator=accelerator,
            sharded=session.strategy.state_is_sharded,
        )  # fmt: skip
    except OSError as error:
        raise CheckpointError(
            f"{run.checkpoints}: the checkpoint at {state.images} images cannot be written ({error}); "
            "earlier ones are intact, and the same command resumes from them"
        ) from None

    def prune_and_export() -> None:
        prune_checkpoints(run.checkpoints, session.config.train.keep_checkpoints, state)
        if with_model:
            draw_curves(run.metrics.path, run.curves)
            export(session, run, state, checkpoint)

    run_on_main_rank(accelerator, prune_and_export)


def save_snapshot(session: Session, run: RunDir, state: TrainState) -> None:
    """Write the power-function EMAs to RUN/ema/IMAGES/, parameters in float16."""
    check_finite(session, state)
    tensors = {kind: model.state_dict() for kind, model in session.models.items() if kind in POWER_EMAS}
    for kind, state_dict in tensors.items():
        state_dict |= {name: parameter.half() for name, parameter in session.models[kind].named_parameters()}
    save_checkpoint(
        run.ema, tensors, state=TrainState(state.images, data=state.data), config_text=to_yaml(session.config),
        accelerator=session.accelerator, sharded=session.strategy.state_is_sharded,
    )  # fmt: skip


def check_finite(session: Session, state: TrainState) -> None:
    """Raise DivergenceError on every rank if weights or EMA weights of any are not finite.

    Non-finite steps change no weights, so the cause is a faulty device or a layer that breaks its weights.
    """
    accelerator = session.accelerator
    tensors = [tensor for model in session.models.values() for tensor in model.parameters()]
    broken = ~torch.stack([to_local(tensor).isfinite().all() for tensor in tensors]).all()
    if ranks := accelerator.gather(broken.view(1)).nonzero().flatten().tolist():
        raise DivergenceError(
            f"weights are not finite at {state.images} images (processes: {', '.join(map(str, ranks))}); they were not "
            "saved, and the same command resumes from the newest checkpoint",
            images=state.images,
            nonfinite=state.nonfinite,
        )


def export(session: Session, run: RunDir, state: TrainState, checkpoint: Path) -> None:
    """Write the EMA weights to the run's model/; those of a sharded run are read from its checkpoint."""
    ema = session.ema.model
    if session.strategy.state_is_sharded:
        ema = UNet2D.from_config(session.unet.config).eval()
        open_tensors(checkpoint, "ema").read(ema.state_dict())
    export_model(run, ema, session.process, state)
