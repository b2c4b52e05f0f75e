"""Training: the loop, checkpoints, the moving average, progress."""

from gnunet.distributed.launch import spawn_cpu_processes
from gnunet.training.trainer import StepInfo, fit

__all__ = ["StepInfo", "fit", "spawn_cpu_processes"]
