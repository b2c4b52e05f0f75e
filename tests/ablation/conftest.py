"""Made-up studies whose records look like real ones, without a training run."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gnunet.ablation.plan import Plan, Trial, make_plan
from gnunet.ablation.study import Study, load_study
from gnunet.diffusion import encode_png, make_grid
from gnunet.norms import NORMS

KINDS = list(NORMS)
BASE = """
base:
  data: {resolution: 16}
  model:
    block_out_channels: [8, 16]
    layers_per_block: 1
    down_block_types: [DownBlock2D, AttnDownBlock2D]
    up_block_types: [AttnUpBlock2D, UpBlock2D]
    norm: {groups: 4}
  train: {total_images: 2000, batch_size: 8}
  sampling: {num_images: 6}
"""
# The variants of a made-up study differ in a key unrelated to norms: the contents of their records are made up too.
VARIANTS = "\n".join(f"  {kind}: {{train.weight_decay: {i / 1000}}}" for i, kind in enumerate(KINDS))
KINDS_STUDY = f"""
title: Every kind of normalization
question: Which normalization layer gives the lowest denoising loss at a fixed number of images?
{BASE}
budgets: {{h100: {{train.total_images: 9000}}, cpu: {{}}}}
seeds: [0, 1, 2]
baseline: group
variants:
{VARIANTS}
hypotheses:
  - claim: Without normalization the loss is higher
    source: Wu & He (2018)
    comparisons: [{{left: {{variant: none}}, expect: higher, right: {{variant: group}}}}]
  - claim: Subtracting the mean is not needed
    margin: 0.02
    comparisons: [{{left: {{variant: group_rms}}, expect: same, right: {{variant: group}}}}]
  - claim: Position-wise and whole-image statistics train equally fast <b>& well</b> | or not
    metric: images_per_second
    margin: 0.05
    comparisons: [{{left: {{variant: rms}}, expect: same, right: {{variant: layer}}}}]
"""
BATCHES = "\n".join(f"      {2**i}: {{train.adam_beta1: {0.8 + i / 100}}}" for i in range(7))
BATCH_STUDY = f"""
title: Normalization and the batch it sees
question: How does the loss depend on the number of images that batch statistics are taken over?
{BASE}
seeds: [0, 1, 2]
baseline: group
variants:
  group: {{set: {{train.weight_decay: 0.0}}, axes: []}}
  layer: {{set: {{train.weight_decay: 0.01}}, axes: []}}
  instance: {{set: {{train.weight_decay: 0.02}}, axes: []}}
  rms: {{set: {{train.weight_decay: 0.03}}, axes: []}}
  none: {{set: {{train.weight_decay: 0.04}}, axes: []}}
  batch: {{set: {{train.weight_decay: 0.05}}}}
  batch_renorm: {{set: {{train.weight_decay: 0.06}}}}
axes:
  batch:
    label: images per normalization batch
    scale: log
    values:
{BATCHES}
tuning: {{key: train.learning_rate, values: [5e-4, 1e-3, 2e-3, 4e-3], seeds: [100, 101]}}
hypotheses:
  - claim: Batch normalization degrades below 8 images
    source: Wu & He (2018), table 2
    margin: 0.01
    comparisons:
      - {{left: {{variant: batch, batch: 2}}, expect: higher, right: {{variant: batch, batch: 32}}}}
      - {{left: {{variant: batch, batch: 4}}, expect: higher, right: {{variant: batch, batch: 32}}}}
  - claim: Group normalization is no worse than batch normalization at 32 images
    comparisons: [{{left: {{variant: batch, batch: 32}}, expect: lower, right: {{variant: group}}}}]
"""

SMALL_STUDY = f"""
title: Two <variants>
question: Is b | c & d different?
{BASE}
seeds: [0, 1]
baseline: a
variants: {{a: {{set: {{}}, axes: []}}, b: {{train.weight_decay: 0.1}}}}
axes: {{size: {{label: how large, scale: log, values: {{1: {{train.adam_beta1: 0.8}}, 2: {{train.adam_beta1: 0.7}}}}}}}}
hypotheses:
  - claim: b is <worse> | here
    source: A & B
    margin: 0.01
    comparisons:
      - {{left: {{variant: b, size: 1}}, expect: higher, right: {{variant: a}}}}
      - {{left: {{variant: b, size: 2}}, expect: same, right: {{variant: a}}}}
