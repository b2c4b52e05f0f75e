"""Learning rate as a pure function of images seen."""

import math

from gnunet.config import TrainConfig


def learning_rate(train: TrainConfig, images: float) -> float:
    """The learning rate after `images` images.

    Linear warm-up from 0 to `learning_rate` over `warmup_images`, then `lr_schedule`: constant; linear or cosine
    to 0 at `train.total_images`; or `1 / sqrt(images)` from `lr_decay_start` on (Karras et al., 2024, EDM2).
    """
    warmup = min(images / train.warmup_images, 1.0) if train.warmup_images else 1.0
    tail = max(train.total_images - train.warmup_images, 1)
    done = min(max(images - train.warmup_images, 0) / tail, 1.0)
    match train.lr_schedule:
        case "constant":
            decay = 1.0
        case "linear":
            decay = 1.0 - done
        case "cosine":
            decay = 0.5 * (1.0 + math.cos(math.pi * done))
        case "inverse_sqrt":
            start = max(train.lr_decay_start or train.warmup_images, 1)
            decay = math.sqrt(start / max(images, start))
    return train.learning_rate * warmup * decay
