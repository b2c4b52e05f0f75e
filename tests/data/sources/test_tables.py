import io
import json
import struct
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gnunet.data import cache
from gnunet.data.sources import tables
from gnunet.errors import DataError

NAMES = ["zebra", "ant", "cow"]


def picture(value: int) -> Image.Image:
    return Image.new("L", (8, 8), value)


def png(value: int) -> bytes:
    file = io.BytesIO()
    picture(value).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def rows() -> datasets.Dataset:
    """Ten grey pictures, their values 0..9, with class labels and other columns."""
    columns = {
        "img": ([picture(i) for i in range(10)], datasets.Image()),
        "fine_label": ([i % 3 for i in range(10)], datasets.ClassLabel(names=NAMES)),
        "size": ([30 - i // 4 * 10 for i in range(10)], datasets.Value("int64")),
        "round": ([i % 2 == 0 for i in range(10)], datasets.Value("bool")),
        "weight": ([0.5] * 10, datasets.Value("float32")),
    }
    features = datasets.Features({name: feature for name, (_, feature) in columns.items()})
    return datasets.Dataset.from_dict({name: values for name, (values, _) in columns.items()}, features)


def write(file: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), file)
    return file


KINDS = ["parquet file", "parquet shards", "parquet folders", "save_to_disk", "dict to disk", "arrow file"]
HAVE_SPLITS = KINDS[1:3] + ["dict to disk"]


def store(kind: str, rows: datasets.Dataset, root: Path) -> Path:
    splits = {"train": rows, "test": rows.select([3])}
    if kind == "parquet file":
        rows.to_parquet(root / "a.parquet")
        return root / "a.parquet"
    if kind in ("arrow file", "save_to_disk"):
        rows.save_to_disk(root, num_shards=1 if kind == "arrow file" else 2)
        return next(root.glob("*.arrow")) if kind == "arrow file" else root
    if kind == "dict to disk":
        datasets.DatasetDict(splits).save_to_disk(root)
    elif kind == "parquet shards":
        for i in range(2):
            rows.select(range(5 * i, 5 * i + 5)).to_parquet(root / f"train-0000{i}-of-00002.parquet")
        splits["test"].to_parquet(root / "test-00000-of-00001.parquet")
    else:
        for split, part in splits.items():
            (root / split).mkdir()
            part.to_parquet(root / split / "0.parquet")
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_table(kind, rows, tmp_path, load, greys):
    source = store(kind, rows, tmp_path)
    table = load(source)
    assert greys(table) == list(range(10))
    assert table.class_names == tuple(NAMES)
    assert table.labels.tolist() == [i % 3 for i in range(10)]
    subset = load(source, subset={"fine_label": ["cow", "zebra"], "size": 20})
    assert (greys(subset), subset.class_names) == ([5, 6], ("zebra", "cow"))


@pytest.mark.parametrize("kind", HAVE_SPLITS)
def test_splits(kind, rows, tmp_path, load, greys):
    assert greys(load(store(kind, rows, tmp_path), split="test")) == [3]
    with pytest.raises(DataError, match="data.split.*test, train"):
        load(tmp_path, split="dev")


def test_splits_keep_their_own_names(rows, tmp_path, load, greys):
    datasets.DatasetDict({"dev": rows.select([4]), "validation": rows.select([5])}).save_to_disk(tmp_path)
    assert greys(load(tmp_path, split="dev")) == [4]


@pytest.mark.parametrize(
    "names",
    [("cifar10-train", "cifar10_test"), ("TRAIN", "val"), ("train/a/0", "test/a/0"), ("train", "eval")],
    ids=str,
)
def test_splits_in_any_word_of_a_name(rows, tmp_path, load, greys, names):
    for i, name in enumerate(names):
        file = tmp_path / f"{name}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows.select([i]).to_parquet(file)
    assert greys(load(tmp_path)) == [0]


@pytest.mark.parametrize("kind", ["parquet file", "save_to_disk"])
def test_split_of_a_table_without_splits(kind, rows, tmp_path, load):
    with pytest.raises(DataError, match="data.split.*'test'.*valid: train"):
        load(store(kind, rows, tmp_path), split="test")


def test_saved_split_is_not_taken_for_another(rows, tmp_path, load, greys):
    datasets.Dataset.from_dict({"image": [png(5)]}, split="test").save_to_disk(tmp_path)
    with pytest.raises(DataError, match="data.split.*valid: test"):
        load(tmp_path)
    assert greys(load(tmp_path, split="test")) == [5]


def test_columns_advised_for_labels_can_hold_classes(tmp_path, load):
    write(tmp_path / "a.parquet", img=[png(i) for i in range(3)], name=["a", "b", "c"], size=[0.5] * 3, boxes=[[1]] * 3)
    with pytest.raises(DataError, match=r"data.label_column .* of 'name'$"):
        load(tmp_path / "a.parquet", class_conditional=True)
    with pytest.raises(DataError, match="each of the 3 images.*data.label_column name"):
        load(tmp_path / "a.parquet", class_conditional=True, label_column="name")


@pytest.mark.parametrize(
    ("column", "names", "labels"),
    [("size", ("10", "20", "30"), [2] * 4 + [1] * 4 + [0] * 2), ("round", ("false", "true"), [1, 0] * 5)],
)
def test_label_columns(rows, tmp_path, load, column, names, labels):
    table = load(store("parquet file", rows, tmp_path), label_column=column)
    assert (table.class_names, table.labels.tolist()) == (names, labels)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"image_column": "picture"}, "data.image_column.*'picture'.*valid: 'img'"),
        ({"label_column": "sizes"}, "data.label_column.*'size'.*'img'"),
        ({"label_column": "weight"}, "row 0.*float.*'weight'"),
        ({"subset": {"colour": "red"}}, "data.subset.*'colour'.*'img'"),
        ({"subset": {"fine_label": ["cat"]}}, "data.subset.fine_label.*'cat'.*'ant', 'cow', 'zebra'"),
        ({"subset": {"fine_label": "zebar"}}, "did you mean 'zebra'"),
        ({"subset": {"size": 31}}, "data.subset.size: 31.*10, 20, 30"),
        ({"subset": {"size": 10, "fine_label": "ant"}}, "data.subset"),
    ],
    ids=str,
)
def test_columns_and_values_that_do_not_exist(rows, tmp_path, load, keys, named):
    with pytest.raises(DataError, match=named):
        load(store("parquet file", rows, tmp_path), **keys)


