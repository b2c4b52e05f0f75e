"""What a run says of itself in words."""

import re
from typing import Any

from accelerate import Accelerator
from torch.distributed import DistError

from gnunet.training.session import Session, StepResult

NAMED_EXAMPLES = 64
"""How many examples with a loss that is not finite are named, at most."""


def skipped(session: Session, images: int, result: StepResult) -> str:
    """What is said of a skipped step that ended at `images` images seen."""
    text = f"skipped the step over examples {images - session.config.train.batch_size} to {images - 1}: "
    text += f"loss {result.loss}, gradient norm {result.grad_norm}"
    if bad := result.nonfinite_examples[:NAMED_EXAMPLES]:
        rows = session.train_set.image_rows(bad)
        named = ", ".join(f"{example} (image {row})" for example, row in zip(bad, rows, strict=True))
        more = len(result.nonfinite_examples) - len(bad)
        text += f"; not finite of: {named}" + (f" and {more} more" if more else "")
    return text


def is_lost_process(error: RuntimeError, accelerator: Accelerator) -> bool:
    """Whether an error means that the processes have lost one another."""
    return accelerator.num_processes > 1 and (isinstance(error, DistError) or "gloo" in str(error))


def lost_words(error: RuntimeError) -> str:
    """The first sentence of such an error, without the place in gloo's source that it begins with."""
    return re.sub(r"^\[\S+\] ", "", str(error).partition("\n")[0]).partition(". ")[0]


def shown(values: dict[str, Any], speed: dict[str, Any]) -> dict[str, str]:
    """The values of a log line as a person reads them."""
    rate = speed["images_per_second"]
    return {
        "loss": f"{values['loss']:.5f}",
        "lr": f"{values['learning_rate']:.2e}",
        "grad": f"{values['grad_norm']:.3f}",
        "speed": f"{rate:.1f} images/s" if rate else "?",
        "memory": f"{speed['memory_mib']:.0f} MiB",
    }
