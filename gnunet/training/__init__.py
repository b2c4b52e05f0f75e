"""Training: the loop, EMA, evaluation during training, progress."""

from gnunet.training.trainer import StepInfo, fit

__all__ = ["StepInfo", "fit"]
