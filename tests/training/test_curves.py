"""The picture of a run's losses."""

import json

import pytest
from PIL import Image

from gnunet.training.curves import CURVES, draw_curves, ticks


def coloured(path) -> set[str]:
    """Which curves a picture shows."""
    pixels = {f"#{r:02x}{g:02x}{b:02x}" for _, (r, g, b) in Image.open(path).convert("RGB").getcolors(2**20)}
    return {key for key, (_, colour) in CURVES.items() if colour in pixels}


@pytest.mark.parametrize(
    ("records", "keys"),
    [
        ([{"images": 8, "loss": 1.0}, {"images": 16, "validation_loss": 1.0}], {"loss", "validation_loss"}),
        ([{"images": 0, "loss": 2.5}], {"loss"}),
        ([{"images": 8 * i, "loss": 1e-9 * i} for i in range(200)], {"loss"}),
        ([{"images": 8, "loss": None}, {"images": 16, "loss": float("nan")}, {"images": 24}], None),
        ([], None),
    ],
)
def test_curves_have_the_losses_that_are_numbers(tmp_path, records, keys):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert (coloured(tmp_path / "curves.png") if keys else (tmp_path / "curves.png").exists()) == (keys or False)


@pytest.mark.parametrize(("low", "high"), [(0, 13_200), (0.18, 1.07), (-1e-7, 3e-7), (0.1, 0.1000001), (0, 4e6)])
def test_ticks_are_a_few_round_numbers_in_the_range(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 7 and all(low <= tick <= high for tick in found)
    assert found[1] - found[0] == pytest.approx(found[-1] - found[-2])
