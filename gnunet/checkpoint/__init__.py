"""A run's directory and its lock, checkpoints written atomically, trained models loaded from them, and exports."""

from gnunet.checkpoint.checkpoint import TrainState, load_checkpoint, newest_checkpoint, save_checkpoint
from gnunet.checkpoint.export import export_model
from gnunet.checkpoint.run_dir import RunDir
from gnunet.checkpoint.trained_model import TrainedModel, load_trained_model

__all__ = [
    "RunDir",
    "TrainState",
    "TrainedModel",
    "export_model",
    "load_checkpoint",
    "load_trained_model",
    "newest_checkpoint",
    "save_checkpoint",
]