"""

RATES = "\n".join(f"      {rate}: {{train.adam_beta1: {0.8 + i / 100}}}" for i, rate in enumerate((4e-3, 1e-3, 2e-3)))
EDGE_STUDY = f"""
title: Stability
question: Which learning rates train?
{BASE}
seeds: [0, 1, 2]
baseline: group
variants: {{group: {{}}, batch: {{train.weight_decay: 0.1}}}}
axes:
  rate:
    label: learning rate
    scale: log
    values:
{RATES}
hypotheses:
  - claim: Batch normalization bears twice the rate
    metric: stability_edge
    margin: 0.5
    comparisons: [{{left: {{variant: batch}}, expect: higher, right: {{variant: group}}}}]
"""

Effect = float | str
"""Relative difference of a trial's loss to the baseline's (from 2 on it is collapsed), or `diverged`, or `missing`."""
Made = tuple[Study, Plan, dict[str, dict[str, Any]], Path]
"""A study, its plan, records by the trials' names, and the folder of its samples: the arguments of Results."""


@pytest.fixture
def made_up(tmp_path: Path) -> Callable[[str, Callable[[Trial], Effect]], Made]:
    """`made_up(text, effect)`: a study of this text, with records of these effects."""
    return lambda text, effect: make_up(tmp_path, text, effect)


