"""Trials of `task: classification`: a small residual classifier of labels, with the norms of a study.

What norms lose in classification is known, so that a study of it shows what these studies are able to see.
"""

import copy
import hashlib
import math
import time
import timeit
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnunet.ablation.measure import batch_dependent_layers, norm_kinds, rounded
from gnunet.ablation.plan import Trial
from gnunet.ablation.records import FORMAT, STATISTICS, bank_path, save_bank, write_record
from gnunet.ablation.trial import CURVE, KEYS_NOT_RECORDED, times, training_history
from gnunet.checkpoint.jsonl import JsonlLogger, read_jsonl
from gnunet.config import Config, unet_kwargs
from gnunet.data import TrainingDataset, ValidationSet
from gnunet.data.dataset import to_network
from gnunet.distributed.accelerator import fresh_accelerate_state, keep_freed_memory, make_accelerator
from gnunet.environment import activation_bytes, environment
from gnunet.errors import ConfigError
from gnunet.models.norm_sites import NormSite, NormSites
from gnunet.norms import force_weight_norm, make_conv, make_residual, update_bn_stats
from gnunet.training.ema import EMA, ema_decays
from gnunet.training.lr_schedule import learning_rate
from gnunet.training.optimizer import adamw_settings
from gnunet.training.run_log import memory_mib
from gnunet.training.session import load_run_data

STATISTICS_BATCHES = 32  # first batches of training, on which running statistics are re-estimated