def test_images_in_plain_columns(tmp_path, load, greys):
    pixels = np.full((2, 8, 8), 5, np.uint8)
    pixels[1] = 6
    nested = load(write(tmp_path / "nested.parquet", Image=pixels.tolist(), CLASS=["b", "a"]))
    assert (greys(nested), nested.class_names, nested.labels.tolist()) == ([5, 6], ("a", "b"), [1, 0])
    assert greys(load(write(tmp_path / "raw.parquet", photo=[png(5), png(6)]))) == [5, 6]
    unknown = write(tmp_path / "unknown.parquet", thing=[png(5)])
    with pytest.raises(DataError, match="data.image_column.*'thing'"):
        load(unknown)
    assert greys(load(unknown, image_column="thing")) == [5]


def test_columns_are_found_by_type(tmp_path, load, greys):
    features = datasets.Features({"thing": datasets.Image(), "kind": datasets.ClassLabel(names=["x", "y"])})
    rows = datasets.Dataset.from_dict({"thing": [picture(1), picture(2)], "kind": [1, 0]}, features)
    rows.to_parquet(tmp_path / "a.parquet")
    table = load(tmp_path)
    assert (greys(table), table.class_names, table.labels.tolist()) == ([1, 2], ("x", "y"), [1, 0])


@pytest.mark.parametrize("hidden", [True, False])
def test_rows_without_labels(tmp_path, load, hidden):
    feature = datasets.ClassLabel(names=["x"]) if hidden else datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    columns = {"image": [picture(5), picture(6)], "label": [0, -1] if hidden else ["a", None]}
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "a.parquet")
    assert load(tmp_path).labels is None
    with pytest.raises(DataError, match="row 1 has no label in the column 'label'"):
        load(tmp_path, label_column="label")


def test_nested_labels(tmp_path, load):
    file = write(tmp_path / "a.parquet", image=[png(5)], label=[["a", "b"]])
    assert load(file).labels is None
    for keys in ({"label_column": "label"}, {"subset": {"label": "a"}}):
        with pytest.raises(DataError, match="a.parquet.*column 'label'"):
            load(file, **keys)


def test_files_that_are_not_tables(tmp_path, load):
    for name in ("a.parquet", "a.arrow", "a.zip"):
        (tmp_path / name).write_bytes(b"PAR1 or not")
        with pytest.raises(DataError, match=name):
            load(tmp_path / name)
    with pytest.raises(DataError, match=r"\.arrow and \.parquet"):
        load(tmp_path)


def test_unequal_columns(tmp_path, load):
    write(tmp_path / "a.parquet", image=[b""])
    write(tmp_path / "b.parquet", image=[b""], label=[1])
    with pytest.raises(DataError, match="b.parquet.*'image', 'label'.*a.parquet"):
        load(tmp_path)


def test_more_rows_than_bytes(tmp_path, load, little_memory):
    """A run of a million equal values takes no bytes, but it cannot be images."""
    write(tmp_path / "a.parquet", image=pa.nulls(10**7, pa.binary()))
    assert (tmp_path / "a.parquet").stat().st_size < 10**6
    with little_memory(), pytest.raises(DataError, match=r"a\.parquet cannot be read: 10000000 rows"):
        load(tmp_path / "a.parquet")


