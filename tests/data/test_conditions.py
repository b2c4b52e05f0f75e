import numpy as np
import pytest
import torch
from PIL import Image

from gnunet.data import Condition, TrainingDataset, ValidationSet
from gnunet.data.conditions import SampleConditions, draw_mask
from gnunet.scaling import to_uint8, to_unit_range
from tests.tables import make_table

LOW, MASK, GREY = Condition("low_resolution", 3, factor=4), Condition("mask", 4), Condition("grey", 1)


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 8, 12, 3), dtype=np.uint8)


def to_network(condition, stored):
    return condition.to_network(torch.from_numpy(stored).permute(0, 3, 1, 2), (8, 12), to_unit_range)


def test_low_resolution_averages_blocks_of_pixels_and_floats_of_any_channels(images):
    stored = LOW.store(images, ())
    assert stored.dtype == np.uint8 and stored.shape == (5, 2, 3, 3)
    assert np.array_equal(stored[0], np.asarray(Image.fromarray(images[0]).reduce(4)))
    x = to_network(LOW, stored)
    assert x.shape == (5, 3, 8, 12) and x.dtype == torch.float32
    floats = np.concatenate([images, images], axis=-1).astype(np.float32) + 0.25
    low = Condition("low_resolution", 6, factor=4).store(floats, ())
    assert low.dtype == np.float32 and np.allclose(low[1, 0, 2, 4], images[1, :4, 8:, 1].mean() + 0.25)


def test_grey_is_pillows(images):
    stored = GREY.store(images, ())
    assert np.array_equal(
        stored[..., 0], np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])
    )
    assert to_network(GREY, stored).shape == (5, 1, 8, 12)


def test_a_masked_image_is_itself_where_it_is_known_and_zero_elsewhere(images):
    masks = [draw_mask(np.random.default_rng(i), 8, 12) for i in range(5)]
    x = to_network(MASK, MASK.store(images, (np.random.default_rng(i) for i in range(5))))
    known = torch.from_numpy(~np.stack(masks))
    assert x.shape == (5, 4, 8, 12) and torch.equal(x[:, 3], known.float())
    original = to_unit_range(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert torch.equal(x[:, :3], original * known[:, None])


def test_grids_show_all_colours_of_a_partner_every_class_and_no_mask(images):
    colours, classes = Condition("paired", 3), Condition("paired", 5, num_classes=5)
    assert np.array_equal(to_uint8(colours.shown(to_network(colours, images))), images)
    seen = to_uint8(classes.shown(to_network(classes, images[..., :1] % 5)))
    assert np.array_equal(seen, np.array([0, 64, 128, 191, 255], np.uint8)[images[..., :1] % 5])
    assert MASK.shown(torch.zeros(1, 4, 2, 2)).shape == (1, 3, 2, 2)


def test_masks_are_of_both_kinds_and_leave_and_hide_something():
    masks = np.stack([draw_mask(np.random.default_rng(i), 32, 48) for i in range(200)])
    hidden = masks.mean(axis=(1, 2))
    assert hidden.min() > 0 and hidden.max() < 1 and 0.2 < hidden.mean() < 0.6
    is_rectangle = [mask[np.ix_(mask.any(1), mask.any(0))].all() for mask in masks]  # a single one
    assert 10 < sum(is_rectangle) < 100


@pytest.mark.parametrize("condition", [LOW, MASK, GREY], ids=lambda condition: condition.kind)
def test_an_examples_condition_depends_on_seed_and_index_alone_and_flips_with_it(images, condition):
    table = make_table(images)
    settings = {"flip": True, "condition": condition, "condition_dropout": 0.5}
    examples = TrainingDataset(table, np.arange(5), seed=3, **settings)
    together = examples.__getitems__(range(6, 16))
    for i, k in enumerate(range(6, 16)):
        alone = TrainingDataset(table, np.arange(5), seed=3, **settings).__getitems__([k])
        assert torch.equal(alone["condition"][0], together["condition"][i])
        assert alone["condition_drop"][0] == together["condition_drop"][i]
    shown = np.ascontiguousarray(together["images"].permute(0, 2, 3, 1).numpy())
    stored = together["condition"].permute(0, 2, 3, 1).numpy()
    if condition is MASK:
        assert np.array_equal(stored[..., :3], shown) and {*stored[..., 3].flat} == {0, 255}
        other = TrainingDataset(table, np.arange(5), seed=4, **settings).__getitems__(range(6, 16))["condition"]
        assert not torch.equal(other[:, 3], together["condition"][:, 3])
    else:
        assert np.array_equal(stored, condition.store(shown, ()))


def test_label_and_condition_are_dropped_by_one_draw(table):
    settings = {"seed": 3, "flip": True, "class_conditional": True, "condition": LOW}
    examples = TrainingDataset(table, np.arange(23), label_dropout=0.2, condition_dropout=0.4, **settings)
    batch = examples.__getitems__(range(2000))
    no_label, no_condition = batch["labels"] == examples.null_label, batch["condition_drop"]
    assert (no_condition | ~no_label).all()
    assert abs(no_condition.float().mean() - 0.4) < 0.05 and abs(no_label.float().mean() - 0.2) < 0.05
    assert "condition_drop" not in TrainingDataset(table, np.arange(23), **settings).__getitems__([0])


def test_validation_and_sampling_have_fixed_conditions(table):
    condition = Condition("mask", 4)
    settings = {"num_examples": 30, "num_bins": 4, "log_snr_min": -8, "log_snr_max": 8}
    with_masks = ValidationSet(table, np.arange(23), condition=condition, **settings)
    plain = ValidationSet(table, np.arange(23), **settings)
    assert with_masks.fingerprint == ValidationSet(table, np.arange(23), condition=condition, **settings).fingerprint
    assert with_masks.fingerprint != plain.fingerprint
    for name in ("noise", "images", "log_snr"):
        assert torch.equal(with_masks.batch([7, 29])[name], plain.batch([7, 29])[name])
    given = SampleConditions.of_rows(condition, table, np.arange(3, 9), table.labels)
    assert given.entries([0, 6, 13]).tolist() == [0, 0, 1]
    assert np.array_equal(given.store(given.entries([13, 1])), given.store([1, 1]))
    assert np.array_equal(given.store([4])[..., :3], given.images([4])) and given.labels.shape == (6,)
    assert {image.tobytes() for image in given.images(range(6))} == {image.tobytes() for image in table.images[3:9]}
