"""Images that come in pairs (data.condition.kind paired)."""

import pickle
import shutil
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gnunet.data import Condition, TrainingDataset, load_images
from gnunet.errors import DataError

PAIRS = {"folder": None, "column": None, "channels": None, "num_classes": None}


@pytest.fixture
def photos(tmp_path):
    """Folders `photo/{a,b}/N.png` in colour and `sketch/{a,b}/N.jpg.png` in grey, 16 x 12."""
    rng = np.random.default_rng(0)
    for label in "ab":
        for i in range(3):
            photo = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            for name, picture in {"photo": photo, "sketch": photo[..., 0] // 2}.items():
                file = tmp_path / name / label / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(file)
    return tmp_path


def load(root, **pairs):
    return load_images(str(root / "photo"), resolution=(12, 16), channels=3, pairs={**PAIRS, **pairs})


def partners(table):
    return table.examples(np.arange(len(table)))[1]


def test_partners_in_a_folder_have_the_same_relative_names(photos):
    plain = load_images(str(photos / "photo"), resolution=(12, 16), channels=3)
    table = load(photos, folder=str(photos / "sketch"), channels=1)
    assert np.array_equal(table.images, plain.images) and np.array_equal(table.labels, plain.labels)
    assert np.array_equal(partners(table)[..., 0], plain.images[..., 0] // 2)
    assert (
        table.fingerprint != plain.fingerprint and partners(load(photos, folder=str(photos / "sketch"))).shape[-1] == 3
    )
    copied = pickle.loads(pickle.dumps(table))
    assert np.array_equal(copied.images, table.images) and np.array_equal(partners(copied), partners(table))
    Image.new("L", (16, 12), 7).save(photos / "sketch/a/0.bmp")
    with pytest.raises(DataError, match=r"condition.folder.*sketch/a/0"):
        load(photos, folder=str(photos / "sketch"), channels=1)
    (photos / "sketch/a/0.png").unlink()
    assert (partners(load(photos, folder=str(photos / "sketch"), channels=1))[0] == 7).all()


def test_partners_are_flipped_with_their_images(photos):
    table = load(photos, folder=str(photos / "sketch"), channels=1)
    condition = Condition("paired", 1)
    batch = TrainingDataset(table, np.arange(6), seed=0, flip=True, condition=condition).__getitems__(range(12))
    assert np.array_equal(batch["condition"][:, 0], batch["images"][:, 0] // 2)


def test_partners_in_a_column(photos, tmp_path):
    files = sorted((photos / "photo").rglob("*.png"))
    columns = {
        "image": [{"bytes": file.read_bytes(), "path": None} for file in files],
        "sketch": [{"bytes": (photos / "sketch" / file.relative_to(photos / "photo")).read_bytes(), "path": None}
                   for file in files],
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    settings = {"resolution": (12, 16), "channels": 3}
    table = load_images(str(tmp_path / "pairs.parquet"), pairs={**PAIRS, "column": "sketch", "channels": 1}, **settings)
    assert np.array_equal(partners(table), partners(load(photos, folder=str(photos / "sketch"), channels=1)))
    with pytest.raises(DataError, match=r"data.condition.column.*'sketc'.*'sketch'"):
        load_images(str(tmp_path / "pairs.parquet"), pairs={**PAIRS, "column": "sketc"}, **settings)
    columns["sketch"][4] = None
    pq.write_table(pa.table(columns), tmp_path / "hole.parquet")
    with pytest.raises(DataError, match="row 4"):
        load_images(str(tmp_path / "hole.parquet"), pairs={**PAIRS, "column": "sketch"}, **settings)


@pytest.mark.parametrize("column", ["label", "image"])
@pytest.mark.parametrize("source", ["folder", "a.npy", "a.npz", "a.parquet", "idx"])
def test_only_another_column_of_images_has_partners(tmp_path, source, column):
    images, labels = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8), np.arange(4, dtype=np.uint8) % 2
    for i, label in enumerate(labels):
        (tmp_path / f"folder/{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(tmp_path / f"folder/{label}/{i}.png")
    np.save(tmp_path / "a.npy", images)
    np.savez(tmp_path / "a.npz", image=images, label=labels)
    pq.write_table(pa.table({"image": images.tolist(), "label": labels}), tmp_path / "a.parquet")
    (tmp_path / "idx").mkdir()
    for name, array in {"images-idx3": images, "labels-idx1": labels}.items():
        header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        (tmp_path / f"idx/train-{name}-ubyte").write_bytes(header + array.tobytes())
    settings = {"resolution": 8, "channels": 1}
    with pytest.raises(DataError, match=rf"data.condition.column.*{column}.*valid: data.condition.folder"):
        load_images(str(tmp_path / source), pairs={**PAIRS, "column": column}, **settings)
    with pytest.raises(DataError, match=r"data.image_column.*'label'.*valid: 'image'"):
        load_images(str(tmp_path / source), image_column="label", **settings)


def test_partners_in_a_column_of_metadata(photos, tmp_path):
    rows = [f"photo/{label}/{i}.png,sketch/{label}/{i}.png" for label in "ab" for i in range(3)]
    (photos / "metadata.csv").write_text("\n".join(["file_name,sketch_file_name", *rows]) + "\n")
    table = load_images(
        str(photos), resolution=(12, 16), channels=3, pairs={**PAIRS, "column": "sketch", "channels": 1}
    )
    assert len(table) == 6 and np.array_equal(partners(table)[..., 0], table.images[..., 0] // 2)


def test_maps_of_classes_are_resized_by_the_nearest_pixel(photos):
    shutil.rmtree(photos / "sketch")
    palette = [value for colour in ((0, 0, 0), (255, 0, 0), (0, 255, 0)) for value in colour]
    for file in sorted((photos / "photo").rglob("*.png")):
        classes = Image.fromarray(np.repeat(np.arange(32, dtype=np.uint8) // 11, 24).reshape(32, 24).T, "P")
        classes.putpalette(palette)
        target = photos / "sketch" / file.relative_to(photos / "photo")
        target.parent.mkdir(parents=True, exist_ok=True)
        classes.save(target)
    table = load(photos, folder=str(photos / "sketch"), num_classes=3)
    assert partners(table).shape == (6, 12, 16, 1) and {*np.unique(partners(table))} == {0, 1, 2}
    condition = Condition("paired", 3, num_classes=3)
    batch = TrainingDataset(table, np.arange(6), seed=0, flip=False, condition=condition).__getitems__([0])
    seen = condition.to_network(batch["condition"], (12, 16), None)
    assert (
        seen.shape == (1, 3, 12, 16)
        and (seen.sum(1) == 1).all()
        and np.array_equal(seen[0].argmax(0), partners(table)[0][..., 0])
    )
    with pytest.raises(DataError, match="class 2; valid: 0 to .* 1"):
        load(photos, folder=str(photos / "sketch"), num_classes=2)


def test_partners_that_cannot_be_used(photos):
    sketch = photos / "sketch"
    Image.new("L", (12, 16)).save(sketch / "b/2.png")
    with pytest.raises(DataError, match=r"b/2.png.*16 x 12 pixels.*12 x 16"):
        load(photos, folder=str(sketch))
    Image.new("RGB", (32, 24)).save(sketch / "b/2.png")  # the same ratio
    assert len(load(photos, folder=str(sketch))) == 6
    with pytest.raises(DataError, match=r"RGB image.*map of classes"):
        load(photos, folder=str(sketch), num_classes=256)
    (sketch / "b/2.png").unlink()
    (sketch / "a/1.png").rename(sketch / "1.png")
    with pytest.raises(DataError, match=r"2 images, .*a/1.png.*b/2.png"):
        load(photos, folder=str(sketch))
    with pytest.raises(DataError, match="missing"):
        load(photos, folder=str(photos / "missing"))
