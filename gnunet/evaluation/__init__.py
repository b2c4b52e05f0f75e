"""How good a model is."""

from gnunet.evaluation.validation import ValidationResult, validation_loss

__all__ = ["ValidationResult", "validation_loss"]