@pytest.fixture(scope="session")
def kinds_study(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """21 variants without axes; `none` diverges at two seeds of three, `pixel` has not run, `derf` has run once."""
    return make_up(tmp_path_factory.mktemp("kinds"), KINDS_STUDY, kinds_effect)


@pytest.fixture(scope="session")
def batch_study(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Seven variants, of which two cross an axis of batches; diverged and missing trials, tuning in part unfinished."""
    return make_up(tmp_path_factory.mktemp("batch"), BATCH_STUDY, batch_effect)


@pytest.fixture(scope="session")
def small_study() -> str:
    """The text of a study of two variants, `a`, the base, and `b` at two sizes, with two seeds."""
    return SMALL_STUDY


@pytest.fixture(scope="session")
def edge_study() -> str:
    """The text of a study of the stability edges of `group` and `batch` over three learning rates, with three seeds."""
    return EDGE_STUDY


def kinds_effect(trial: Trial) -> Effect:
    if trial.variant == "pixel" or (trial.variant == "derf" and trial.seed > 0):
        return "missing"
    if trial.variant == "none":
        return "diverged" if trial.seed < 2 else 0.4
    return 0.0 if trial.variant == "group" else 0.012 * (KINDS.index(trial.variant) * 7 % 11 - 4)


def batch_effect(trial: Trial) -> Effect:
    size = int(dict(trial.setting).get("batch", 8))
    if trial.tuned:
        if trial.variant == "batch_renorm" and size == 64:
            return "missing"
        return "diverged" if float(trial.tuned) > 0.003 and size < 4 else abs(np.log2(float(trial.tuned) / 1e-3)) / 10
    if trial.variant == "batch":
        if size == 1 or (size == 2 and trial.seed == 1):
            return "diverged"
        return "missing" if size == 16 and trial.seed == 2 else 0.6 / size - 0.02
    if trial.variant == "batch_renorm":
        return "missing" if size == 4 else 0.2 / size - 0.01
    return {"group": 0.0, "layer": 0.012, "instance": 0.06, "rms": 0.02, "none": 0.3}[trial.variant]


def make_up(folder: Path, text: str, effect: Callable[[Trial], Effect]) -> Made:
    path = folder / "study.yaml"
    path.write_text(text)
    study = load_study(path)
    records: dict[str, dict[str, Any]] = {}
    (folder / "samples").mkdir(exist_ok=True)
    for _ in range(2):  # what tuning chooses is known once its records are there
        plan = make_plan(study, path, records=records)
        for trial in [*plan.tuning_trials, *plan.trials]:
            if trial.name not in records and (found := effect(trial)) != "missing":
                records[trial.name] = make_record(trial, found)
                if not trial.tuned and found != "diverged":
                    draw_grid(folder / "samples" / f"{trial.name}.png", trial)
    return study, plan, records, folder


def make_record(trial: Trial, effect: Effect) -> dict[str, Any]:
    """A record of a trial whose loss differs from the baseline's by `effect`."""
    diverged = effect == "diverged"
    relative = 0.5 if diverged else float(effect)
    own = np.random.default_rng(int(hashlib.sha256(trial.name.encode()).hexdigest()[:8], 16))
    shared, retrained = np.random.default_rng(7), np.random.default_rng(trial.seed)
    bins = np.arange(64) % 8
    profile = (0.9 - 0.1 * bins) * np.exp(0.4 * shared.standard_normal(64))
    tilt = 1 + relative * (1 + 0.5 * np.cos(bins))
    noise = 1 + 0.004 * retrained.standard_normal() + 0.004 * own.standard_normal()
    errors = profile * tilt * noise * np.exp(0.02 * own.standard_normal(64))
    dependent = trial.variant in NORMS and NORMS[trial.variant].batch_dependent
    images = trial.config.train.total_images
    speed = (60 - 20 * relative) * (1 + 0.02 * own.standard_normal())
    seen = [images * i // 4 for i in range(1, 5)] if not diverged else [images // 4, images // 2]
    falling = [1 + 1.5 * np.exp(-3 * at / images) - 1.5 * np.exp(-3) for at in seen]
    edges = np.linspace(-8, 8, 9)
    regions = {"encoder": 1.0, "middle": 1.5, "decoder": 2.5, "out": 0.7}
    rms = {name: (scale * (1 + 0.1 * np.arange(8)) * (1 + relative)).tolist() for name, scale in regions.items()}
    return {
        "cell": trial.name,
        "config": trial.config.model_dump(exclude={"run_dir": True, "data": {"cache_dir"}}),
        "outcome": "diverged" if diverged else "complete",
        "diverged_at": images // 2 if diverged else None,
        "images": seen[-1],
        "nonfinite_steps": 10 if diverged else 0,
        "parameters": 123_456,
        "batch_dependent": dependent,
        "validation": [
            {"images": at, "validation_loss": float(f * errors.mean())} for at, f in zip(seen, falling, strict=True)
        ],
        "bank": {
            "fingerprint": "f" * 64, "log_snr_edges": edges.tolist(), "bins": bins.tolist(),
            "rows": (np.arange(64) % 32).tolist(), "log_snr": (bins * 2.0 - 7).tolist(),
            "density": np.exp(-((bins - 4.0) ** 2) / 8).tolist(), "factor": (1 + bins / 4).tolist(),
            "predictors": {
                name: (scale * profile).tolist()
                for name, scale in {"wiener": 0.8, "scalar": 2.5, "mean": 4.0, "identity": 9.0}.items()
            },
        },
        "errors": {
            "running": None if diverged else errors.tolist(),
            "precise": (errors * 0.97).tolist() if dependent and not diverged else None,
            "batch": (errors * 0.93).tolist() if dependent and not diverged else None,
        },
        "metrics": {} if diverged else {
            "kid_efficientnet_lite0": 0.9 * (1 + relative) * float(noise),
            "kid_efficientnet_lite0_standard_error": 0.02,
        },
        "nearest": None if diverged else {"extractor": "efficientnet_lite0", "distance_ratio": 2.4, "near_share": 0.0},
        "magnitudes": None if diverged else {
            "log_snr": ((edges[1:] + edges[:-1]) / 2).tolist(),
            "activation_rms": rms,
            "activation_max": {name: [8 * value for value in values] for name, values in rms.items()},
            "gradient_norm": (0.3 * (1 + relative) * np.exp(-0.2 * np.arange(8))).tolist(),
        },
        "saved_mib": None if diverged else 40.0 + 3 * len(trial.variant),
        "environment": {
            "commit": "0123456789abcdef0123456789abcdef01234567", "device": "cpu (2 threads)", "processes": 1,
            "threads": 2, "torch": "2.13.0", "triton": None,
        },
        "times": {
            "wall_seconds": seen[-1] / speed,
            "images_per_second": speed,
            "peak_memory_mib": 900 + 10 * len(trial.variant) + own.standard_normal(),
            "norm_share": None if diverged else 0.05 + 0.01 * len(trial.variant),
            "seconds_at": [[at, at / speed] for at in seen],
        },
    }  # fmt: skip


def draw_grid(path: Path, trial: Trial) -> None:
    """A grid of six 16 x 16 tiles of one colour each, in three columns; some enlarged, with their places."""
    rng = np.random.default_rng(trial.seed)
    if int(trial.name, 16) % 2:
        tiles = np.broadcast_to(rng.integers(0, 256, (6, 1, 1, 3)).astype(np.uint8), (6, 16, 16, 3))
        path.write_bytes(encode_png(make_grid(tiles, scale=2, names=list("bababb"))))
        return
    canvas = np.full((2 * 18 - 2, 3 * 18 - 2, 3), 208, np.uint8)
    for i in range(6):
        top, left = i // 3 * 18, i % 3 * 18
        canvas[top : top + 16, left : left + 16] = rng.integers(0, 256, 3)
    Image.fromarray(canvas).save(path)
