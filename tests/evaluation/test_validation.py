"""The validation loss: against brute force and over ranks."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from gnunet.data.validation import ValidationSet
from gnunet.diffusion import make_process
from gnunet.evaluation import validation_loss
from gnunet.evaluation.validation import summarize
from gnunet.processes import Processes
from tests.tables import make_table

PROCESSES = [
    {"kind": "ddpm"},
    {"kind": "ddpm", "beta_schedule": "cosine", "prediction_type": "v"},
    {"kind": "ddpm", "prediction_type": "sample"},
    {"kind": "edm"},
    {"kind": "flow"},
]


def make_val_set(num_examples=50, num_bins=5, labels=False):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    table = make_table(images, rng.integers(0, 4, 12) if labels else None)
    return ValidationSet(
        table, np.arange(12), num_examples=num_examples, num_bins=num_bins, log_snr_min=-6.0, log_snr_max=6.0
    )


class TinyNet(nn.Module):
    def __init__(self, classes=False):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.class_embedding = nn.Embedding(4, 3) if classes else None
        self.sizes = []

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        assert not self.training and not torch.is_grad_enabled()
        assert (class_labels is None) == (self.class_embedding is None)
        self.sizes.append(len(sample))
        output = self.norm(self.conv(sample))
        if class_labels is not None:
            output = output + self.class_embedding(class_labels)[:, :, None, None]
        return (output,)


@pytest.mark.parametrize("settings", PROCESSES, ids=repr)
def test_agrees_with_brute_force(settings):
    """v and its estimate written out, example by example in float64, on the image rescaled to unit power."""
    process, network, val_set = make_process(**settings), TinyNet().eval(), make_val_set()
    errors = []
    for i in range(len(val_set)):
        batch = val_set.batch([i])
        level = process.from_log_snr(batch["log_snr"])
        image = batch["images"].double() / 127.5 - 1
        noise, a, s = batch["noise"].double(), level.alpha.double(), level.sigma.double()
        x = a * image + s * noise
        with torch.no_grad():
            estimate = process.denoise(network, x.float(), level).double()
        power = (a**2 + s**2).sqrt()
        a, s, x = a / power, s / power, x / power
        estimated_noise = (x - a * estimate) / s
        v, v_hat = a * noise - s * image, a * estimated_noise - s * estimate
        errors.append((v_hat - v).square().mean().item())
    errors = np.array(errors)

    result = validation_loss(TinyNet(), process, val_set, batch_size=16)
    groups = [errors[val_set.bins == b] for b in range(5)]
    assert result.by_log_snr == pytest.approx([group.mean() for group in groups], rel=1e-4)
    spreads = [group.std(ddof=1) / math.sqrt(len(group)) for group in groups]
    assert result.by_log_snr_standard_errors == pytest.approx(spreads, rel=1e-3)
    assert result.validation_loss == pytest.approx(np.mean(result.by_log_snr), rel=1e-12)
    assert result.standard_error == pytest.approx(np.sqrt(np.sum(np.square(spreads))) / 5, rel=1e-3)


@pytest.mark.parametrize("settings", PROCESSES, ids=repr)
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_the_work_and_agree(settings, world_size):
    process, val_set = make_process(**settings), make_val_set()
    alone = validation_loss(TinyNet(), process, val_set, batch_size=12)
    rounds, sizes = -(-5 // world_size), []
    parts = [[] for _ in range(rounds)]  # of all ranks, by round

    def keep(tensor):
        parts[next(number)].append(tensor)
        return torch.cat([tensor] * world_size)

    for rank in range(world_size):
        network, number = TinyNet(), iter(range(rounds))
        validation_loss(network, process, val_set, batch_size=12, processes=Processes(rank, world_size, keep))
        sizes.append(network.sizes)
    assert {len(each) for each in sizes} == {rounds}  # all ranks keep in step
    assert [sizes[i % world_size][i // world_size] for i in range(5)] == [12, 12, 12, 12, 2]
    for rank in range(world_size):
        number = iter(range(rounds))
        processes = Processes(rank, world_size, lambda tensor, number=number: torch.cat(parts[next(number)]))
        result = validation_loss(TinyNet(), process, val_set, batch_size=12, processes=processes)
        assert result == alone


def test_labels_go_to_networks_with_classes_only():
    process, val_set = make_process("flow"), make_val_set(labels=True)
    with_classes = validation_loss(TinyNet(classes=True), process, val_set)
    assert with_classes.validation_loss != validation_loss(TinyNet(), process, val_set).validation_loss


def test_modes_are_restored():
    network = TinyNet()
    network.norm.eval()
    validation_loss(network, make_process("flow"), make_val_set())
    assert network.training and network.conv.training and not network.norm.training


def test_summary_of_thin_bins():
    result = summarize(np.array([1.0, 3.0, 10.0, 14.0, 5.0]), np.array([0, 0, 2, 2, 3]), 5)
    assert result.by_log_snr == [2.0, None, 12.0, 5.0, None]
    assert result.by_log_snr_standard_errors == [pytest.approx(1.0), None, pytest.approx(2.0), None, None]
    assert result.validation_loss == pytest.approx(19 / 3)
    assert math.isnan(result.standard_error)
    full = summarize(np.array([1.0, 3.0, 10.0, 14.0]), np.array([0, 0, 1, 1]), 2)
    assert full.validation_loss == 7 and full.standard_error == pytest.approx(math.sqrt(5) / 2)
    assert math.isnan(summarize(np.array([1.0, math.nan]), np.array([0, 1]), 2).validation_loss)
