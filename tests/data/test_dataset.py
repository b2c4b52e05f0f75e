import pickle

import numpy as np
import torch

from gnunet.data import TrainingDataset
from tests.tables import make_table


def make(table, rows=None, **keys):
    rows = np.arange(len(table)) if rows is None else rows
    return TrainingDataset(table, rows, **{"seed": 3, "flip": True, **keys})


def test_shapes_types_and_strides(table):
    batch = make(table, class_conditional=True, label_dropout=0.1).__getitems__([5, 6, 30])
    assert batch["images"].dtype == torch.uint8 and batch["noise"].dtype == torch.float32
    assert batch["u"].dtype == torch.float64
    assert batch["labels"].dtype == batch["index"].dtype == torch.int64
    for name in ("images", "noise"):
        assert batch[name].shape == (3, 3, 8, 8)
        assert batch[name].is_contiguous(memory_format=torch.channels_last)
    assert batch["index"].tolist() == [5, 6, 30]
    assert "labels" not in make(table).__getitems__([0])


def test_pixels_and_flips(table):
    rows = np.array([20, 4, 9])
    examples = make(table, rows)
    plain = make(table, rows, flip=False).__getitems__(range(30))
    flipped = examples.__getitems__(range(30))
    draws = examples._rng.examples(range(30))
    assert draws.flip.any() and not draws.flip.all()
    for i in range(30):
        original = torch.from_numpy(table.images[rows[draws.rows[i]]]).permute(2, 0, 1)
        assert torch.equal(plain["images"][i], original)
        assert torch.equal(flipped["images"][i], original.flip(-1) if draws.flip[i] else original)
    assert torch.equal(plain["noise"], flipped["noise"])


def test_only_the_given_rows_each_once_an_epoch(table):
    rows = np.array([2, 11, 17, 5])
    images = make(table, rows, flip=False).__getitems__(range(4, 8))["images"].permute(0, 2, 3, 1).numpy()
    assert {image.tobytes() for image in images} == {table.images[row].tobytes() for row in rows}


def test_label_dropout_gives_the_null_label(table):
    examples = make(table, label_dropout=0.3, class_conditional=True)
    assert (examples.num_classes, examples.null_label) == (5, 5)
    labels = examples.__getitems__(range(4000))["labels"].numpy()
    kept = make(table, class_conditional=True).__getitems__(range(4000))["labels"].numpy()
    assert abs((labels == 5).mean() - 0.3) < 0.03
    assert (kept < 5).all() and (labels[labels != 5] == kept[labels != 5]).all()
    np.testing.assert_array_equal(kept, table.labels[examples._rng.examples(range(4000)).rows])


def test_fingerprint_covers_pixels_labels_and_names(table):
    same = make_table(table.images.copy(), table.labels, table.class_names)
    changed = table.images.copy()
    changed[22, 7, 7, 2] ^= 1
    others = [
        make_table(changed, table.labels, table.class_names),
        make_table(table.images, table.labels, tuple("abcdX")),
        make_table(table.images, 4 - table.labels, table.class_names),
        make_table(table.images),
    ]
    assert same.fingerprint == table.fingerprint
    assert len({other.fingerprint for other in others} | {table.fingerprint}) == 5


def test_metadata_of_a_checkpoint(table):
    rows = np.arange(3, 20)
    labelled, plain = make(table, rows, class_conditional=True).metadata, make(table, rows).metadata
    counts = np.bincount(table.labels[rows], minlength=5).tolist()
    assert labelled["class_counts"] == counts and labelled["class_names"] == list("abcde")
    assert (plain["class_counts"], plain["class_names"], plain["num_images"]) == (None, None, 17)


def test_examples_survive_pickling(table):
    examples = make(table)
    unpickled = pickle.loads(pickle.dumps(examples))
    for name, tensor in examples.__getitems__([1, 50]).items():
        assert torch.equal(unpickled.__getitems__([1, 50])[name], tensor)
