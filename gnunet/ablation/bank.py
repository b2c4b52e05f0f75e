"""What all trials with one validation set share: its examples, their weights in training, and trivial predictors."""

import hashlib
import json
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gnunet.ablation.measure import rounded
from gnunet.data.dataset import channels_last
from gnunet.data.validation import ValidationSet
from gnunet.diffusion import Process
from gnunet.random_streams import Stream, StreamKey
from gnunet.training.session import Session

PREDICTORS = ("wiener", "scalar", "mean", "identity")
MAX_IMAGES, MAX_VALUES = 1024, 2**25
"""Training images whose mean and covariance trivial predictors know, from the first, and values in these."""
WINDOW = 0.25  # of log-SNR, to both sides, over which its density in training is averaged
GRID = 2**16  # noise levels that the density is counted on


def bank_of(session: Session) -> dict[str, Any]:
    """The validation set of a run: for each of its examples

    `bins`, `rows`, `log_snr`: the bin, the row of its image and the log-SNR.
    `density`, `factor`: the density of the log-SNR in training, and what the squared error of v is multiplied by in
        the loss of training.
    `predictors`: the squared errors of v of predictors that know of the training images no more than

        - `wiener`: their mean and covariance, by which they are the best linear predictor,
        - `scalar`: their mean and their variance, of all pixels,
        - `mean`: their mean, whatever the noisy image,
        - `identity`: nothing: the noisy image divided by alpha.
    """
    val_set, process = session.val_set, session.process
    density, factor = training_weights(process, val_set.log_snr)
    return {
        "bins": val_set.bins.tolist(),
        "rows": val_set.rows.tolist(),
        "log_snr": rounded(val_set.log_snr),
        "density": rounded(density),
        "factor": rounded(factor),
        "predictors": {
            name: rounded(errors) for name, errors in trivial_errors(training_images(session), process, val_set).items()
        },
    }


def bank_name(session: Session) -> str:
    """12 hex digits that the contents of `bank_of` are a function of, but not the run's seed."""
    data = session.train_set
    parts = (session.val_set.fingerprint, data.table.fingerprint, data.rows.tolist(), data.flip)
    text = json.dumps([*parts, session.config.diffusion.model_dump()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def training_weights(process: Process, log_snr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The density of each log-SNR in training, averaged over a window, and the factor between the squared error of v
    and the loss of training, both (n,)."""
    shares = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    levels = np.sort(process.noise_level(shares).log_snr.double().numpy())
    below = [np.searchsorted(levels, log_snr + reach) / GRID for reach in (WINDOW, -WINDOW)]
    level = process.from_log_snr(torch.from_numpy(log_snr))
    # A predicted x0 is linear in the output, and v's squared error is (1 + SNR) times that of x0.
    ones = torch.ones(len(log_snr), 1, 1, 1)
    slope = process.predict_x0(ones, 0 * ones, level).flatten().double()
    factor = level.weight.double() / (slope.square() * (1 + level.log_snr.double().exp()))
    return (below[0] - below[1]) / (2 * WINDOW), factor.numpy()


def training_images(session: Session) -> Tensor:
    """Training images as networks see them, with their mirror images where training mirrors them, float64
    (n, C, H, W)."""
    table = session.train_set.table
    rows = session.train_set.rows[: max(2, min(MAX_IMAGES, MAX_VALUES // math.prod(table.images.shape[1:])))]
    found = []
    for mirrored in [False, True][: 1 + session.train_set.flip]:
        drawn = map(Stream(0, StreamKey.LATENT).at, range(len(rows)))
        images, _ = table.examples(rows, drawn, np.full(len(rows), mirrored))
        found.append(table.to_network(channels_last(images)).double())
    return torch.cat(found)


def trivial_errors(images: Tensor, process: Process, val_set: ValidationSet) -> dict[str, np.ndarray]:
    """The squared error of v of each example of the validation set by each of PREDICTORS, (n,), from the training
    images (m, C, H, W). Along directions in which those do not vary, the covariance is 0."""
    flat = images.flatten(1)
    mean, deviations = flat.mean(0), flat - flat.mean(0)
    variances, directions = _principal_directions(deviations)
    scalar = variances.sum() / flat.shape[1]
    found: dict[str, list[Tensor]] = {name: [] for name in PREDICTORS}
    for start in range(0, len(val_set), 256):
        batch = val_set.batch(range(start, min(start + 256, len(val_set))))
        x0 = val_set.table.to_network(batch["images"]).double()
        level = process.from_log_snr(batch["log_snr"])
        x = process.add_noise(x0, batch["noise"].double(), level).flatten(1)
        alpha, sigma = level.alpha.double()[:, None], level.sigma.double()[:, None]
        centred = x - alpha * mean
        gains = alpha * variances / (alpha.square() * variances + sigma.square())
        estimates = {
            "wiener": mean + (centred @ directions.T * gains) @ directions,
            "scalar": mean + alpha * scalar / (alpha.square() * scalar + sigma.square()) * centred,
            "mean": mean.expand_as(x),
            "identity": x / alpha,
        }
        for name, estimate in estimates.items():
            error = (estimate - x0.flatten(1)).square().mean(1)
            found[name].append(error * (1 + level.log_snr.double().exp()))
    return {name: torch.cat(errors).numpy() for name, errors in found.items()}


def _principal_directions(deviations: Tensor) -> tuple[Tensor, Tensor]:
    """The variances (k,) of deviations (n, d) from their mean, above rounding, and their directions (k, d)."""
    n, d = deviations.shape
    by_image = n < d  # the smaller of two matrices that have the same eigenvalues
    matrix = deviations @ deviations.T if by_image else deviations.T @ deviations
    variances, vectors = torch.linalg.eigh(matrix / n)
    above = variances > variances.max() * 1e-12
    directions = vectors.T[above] @ deviations if by_image else vectors.T[above]
    return variances[above], torch.nn.functional.normalize(directions)
