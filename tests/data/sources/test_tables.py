import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import gnunet
from gnunet.data import cache, load_images
from gnunet.data.sources import tables as tabular
from gnunet.errors import DataError

NAMES = ["zebra", "ant", "cow"]


def picture(value: int) -> Image.Image:
    return Image.new("L", (8, 8), value)


@pytest.fixture
def rows() -> datasets.Dataset:
    """Ten grey pictures, their values 0..9, with class labels and other columns."""
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "fine_label": datasets.ClassLabel(names=NAMES),
            "size": datasets.Value("int64"),
            "round": datasets.Value("bool"),
            "weight": datasets.Value("float32"),
        }
    )
    columns = {
        "img": [picture(i) for i in range(10)],
        "fine_label": [i % 3 for i in range(10)],
        "size": [30 - i // 4 * 10 for i in range(10)],
        "round": [i % 2 == 0 for i in range(10)],
        "weight": [0.5] * 10,
    }
    return datasets.Dataset.from_dict(columns, features)


@pytest.fixture(params=["parquet file", "parquet shards", "save_to_disk", "dict to disk", "arrow file"])
def stored(request, rows, tmp_path) -> Path:
    root = tmp_path / "stored"
    root.mkdir()
    if request.param == "parquet file":
        rows.to_parquet(root / "a.parquet")
        return root / "a.parquet"
    if request.param == "parquet shards":
        for i in range(2):
            rows.select(range(5 * i, 5 * i + 5)).to_parquet(root / f"train-0000{i}-of-00002.parquet")
        rows.select([3]).to_parquet(root / "test-00000-of-00001.parquet")
    elif request.param == "save_to_disk":
        rows.save_to_disk(root, num_shards=2)
    elif request.param == "dict to disk":
        datasets.DatasetDict({"train": rows, "test": rows.select([3])}).save_to_disk(root)
    else:
        rows.save_to_disk(tmp_path / "saved")
        return next((tmp_path / "saved").glob("*.arrow"))
    return root


def greys(table) -> list[int]:
    return table.images[:, 0, 0, 0].tolist()


def test_every_kind_of_file(stored, config):
    table = load_images(**config(stored), channels=1)
    assert greys(table) == list(range(10))
    assert table.class_names == tuple(NAMES)
    assert table.labels.tolist() == [i % 3 for i in range(10)]
    subset = load_images(**config(stored, subset={"fine_label": ["cow", "zebra"], "size": 20}), channels=1)
    assert (greys(subset), subset.class_names) == ([5, 6], ("zebra", "cow"))


@pytest.mark.parametrize("kind", ["shards", "dict"])
def test_splits(kind, rows, tmp_path, config):
    if kind == "dict":
        datasets.DatasetDict({"train": rows, "test": rows.select([3])}).save_to_disk(tmp_path / "d")
    else:
        for split, part in {"train": rows, "test": rows.select([3])}.items():
            (tmp_path / "d" / split).mkdir(parents=True)
            part.to_parquet(tmp_path / "d" / split / "0.parquet")
    assert greys(load_images(**config(tmp_path / "d", split="test"), channels=1)) == [3]
    with pytest.raises(DataError, match="data.split is 'dev'.*it has"):
        load_images(**config(tmp_path / "d", split="dev"), channels=1)


@pytest.mark.parametrize(
    ("column", "names", "labels"),
    [
        ("fine_label", ("zebra", "ant", "cow"), [i % 3 for i in range(10)]),
        ("size", ("10", "20", "30"), [2] * 4 + [1] * 4 + [0] * 2),
        ("round", ("false", "true"), [1, 0] * 5),
    ],
)
def test_label_columns(rows, tmp_path, config, column, names, labels):
    rows.to_parquet(tmp_path / "a.parquet")
    table = load_images(**config(tmp_path, label_column=column), channels=1)
    assert (table.class_names, table.labels.tolist()) == (names, labels)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"image_column": "picture"},
            "data.image_column names the column 'picture'.*it has 'img', 'fine_label'",
        ),
        ({"label_column": "sizes"}, "data.label_column .*did you mean 'size'.*it has 'img'"),
        (
            {"label_column": "weight"},
            "row 0 has a float in the column 'weight'.*words, whole numbers or booleans",
        ),
        ({"subset": {"colour": "red"}}, "data.subset names the column 'colour'.*it has 'img'"),
        ({"subset": {"fine_label": ["cat"]}}, "data.subset.fine_label asks for 'cat'.*'ant', 'cow', 'zebra'"),
        ({"subset": {"fine_label": "zebar"}}, "did you mean 'zebra'"),
        ({"subset": {"size": 31}}, "asks for 31, which never occurs; there are 10, 20, 30"),
        ({"subset": {"size": 10, "fine_label": "ant"}}, "no row that fits data.subset"),
    ],
    ids=str,
)
def test_columns_and_values_that_are_not_there(rows, tmp_path, config, keys, message):
    rows.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        load_images(**config(tmp_path, **keys), channels=1)


