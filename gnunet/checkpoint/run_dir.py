"""A run's directory: its paths and logs, the lock that one trainer holds, and the configuration it belongs to."""

import json
import os
import shutil
import socket
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gnunet.checkpoint.jsonl import JsonlLogger
from gnunet.config import Config, changed_keys, from_yaml, to_yaml
from gnunet.config.yaml_io import format_value
from gnunet.errors import CheckpointError, ConfigError, GnunetError, expand
from gnunet.files import atomic_write
from gnunet.models.autoencoder import Autoencoder, load_autoencoder
from gnunet.safe_io import MAX_YAML_BYTES, read_text

KEYS_ALLOWED_TO_CHANGE = (
    "run_dir", "data.source", "data.split", "data.image_column", "data.label_column", "data.subset", "data.on_error",
    "data.num_workers", "data.cache_dir", "data.autoencoder", "model.activation_checkpointing",
    "train.micro_batch_size", "train.cuda_graph", "train.total_images", "train.log_every", "train.validate_every",
    "train.sample_every", "train.checkpoint_every", "train.ema_snapshot_every", "train.keep_checkpoints",
    "train.max_nonfinite_steps", "train.timeout", "train.trackers", "validation.batch_size",
)  # fmt: skip
"""Keys that may differ when a run is resumed: they affect paths, speed, memory, the run's length and when things are
written, not what is computed. Those that say where the images are may, because a checkpoint's fingerprint says which
they are."""
KEYS_RECORDED = (
    "train.learning_rate", "train.lr_schedule", "train.lr_decay_start", "train.warmup_images", "evaluate.", "sampling.",
)  # fmt: skip
"""Keys, or sections, that may differ too, and whose changes the run's history has: they affect what is computed."""
FOLDERS = ("checkpoints", "samples", "model", "autoencoder", "ema")
FILES = (
    "config.yaml", "data.json", "metrics.jsonl", "timing.jsonl", "curves.png", "wandb_id", ".lock", "checkpoints/best",
)  # fmt: skip


class RunLock:
    """An exclusive lock on an existing directory, freed even if its process is killed; children do not inherit it.

    `key` is the key or the flag that chose the directory, for errors.
    """

    def __init__(self, folder: Path, key: str = "run_dir") -> None:
        self.path, self.key = folder / ".lock", key
        # Without flock, filelock would fall back to a lock file that survives a killed process.
        self._lock = FileLock(self.path, timeout=0, fallback_to_soft=False)

    def acquire(self) -> None:
        """Take the lock, or raise ConfigError naming the host and process that holds it, and since when."""
        folder = self.path.parent
        try:
            self._lock.acquire()
        except Timeout:
            raise ConfigError(
                f"{self.key}: {folder} is in use by {self._owner()}; wait for it, or choose another {self.key}"
            ) from None
        except OSError as error:
            raise ConfigError(f"{self.key}: {folder} cannot be locked: {error.strerror}") from None
        since = datetime.now().isoformat(" ", "seconds")
        self.path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}))

    def release(self) -> None:
        """Release the lock and remove its file, if this object holds it."""
        if self._lock.is_locked:
            self.path.unlink(missing_ok=True)
            self._lock.release()

    def _owner(self) -> str:
        try:
            owner = json.loads(self.path.read_text())
            return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
        except (OSError, ValueError, KeyError, TypeError):  # it has not written them yet
            return "another process"