@pytest.mark.parametrize("nested", [False, True])
def test_memory_is_bounded_where_rows_share_a_value(tmp_path, load, greys, little_memory, monkeypatch, nested):
    """Here 1 GiB of rows in some kilobytes."""
    monkeypatch.setattr(tables, "MAX_BATCH_BYTES", 2**25)
    monkeypatch.setattr(cache, "MAX_PENDING_BYTES", 2**25)
    padded = png(5) + bytes(2**23)
    images = pa.DictionaryArray.from_arrays(pa.array([0] * 128, pa.int32()), pa.array([padded], pa.binary()))
    column = pa.StructArray.from_arrays([images, pa.nulls(128, pa.string())], ["bytes", "path"]) if nested else images
    names = pa.DictionaryArray.from_arrays(pa.array([0] * 127 + [1], pa.int32()), pa.array(["a" * 2**22, "b"]))
    file = tmp_path / "a.parquet"
    table = pa.table({"image": column, "label": names})
    pq.write_table(table, file, compression="zstd", store_schema=False, dictionary_pagesize_limit=2**24)
    assert file.stat().st_size < 10_000
    with little_memory():
        table = load(file)
    assert greys(table) == [5] * 128 and table.labels.tolist() == [0] * 127 + [1]


def test_long_runs_of_pixels(tmp_path, load, monkeypatch):
    """A run of equal pixels takes no bytes, however long it is."""
    monkeypatch.setattr(tables, "MAX_GROUP_VALUES", 2**20)
    count = 2**20 + 1
    pixels = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), pa.nulls(count, pa.int8()))
    file = write(tmp_path / "a.parquet", image=pixels)
    assert file.stat().st_size < 10_000
    with pytest.raises(DataError, match=rf"a\.parquet.* {count} values of 'image'"):
        load(file)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_images_of_very_many_values(tmp_path, load, greys, monkeypatch, kind):
    monkeypatch.setattr(tables, "MAX_IMAGE_VALUES", 100)
    rows = datasets.Dataset.from_dict({"image": [[[5] * 8] * 8, [[6] * 11] * 10]})
    if kind == "parquet":
        rows.to_parquet(tmp_path / "a.parquet")
    else:
        rows.save_to_disk(tmp_path)
    assert greys(load(tmp_path, on_error="skip")) == [5]
    with pytest.raises(DataError, match="row 1 .*110 values"):
        load(tmp_path)


@pytest.mark.parametrize("offset", [2**30, 2**31 - 1, 3])
def test_arrow_offsets_beyond_the_file(tmp_path, load, offset):
    file = tmp_path / "a.arrow"
    table = pa.table({"image": pa.array([b"abcde"] * 3, pa.binary())})
    with pa.OSFile(str(file), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    true = struct.pack("<4i", 0, 5, 10, 15)
    assert file.read_bytes().count(true) == 1
    file.write_bytes(file.read_bytes().replace(true, struct.pack("<4i", 0, 5, 10, offset)))
    with pytest.raises(DataError, match=r"a\.arrow cannot be read"):
        load(file)


def test_features_that_cannot_be_read(tmp_path, load):
    for features in ({"image": {"_type": "Evil"}}, {"image": 3}, [], {"image": {"_type": ["x"]}}, None):
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        pq.write_table(pa.table({"image": [b"x"]}).replace_schema_metadata(metadata), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=r"a\.parquet"):
            load(tmp_path / "a.parquet")


@pytest.mark.parametrize("cut", [5, 50, 400])
def test_truncated_and_altered_parquet_files(rows, tmp_path, load, cut):
    file = store("parquet file", rows, tmp_path)
    content = file.read_bytes()
    rng = np.random.default_rng(cut)
    for altered in (content[:-cut], content[:4] + content[4 + cut :]):
        file.write_bytes(altered)
        with pytest.raises(DataError):
            load(file)
    for _ in range(20):  # bits of the footer, which describes all the rest
        altered = bytearray(content)
        altered[-8 - int(rng.integers(1, 1000))] ^= 1 << int(rng.integers(8))
        file.write_bytes(altered)
        try:
            load(file)  # some bits do not matter
        except DataError as error:
            assert "a.parquet" in str(error)


@pytest.mark.parametrize("source", ["./nowhere", "/no/where", "nowhere.parquet", "a/b/c"])
def test_paths_that_do_not_exist(source, load):
    with pytest.raises(DataError, match=f"data.source: '{source}'"):
        load(source)


def test_hub_data_sets(rows, tmp_path, monkeypatch, load, greys):
    rows.save_to_disk(tmp_path / "cached")
    requested = []

    def load_dataset(name, split):
        requested.append((name, split))
        return datasets.load_from_disk(tmp_path / "cached")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert greys(load("someone/things", split="test")) == list(range(10))
    assert requested == [("someone/things", "test")]


def test_hub_names_offline(tmp_path, run_python):
    program = "import gnunet.data; gnunet.data.load_images('nobody/nothing', resolution=32, channels=3)"
    result = run_python(program, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert "gnunet.errors.DataError: data.source: 'nobody/nothing'" in result.stderr


@pytest.mark.parametrize("source", ["pictures/portaits", "./portaits", "pictures/portaits/train", "portaits.parquet"])
def test_misspelt_path_is_not_asked_of_the_hub_and_suggests_its_neighbour(tmp_path, monkeypatch, load, source):
    monkeypatch.chdir(tmp_path)
    for folder in ("pictures/portraits/train", "portraits", "portraits.parquet"):
        Path(folder).mkdir(parents=True)
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(DataError, match=r"'.*portaits.*' is not a file or folder .*did you mean .*portraits"):
        load(source)