def write(file: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), file)
    return file


def png(tmp_path, value: int) -> bytes:
    picture(value).save(tmp_path / "x.png")
    return (tmp_path / "x.png").read_bytes()


def test_images_in_plain_columns(tmp_path, config):
    pixels = np.full((2, 8, 8), 5, np.uint8)
    pixels[1] = 6
    nested = write(tmp_path / "nested.parquet", Image=pixels.tolist(), CLASS=["b", "a"])
    table = load_images(**config(nested), channels=1)
    assert (greys(table), table.class_names, table.labels.tolist()) == ([5, 6], ("a", "b"), [1, 0])
    raw = write(tmp_path / "raw.parquet", photo=[png(tmp_path, 5), png(tmp_path, 6)])
    assert greys(load_images(**config(raw), channels=1)) == [5, 6]
    unknown = write(tmp_path / "unknown.parquet", thing=[png(tmp_path, 5)])
    with pytest.raises(DataError, match="set data.image_column to one of 'thing'"):
        load_images(**config(unknown), channels=1)
    assert greys(load_images(**config(unknown, image_column="thing"), channels=1)) == [5]


def test_image_columns_are_known_by_type(tmp_path, config):
    features = datasets.Features({"thing": datasets.Image(), "kind": datasets.ClassLabel(names=["x", "y"])})
    rows = datasets.Dataset.from_dict({"thing": [picture(1), picture(2)], "kind": [1, 0]}, features)
    rows.to_parquet(tmp_path / "a.parquet")
    table = load_images(**config(tmp_path), channels=1)
    assert (greys(table), table.class_names, table.labels.tolist()) == ([1, 2], ("x", "y"), [1, 0])


def test_rows_without_labels(tmp_path, config):
    file = write(tmp_path / "a.parquet", image=[png(tmp_path, 5), png(tmp_path, 6)], label=["a", None])
    assert load_images(**config(file), channels=1).labels is None
    with pytest.raises(DataError, match="row 1 has no label in the column 'label'"):
        load_images(**config(file, label_column="label"), channels=1)


def test_hidden_labels(tmp_path, config):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x"])})
    rows = datasets.Dataset.from_dict({"image": [picture(1)], "label": [-1]}, features)
    rows.to_parquet(tmp_path / "a.parquet")
    assert load_images(**config(tmp_path), channels=1).labels is None


def test_broken_files(tmp_path, config):
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / name).write_bytes(b"PAR1 or not")
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            load_images(**config(tmp_path / name), channels=1)
    with pytest.raises(DataError, match=r"holds \.arrow and \.parquet files"):
        load_images(**config(tmp_path), channels=1)


def test_more_rows_than_bytes(tmp_path, config, little_memory):
    """A run of a million equal values takes no bytes, but no images are in it."""
    write(tmp_path / "a.parquet", image=pa.nulls(10**7, pa.binary()))
    assert (tmp_path / "a.parquet").stat().st_size < 10**6
    with little_memory(), pytest.raises(DataError, match=r"a\.parquet cannot be read: 10000000 rows in"):
        load_images(**config(tmp_path / "a.parquet"), channels=1)


@pytest.mark.parametrize("nested", [False, True])
def test_a_value_that_is_stored_once(tmp_path, config, little_memory, monkeypatch, nested):
    """Rows take memory by what they stand for, not by what the file has of them: here 2 GiB in some kilobytes."""
    monkeypatch.setattr(tabular, "BATCH_BYTES", 2**25)
    monkeypatch.setattr(cache, "CHUNK_BYTES", 2**25)
    padded = png(tmp_path, 5) + bytes(2**23)
    images = pa.DictionaryArray.from_arrays(pa.array([0] * 256, pa.int32()), pa.array([padded], pa.binary()))
    column = pa.StructArray.from_arrays([images, pa.nulls(256, pa.string())], ["bytes", "path"]) if nested else images
    names = pa.DictionaryArray.from_arrays(pa.array([0] * 255 + [1], pa.int32()), pa.array(["a" * 2**22, "b"]))
    file = tmp_path / "a.parquet"
    table = pa.table({"image": column, "label": names})
    pq.write_table(table, file, compression="zstd", store_schema=False, dictionary_pagesize_limit=2**24)
    assert file.stat().st_size < 10_000
    with little_memory():
        table = load_images(**config(file), channels=1)
    assert greys(table) == [5] * 256 and table.labels.tolist() == [0] * 255 + [1]


