"""A run's folder: where its files are, and that it belongs to one configuration."""

import shutil
from pathlib import Path

from gnunet.checkpoint.jsonl import JsonlLogger
from gnunet.checkpoint.run_lock import RunLock
from gnunet.config import Config, differences, from_yaml, to_yaml
from gnunet.errors import CheckpointError, ConfigError
from gnunet.files import atomic_write
from gnunet.safe_io import YAML_BYTES, read_text

KEYS_ALLOWED_TO_CHANGE = (
    "run_dir", "data.num_workers", "data.cache_dir", "model.activation_checkpointing", "train.micro_batch_size",
    "train.cuda_graph", "train.keep_checkpoints", "train.max_nonfinite_steps", "train.timeout", "train.trackers",
)  # fmt: skip
"""Keys that may differ when a run is resumed: they say where and how fast, not what is computed."""


class RunDir:
    """Paths and logs of the run in `config.run_dir`."""

    def __init__(self, config: Config) -> None:
        self.path = Path(config.run_dir).expanduser()
        self.config_file = self.path / "config.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.model = self.path / "model"
        self.metrics = JsonlLogger(self.path / "metrics.jsonl")
        self.timing = JsonlLogger(self.path / "timing.jsonl")
        self.lock = RunLock(self.path)

    def check(self, config: Config) -> None:
        """Refuse a folder that holds a run of another configuration; writes nothing.

        Raises:
            ConfigError: naming the keys that differ.
            CheckpointError: the folder has checkpoints but no config.yaml, or a link, through which a run that a
                stranger prepared would write elsewhere.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"run_dir: {self.path} is a file; valid: a folder, new or of this run")
        for entry in self.path.iterdir() if self.path.exists() else ():
            if entry.is_symlink():
                raise CheckpointError(
                    f"{entry} is a link; valid: files and folders of its own, or a link to the whole run"
                )
        if not self.config_file.exists():
            if any(self.checkpoints.glob("*")):
                raise CheckpointError(f"{self.path} has checkpoints but no config.yaml; choose another run_dir")
            return
        found = from_yaml(read_text(self.config_file, YAML_BYTES), str(self.config_file))
        changed = [line for line in differences(found, config) if line.split(":")[0] not in KEYS_ALLOWED_TO_CHANGE]
        if changed:
            raise ConfigError(
                f"{self.path} holds a run of another configuration; these keys differ (run folder -> now):\n  "
                + "\n  ".join(changed)
                + "\nChoose another run_dir, or go back to that configuration to resume."
            )

    def open(self, config: Config) -> None:
        """Make the folder, lock it, record the configuration in it, and clear away what a crash left half written.

        Raises:
            ConfigError: the folder cannot be written, or another process trains in it.
            GnunetError: see `check`; another process may have been there since.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock.acquire()
            self.check(config)
            self.samples.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            if not self.config_file.exists():
                atomic_write(self.config_file, to_yaml(config))
        except OSError as error:
            raise ConfigError(f"run_dir: {self.path} cannot be written: {error.strerror}") from None
        for folder in (self.path, self.checkpoints, self.samples):
            for leftover in (*folder.glob(".*.tmp"), *folder.glob(".*.removed")):
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink()