def recorded_changes(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """The keys that a resumed run changes and that affect what it computes, each with both values."""
    keys = KEYS_RECORDED
    follows_length = getattr(after.model.norm, "renorm_warmup", 0) is None
    if follows_length or {before.train.lr_schedule, after.train.lr_schedule} & {"linear", "cosine"}:
        keys = (*keys, "train.total_images")
    return {key: values for key, values in changed_keys(before, after).items() if key.startswith(keys)}


class RunDir:
    """Paths, logs and lock of the run in `config.run_dir`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.path = expand(config.run_dir)
        self.config_file = self.path / "config.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.model = self.path / "model"
        self.autoencoder = self.path / "autoencoder"
        self.ema = self.path / "ema"
        self.curves = self.path / "curves.png"
        self.wandb_id = self.path / "wandb_id"
        self.metrics = JsonlLogger(self.path / "metrics.jsonl")
        self.timing = JsonlLogger(self.path / "timing.jsonl")
        self.lock = RunLock(self.path)

    def check(self) -> None:
        """Check that the directory is new or holds a run of the same configuration. Writes nothing.

        Where a key is null whose default was a number when the run began, `config` gets that number.

        Raises:
            ConfigError: names the keys that differ.
            CheckpointError: it has checkpoints but no config.yaml, a symbolic link, something other than a file or
                directory where a run has one, such as a pipe, or a model that is not an export of gnunet.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"run_dir: {self.path} is a file; valid: a directory, new or of this run")
        for entry in chain(self.path.iterdir(), self.autoencoder.rglob("*")) if self.path.exists() else ():
            if entry.is_symlink():  # through which a run that somebody else prepared could write elsewhere
                raise CheckpointError(f"{entry} is a link; valid: regular files and directories, or a link to the run")
        for name in (*FOLDERS, *FILES):
            entry, kind = self.path / name, "directory" if name in FOLDERS else "regular file"
            if entry.exists() and not (entry.is_dir() if name in FOLDERS else entry.is_file()):
                raise CheckpointError(f"{entry} is not a {kind}; valid: a {kind} of a run, or none; or another run_dir")
        exported = [name for name in ("model_index.json", "unet", "scheduler") if (self.model / name).exists()]
        if exported and not (self.model / "gnunet.json").is_file():
            given = f"{self.model} holds {', '.join(exported)} but no gnunet.json: it is not an export of gnunet"
            raise CheckpointError(f"{given}; valid: a model of the run, or none; or another run_dir")
        if not self.config_file.exists():
            if any(self.checkpoints.glob("*")):
                raise CheckpointError(f"{self.path} has checkpoints but no config.yaml; choose another run_dir")
            return
        saved = from_yaml(read_text(self.config_file, MAX_YAML_BYTES), str(self.config_file))
        former = getattr(saved.model.norm, "renorm_warmup", None)
        if former == 0 and getattr(self.config.model.norm, "renorm_warmup", former) is None:
            norm = self.config.model.norm.model_copy(update={"renorm_warmup": former})
            model = self.config.model.model_copy(update={"norm": norm})
            self.config = self.config.model_copy(update={"model": model})
        fixed = [
            f"{key}: {format_value(old)} -> {format_value(new)}"
            for key, (old, new) in changed_keys(saved, self.config).items()
            if key not in KEYS_ALLOWED_TO_CHANGE and not key.startswith(KEYS_RECORDED)
        ]
        if fixed:
            raise ConfigError(
                f"{self.path} holds a run of another configuration; these keys differ (run_dir -> now):\n  "
                + "\n  ".join(fixed)
                + "\nChoose another run_dir, or restore that configuration to resume."
            )

    def open(self) -> None:
        """Create the directory, lock it, save the configuration, and remove what a crash left partially written.

        Raises:
            ConfigError: the directory cannot be written, or another process trains in it; or as `check`.
            CheckpointError: as `check`.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock.acquire()
            self.check()  # again: another process may have been there since
            self.samples.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            if not self.config_file.exists():
                atomic_write(self.config_file, to_yaml(self.config))
        except OSError as error:
            raise ConfigError(f"run_dir: {self.path} cannot be written: {error.strerror}") from None
        replaced = self.model.with_name(f".{self.model.name}.removed")
        if replaced.is_dir() and not self.model.exists():  # with files of others, which an export keeps
            os.replace(replaced, self.model)
        for folder in (self.path, self.checkpoints, self.samples, self.ema):
            for leftover in (*folder.glob(".*.tmp"), *folder.glob(".*.removed")):
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink()

    def write_settings(self, data: dict[str, Any]) -> None:
        """Write config.yaml anew, and `data`, what the run trains on, to data.json."""
        atomic_write(self.config_file, to_yaml(self.config))
        atomic_write(self.path / "data.json", json.dumps(data, indent=1) + "\n")


def find_autoencoder(config: Config, path: Path | None = None, digest: str | None = None) -> Autoencoder | None:
    """The autoencoder of a run; None if it has none.

    It is the one that data.autoencoder names or, if that cannot be loaded, the run's own copy. With the `path` of a
    run's folder or a checkpoint, which may be untrusted, it is the copy or, for a checkpoint elsewhere, the folder that
    data.autoencoder names; CheckpointError unless it has the digest, if one is given.
    """
    if (given := config.data.autoencoder) is None:
        return None
    if path is None:
        try:
            return load_autoencoder(given)
        except GnunetError as error:
            if not (copy := expand(config.run_dir) / "autoencoder").is_dir():  # of a run that was moved
                raise ConfigError(f"data.autoencoder: {error}") from None
            return load_autoencoder(copy)
    folders = [path / "autoencoder", path.resolve().parent.parent / "autoencoder", expand(given)]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise CheckpointError(f"{path}: neither autoencoder/ in its run nor a folder {given} (data.autoencoder)")
    return load_autoencoder(folder, digest)
