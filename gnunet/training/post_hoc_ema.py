"""EMAs of other widths after training, from a run's snapshots of two (train.ema_snapshot_every).

Post-hoc EMA of Karras et al., 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3.2.
The share of the network's weights at t images seen in a power-function EMA at T images seen, its profile, is
p(t) = (g + 1) t^g / T^(g + 1), where g is `power_exponent` of its relative width.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from gnunet.checkpoint.checkpoint import checkpoint_name, list_checkpoints, open_tensors, read_state, verify_checkpoint
from gnunet.checkpoint.export import export_model
from gnunet.checkpoint.run_dir import RunDir
from gnunet.checkpoint.sharded_tensors import POWER_EMAS
from gnunet.checkpoint.trained_model import load_from_checkpoint
from gnunet.errors import CheckpointError, ConfigError, expand
from gnunet.training.ema import power_exponent

MIN_STD, MAX_STD = 0.01, 0.28


def reconstruct(
    run: str | Path, std: float, *, images: int | None = None, out: str | Path | None = None
) -> tuple[Path, float]:
    """Write the EMA of a relative width of a run, which may be untrusted, as a diffusers folder.

    Args:
        run: the run's directory.
        std: the width, MIN_STD to MAX_STD.
        images: images seen at the EMA's end, by default those of the newest snapshot.
        out: the folder, by default RUN/ema/std-STD, or std-STD-IMAGES.

    Returns:
        The folder, and the relative error of the EMA's profile.

    Raises:
        ConfigError: an argument is out of range.
        CheckpointError: there are no snapshots, one is damaged, or `out` holds a model of others.
    """
    run = expand(run)
    if not (snapshots := {int(path.name): path for path in list_checkpoints(run / "ema") if int(path.name)}):
        raise CheckpointError(f"{run}: has no snapshots in ema/; valid: a run with train.ema_snapshot_every")
    first, last = min(snapshots), max(snapshots)
    end = last if images is None else images
    for name, value, low, high in (("std", std, MIN_STD, MAX_STD), ("images", end, first, last)):
        if not low <= value <= high:
            raise ConfigError(f"--{name}: given {value}; valid: at least {low} and at most {high}")
    name = f"std-{std:g}" if images is None else f"std-{std:g}-{checkpoint_name(images)}"
    folder = run / "ema" / name if out is None else expand(out)
    for path in snapshots.values():
        verify_checkpoint(path, tuple(POWER_EMAS))

    sources = [(kind, seen) for seen in snapshots for kind in POWER_EMAS]
    weights, error = solve_weights([(POWER_EMAS[kind], seen) for kind, seen in sources], (std, end))
    model = load_from_checkpoint(snapshots[last], sources[-1][0])
    tensors = model.network.state_dict()
    totals = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in tensors.items() if t.is_floating_point()}
    for (kind, seen), weight in zip(sources, weights, strict=True):
        reader = open_tensors(snapshots[seen], kind)
        reader.check(tensors)
        reader.read(tensors)
        for name, total in totals.items():
            total.add_(tensors[name], alpha=weight)
    for name, total in totals.items():
        # A variance may be below 0 by the error.
        tensors[name].copy_(total.clamp(min=0) if name.endswith("running_var") else total)
    state, target = read_state(snapshots[last]), RunDir(model.config.model_copy(update={"run_dir": str(run)}))
    state.images, target.model = end, folder
    target.check()  # that nothing is written through a link, or over a model of others
    export_model(target, model.network, model.process, state)
    return folder, error


def solve_weights(profiles: Sequence[tuple[float, int]], target: tuple[float, int]) -> tuple[list[float], float]:
    """The weights, which add up to 1, with which profiles, each of a width and its images seen, are closest to another
    one in the least squares; and the distance relative to its norm.

    The paper's add up to 1 only nearly, by which all parameters would be scaled.
    """
    stds, ends = np.array([*profiles, target], np.float64).T
    exponents, times = np.array([power_exponent(std) for std in stds]), ends / ends[-1]
    products = inner_product(exponents[:, None], times[:, None], exponents, times)
    system = np.ones((len(stds), len(stds)))  # with a Lagrange multiplier
    system[:-1, :-1], system[-1, -1] = products[:-1, :-1], 0.0
    solution = np.linalg.lstsq(system, np.append(products[:-1, -1], 1.0), rcond=None)[0]
    difference = np.append(solution[:-1], -1.0)
    return solution[:-1].tolist(), float(max(difference @ products @ difference / products[-1, -1], 0.0)) ** 0.5


def inner_product(g: np.ndarray, end: np.ndarray, h: np.ndarray, other_end: np.ndarray) -> np.ndarray:
    """The integral of the product of profiles of exponents g and h and their ends, which broadcast."""
    both = np.minimum(end, other_end)
    scale = (g + 1) * (h + 1) / (g + h + 1) / np.maximum(end, other_end)
    return scale * (both / end) ** g * (both / other_end) ** h