class ResidualBlock(nn.Module):
    """The U-Net's ResnetBlock without a time embedding."""

    def __init__(self, site: NormSite, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = site.make_norm("norm1", in_channels)
        self.conv1 = make_conv(site.norm, in_channels, out_channels, 3, padding=1)
        self.norm2 = site.make_norm("norm2", out_channels)
        self.conv2 = make_conv(site.norm, out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else make_conv(site.norm, in_channels, out_channels, 1)
        self.residual = make_residual(site.norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(self.conv_shortcut(x), self.conv2(self.norm2(self.conv1(self.norm1(x)))))


class Classifier(nn.Module):
    """Images (N, C, H, W) -> logits (N, num_classes): the U-Net's encoder without attention, its last norm with SiLU,
    the mean over positions, and a linear layer.

    unet: arguments of UNet2D, of which in_channels, block_out_channels, layers_per_block and norm count, the last with
    overrides for `encoder`, `out` and heights.
    """

    def __init__(self, unet: Mapping[str, Any], num_classes: int) -> None:
        super().__init__()
        sites, channels = NormSites(unet), unet["block_out_channels"][0]
        self.layers = nn.Sequential(nn.Conv2d(unet["in_channels"], channels, 3, padding=1))
        for level, width in enumerate(unet["block_out_channels"]):
            site = sites.at(f"down_blocks.{level}", level)
            if level:
                self.layers.append(make_conv(site.norm, channels, channels, 3, stride=2, padding=1))
            for _ in range(unet["layers_per_block"]):
                self.layers.append(ResidualBlock(site, channels, width))
                channels = width
        self.layers.append(sites.at("conv_norm_out", 0).make_norm("", channels))
        sites.check_regions()
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.layers(x).mean((2, 3)))


class ClassifierRun:
    """The images and the parts of a run, whose configuration holds as for a U-Net, but in fp32 and by AdamW.

    It is scored on the held-out images, once each: on every third with `validation.draw` above 0, else on the others.
    """

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device, train, data = config, device, config.train, load_run_data(config)
        self.train_set = TrainingDataset(
            data.table, data.train_rows, seed=config.seed, flip=config.data.flip, class_conditional=True,
            augment=config.data.augment,
        )  # fmt: skip
        is_third = np.arange(len(data.validation_rows)) % 3 == 2
        rows = data.validation_rows[is_third == (config.validation.draw > 0)]
        self.val_set = ValidationSet(data.table, rows, num_examples=len(rows), num_bins=1, log_snr_min=0, log_snr_max=0)
        torch.manual_seed(config.seed)
        try:
            network = Classifier(unet_kwargs(config, None), self.train_set.num_classes).train()
        except ValueError as error:  # an override for a part that a classifier lacks
            raise ConfigError(f"model.norm: {error}") from None
        self.network = network.to(device, memory_format=torch.channels_last)
        self.ema = EMA(self.network)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), **adamw_settings(train))
        self.starts = range(0, train.total_images, train.batch_size)  # the first example of each batch

    def inputs(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A batch's images as the network sees them, and its labels."""
        return to_network(self.train_set.table, None, batch, self.device)[0], batch["labels"].to(self.device)

    def batch(self, start: int) -> tuple[Tensor, Tensor]:
        """The inputs of the batch from example `start` of the run."""
        return self.inputs(self.train_set.__getitems__(range(start, start + self.config.train.batch_size)))

    def loss(self, start: int) -> Tensor:
        """The mean cross-entropy of the batch from example `start` of the run."""
        images, labels = self.batch(start)
        return F.cross_entropy(self.network(images), labels)

    def step(self, start: int) -> tuple[float, float]:
        """An optimizer step on the batch from example `start` of the run; returns loss and norm of the gradient."""
        train = self.config.train
        self.optimizer.zero_grad()
        (loss := self.loss(start)).backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), train.max_grad_norm or math.inf)
        self.optimizer.param_groups[0]["lr"] = learning_rate(train, start + train.batch_size / 2)
        self.optimizer.step()
        force_weight_norm(self.network)
        self.ema.update(1.0 - ema_decays(train, start + train.batch_size)[0])
        return loss.item(), norm.item()

    def train(self, metrics: JsonlLogger, timing: JsonlLogger) -> tuple[int, bool]:
        """Train from the start to the end, or to the first loss or gradient that is not finite.

        Logs and validates every `train.validate_every` images. Returns the images seen and whether all was finite.
        """
        train, window, since = self.config.train, [], time.perf_counter()
        for start in self.starts:
            window.append(self.step(start))
            images, is_finite = start + train.batch_size, bool(np.isfinite(window[-1]).all())
            is_last = start == self.starts[-1] or not is_finite
            if is_last or (train.validate_every and images // train.validate_every > start // train.validate_every):
                speed = len(window) * train.batch_size / (time.perf_counter() - since)
                timing.write({"images": images, "images_per_second": speed, "memory_mib": memory_mib(self.device)})
                values = (*np.mean(window, axis=0).tolist(), learning_rate(train, images))
                loss = float(self.evaluate(self.ema.model)[0].mean())
                is_finite &= math.isfinite(loss)
                validation = {"validation_loss": loss, "validation_loss_by_log_snr": [loss]}
                metrics.write({**dict(zip(CURVE, (images, *values), strict=True)), **validation})
                window, since = [], time.perf_counter()
            if not is_finite:
                break
        return images, is_finite

    @torch.no_grad()
    def evaluate(self, network: nn.Module) -> tuple[Tensor, Tensor]:
        """The cross-entropy of each held-out image, (n,), and whether it is misclassified, int64 (n,).

        Batches have the size of training's and, in random order, its mix of classes; the last is filled up.
        """
        size, count = self.config.train.batch_size, len(self.val_set)
        order = np.random.Generator(np.random.Philox(0)).permutation(count)
        images, labels = self.inputs(self.val_set.batch(np.resize(order, math.ceil(count / size) * size)))
        logits = torch.cat([network(batch) for batch in images.split(size)])
        original = torch.from_numpy(np.argsort(order)).to(self.device)
        errors, wrong = F.cross_entropy(logits, labels, reduction="none"), (logits.argmax(1) != labels).long()
        return errors[:count][original], wrong[:count][original]

    def chance(self) -> float:
        """The error rate of the most frequent class of the training images."""
        table = self.train_set.table
        most_frequent = np.bincount(table.labels_of(self.train_set.rows)).argmax()
        return float((table.labels_of(self.val_set.rows) != most_frequent).mean())

    def measure(self) -> dict[str, Any]:
        """`errors`, `wrong`, `metrics` and `saved_mib` of a record, of the EMA weights."""
        network = copy.deepcopy(self.ema.model)
        found = {"running": self.evaluate(network)}
        if layers := batch_dependent_layers(network):
            for layer in layers:
                layer.train()
            found["batch"] = self.evaluate(network)
            update_bn_stats(network.eval(), (self.batch(start)[:1] for start in self.starts[:STATISTICS_BATCHES]))
            found["precise"] = self.evaluate(network)
        return {
            "errors": {name: rounded(found[name][0].tolist()) if name in found else None for name in STATISTICS},
            "wrong": {name: found[name][1].tolist() if name in found else None for name in STATISTICS},
            "metrics": {},
            "saved_mib": activation_bytes(lambda: self.loss(0), self.network.parameters()) / 2**20,
        }


@fresh_accelerate_state()
def run_classifier(trial: Trial, folder: Path) -> int:
    """Train a trial's classifier from the start, measure it, and write its record; returns 0."""
    path, config, began = trial.run_dir(folder), trial.config, time.perf_counter()
    keep_freed_memory()
    accelerator = make_accelerator(config)
    if accelerator.num_processes > 1:
        raise ConfigError(f"task: given classification on {accelerator.num_processes} processes; valid: on one")
    path.mkdir(parents=True, exist_ok=True)
    metrics, timing = (JsonlLogger(path / name) for name in ("metrics.jsonl", "timing.jsonl"))
    for log in (metrics, timing):
        log.path.unlink(missing_ok=True)  # of a trial that was killed
    run = ClassifierRun(config, accelerator.device)
    images, is_complete = run.train(metrics, timing)
    nothing = dict.fromkeys(STATISTICS)
    unmeasured = {"errors": nothing, "wrong": nothing, "metrics": {}, "saved_mib": None}
    rows, fingerprint = run.val_set.rows.tolist(), run.val_set.fingerprint
    bank = hashlib.sha256(f"{fingerprint} {rows}".encode()).hexdigest()[:12]
    if not bank_path(folder, bank).exists():
        save_bank(folder, bank, {"bins": run.val_set.bins.tolist(), "rows": rows, "chance": run.chance()})
    record = {
        "format": FORMAT,
        "cell": trial.name,
        "task": trial.task,
        "config": config.model_dump(exclude=KEYS_NOT_RECORDED),
        "seed": config.seed,
        "outcome": "complete" if is_complete else "diverged",
        "diverged_at": None if is_complete else images,
        "images": images,
        "nonfinite_steps": int(not is_complete),
        "parameters": sum(parameter.numel() for parameter in run.network.parameters()),
        "norm_kinds": norm_kinds([run.network]),
        "batch_dependent": bool(batch_dependent_layers(run.network)),
        "bank": {"fingerprint": fingerprint, "log_snr_edges": [0.0, 0.0], "name": bank},
        **training_history(path),
        **(run.measure() if is_complete else unmeasured),
        "nearest": None,
        "magnitudes": None,
        "environment": environment(accelerator.device, accelerator.num_processes),
        "times": {
            **times(path),
            "peak_memory_mib": max(line["memory_mib"] for line in read_jsonl(timing.path)),
            "norm_share": None,
            "cell_seconds": round(time.perf_counter() - began, 3),
        },
    }
    write_record(folder, record)
    return 0


def seconds_per_image(config: Config) -> float:
    """Of training, by the steps after the first."""
    run = ClassifierRun(config, make_accelerator(config).device)
    seconds = [timeit.timeit(lambda start=start: run.step(start), number=1) for start in run.starts[:4]]
    return min(seconds) / config.train.batch_size
