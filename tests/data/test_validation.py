import numpy as np
import torch

from gnunet.data import ValidationSet
from tests.tables import make_table


def val_set(table, rows, **keys):
    sizes = {"num_examples": 64, "num_bins": 4, "log_snr_min": -8.0, "log_snr_max": 8.0}
    return ValidationSet(table, rows, **{**sizes, **keys})


def test_images_bins_levels_and_noise(table):
    rows = np.array([3, 8, 1, 20])
    whole = val_set(table, rows).batch(range(64))
    for i in range(64):
        image = torch.from_numpy(table.images[rows[i % 4]]).permute(2, 0, 1)
        assert torch.equal(whole["images"][i], image)
        assert whole["bin"][i] == (i + i // 4) % 4
        assert whole["labels"][i] == table.labels[rows[i % 4]]
    lower = -8 + 4 * whole["bin"].double()
    assert ((whole["log_snr"] >= lower) & (whole["log_snr"] <= lower + 4)).all()
    assert torch.bincount(whole["bin"]).tolist() == [16] * 4
    # One draw in each sixteenth of each bin, and each image meets each bin.
    shares = ((whole["log_snr"] - lower) / 4 * 16).long()
    assert all(sorted(shares[whole["bin"] == b].tolist()) == list(range(16)) for b in range(4))
    assert len({(i % 4, int(whole["bin"][i])) for i in range(64)}) == 16
    assert abs(whole["noise"].mean()) < 0.05 and abs(whole["noise"].std() - 1) < 0.05
    assert whole["noise"].is_contiguous(memory_format=torch.channels_last)
    part = val_set(table, rows).batch([40, 7])
    for name, tensor in part.items():
        assert torch.equal(tensor, whole[name][[40, 7]])


def test_validation_fingerprint(table):
    rows = np.arange(5)
    fingerprint = val_set(table, rows).fingerprint
    assert val_set(table, rows).fingerprint == fingerprint
    others = [
        val_set(table, rows + 1),
        val_set(table, rows, num_examples=65),
        val_set(table, rows, num_bins=8),
        val_set(table, rows, log_snr_max=9.0),
        val_set(make_table(table.images), rows),
    ]
    assert fingerprint not in {other.fingerprint for other in others}
