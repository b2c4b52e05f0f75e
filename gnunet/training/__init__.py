"""Training: the loop, checkpoints, the moving average, progress."""

from gnunet.distributed.launch import spread_over_cpus
from gnunet.training.trainer import fit

__all__ = ["fit", "spread_over_cpus"]