def test_lists_that_are_stored_as_a_run(tmp_path, config, monkeypatch):
    """A run of equal pixels takes no bytes, however long it is."""
    monkeypatch.setattr(tabular, "GROUP_VALUES", 2**20)
    count = 2**20 + 1
    pixels = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), pa.nulls(count, pa.int8()))
    file = write(tmp_path / "a.parquet", image=pixels)
    assert file.stat().st_size < 10_000
    with pytest.raises(DataError, match=rf"a\.parquet.* {count} values of 'image' in one row group; valid"):
        load_images(**config(file), channels=1)


def test_labels_that_are_lists(tmp_path, config):
    file = write(tmp_path / "a.parquet", image=[png(tmp_path, 5)], label=[["a", "b"]])
    assert load_images(**config(file), channels=1).labels is None
    for keys in ({"label_column": "label"}, {"subset": {"label": "a"}}):
        with pytest.raises(DataError, match="the column 'label' of .*a.parquet holds lists or structures"):
            load_images(**config(file, **keys), channels=1)


@pytest.mark.parametrize("lie", [2**30, 2**31 - 1, 3])
def test_arrow_offsets_that_lead_out_of_the_file(tmp_path, config, lie):
    file = tmp_path / "a.arrow"
    table = pa.table({"image": pa.array([b"abcde"] * 3, pa.binary())})
    with pa.OSFile(str(file), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    true = struct.pack("<4i", 0, 5, 10, 15)
    assert file.read_bytes().count(true) == 1
    file.write_bytes(file.read_bytes().replace(true, struct.pack("<4i", 0, 5, 10, lie)))
    with pytest.raises(DataError, match=r"a\.arrow cannot be read"):
        load_images(**config(file), channels=1)


@pytest.mark.parametrize(
    "features", [{"image": {"_type": "Evil"}}, {"image": 3}, [], {"image": {"_type": ["x"]}}, None]
)
def test_descriptions_of_columns_that_are_none(tmp_path, config, features):
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"image": [b"x"]}).replace_schema_metadata(about)
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet"):
        load_images(**config(tmp_path / "a.parquet"), channels=1)


@pytest.mark.parametrize("cut", [5, 50, 400])
def test_truncated_and_altered_parquet_files(rows, tmp_path, config, cut):
    file = tmp_path / "a.parquet"
    rows.to_parquet(file)
    content = file.read_bytes()
    rng = np.random.default_rng(cut)
    for altered in (content[:-cut], content[:4] + content[4 + cut :]):
        file.write_bytes(altered)
        with pytest.raises(DataError):
            load_images(**config(file), channels=1)
    for _ in range(20):  # bits of the footer, which describes all the rest
        altered = bytearray(content)
        altered[-8 - int(rng.integers(1, 1000))] ^= 1 << int(rng.integers(8))
        file.write_bytes(altered)
        try:
            load_images(**config(file), channels=1)  # some bits do not matter
        except DataError as error:
            assert "a.parquet" in str(error)


def test_files_with_other_columns(tmp_path, config):
    write(tmp_path / "a.parquet", image=[b""])
    write(tmp_path / "b.parquet", image=[b""], label=[1])
    with pytest.raises(DataError, match="b.parquet has the columns 'image', 'label', but .*a.parquet has 'image'"):
        load_images(**config(tmp_path), channels=1)


@pytest.mark.parametrize("source", ["./nowhere", "/no/where", "nowhere.parquet", "a/b/c"])
def test_paths_that_are_not_there(source, config):
    with pytest.raises(DataError, match="no such file or folder"):
        load_images(**config(source), channels=1)


def test_files_of_another_kind(tmp_path, config):
    (tmp_path / "a.zip").touch()
    with pytest.raises(DataError, match="neither .parquet nor .arrow"):
        load_images(**config(tmp_path / "a.zip"), channels=1)


def test_hub_names_offline(tmp_path):
    program = (
        "from gnunet.data import load_images\n"
        "from gnunet.errors import DataError\n"
        "try:\n    load_images('nobody/nothing', resolution=32, channels=3)\n"
        "except DataError as error:\n    print(error)\n"
    )
    root = Path(gnunet.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=600
    )
    assert "data.source is 'nobody/nothing'" in result.stdout
    assert "Valid are noto_emoji, a folder" in result.stdout
    assert "Traceback" not in result.stderr


def test_hub_data_sets(rows, tmp_path, monkeypatch, config):
    rows.save_to_disk(tmp_path / "cached")
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.load_from_disk(tmp_path / "cached")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert greys(load_images(**config("someone/things", split="test"), channels=1)) == list(range(10))
    assert asked == [("someone/things", "test")]
