import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from gnunet.data.sources import open_source
from gnunet.errors import DataError

ROWS = [
    {"file_name": "b/2.png", "kind": "dark", "size": 3, "is_round": True, "weight": 0.5},
    {"file_name": "./a/1.png", "kind": "dark", "size": 20, "is_round": False, "weight": 1.0},
    {"file_name": "b/3.png", "kind": "light", "size": 3, "is_round": True, "weight": 2.5},
]


def write_rows(file, rows):
    """Writes a metadata file of any kind."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".jsonl":
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    else:
        write = {".csv": pa_csv.write_csv, ".parquet": pq.write_table}[file.suffix]
        write(pa.Table.from_pylist(rows), file)
    return file


@pytest.fixture
def folder(tmp_path, write_images):
    return write_images(tmp_path / "images", {"a/1.png": 1, "b/2.png": 2, "b/3.png": 3})


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_columns_of_metadata(folder, load, greys, name):
    write_rows(folder / name, ROWS)
    for keys, classes, labels in (
        ({}, ("a", "b"), [0, 1, 1]),  # none of its columns has the name of a label
        ({"label_column": "kind"}, ("dark", "light"), [0, 0, 1]),
        ({"label_column": "size"}, ("3", "20"), [1, 0, 0]),
        ({"label_column": "is_round"}, ("false", "true"), [0, 1, 1]),
    ):
        table = load(folder, **keys)
        assert (greys(table), table.class_names, table.labels.tolist()) == ([1, 2, 3], classes, labels)
        assert dict(table.unread) == {}
    assert greys(load(folder, subset={"kind": "dark", "size": [3]})) == [2]
    assert open_source(str(folder), "train").values("weight") == [1.0, 0.5, 2.5]
    with pytest.raises(DataError, match=r"a/1.png.* a float in the column 'weight'"):
        load(folder, label_column="weight")


def test_the_rows_are_those_that_datasets_reads(folder):
    write_rows(folder / "metadata.csv", [{**row, "label": row["kind"]} for row in ROWS])
    rows = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    source = open_source(str(folder), "train")
    expected = {image["path"]: label for image, label in zip(
        rows.cast_column("image", datasets.Image(decode=False))["image"], rows["label"], strict=True)}  # fmt: skip
    assert dict(zip(map(str, source.files), source.labels(), strict=True)) == expected
    assert {*rows.column_names} == {*source.columns}


def test_further_files(folder, write_images, load, greys):
    write_images(folder, {"masks/1.png": 11, "masks/2.png": 12})
    rows = [{**ROWS[0], "mask_file_name": "masks/2.png"}, {**ROWS[1], "mask_file_name": "masks/1.png"}, ROWS[2]]
    write_rows(folder / "metadata.jsonl", rows)
    assert (greys(load(folder)), greys(load(folder, image_column="image"))) == ([1, 2, 3], [1, 2, 3])
    assert greys(load(folder, image_column="mask", on_error="skip")) == [11, 12]  # in the order of the images
    with pytest.raises(DataError, match=r"belongs to .*b/3.png"):
        load(folder, image_column="mask")
    write_rows(folder / "metadata.jsonl", [{"mask_file_name": row["file_name"]} for row in ROWS])
    (folder / "dataset.json").write_text('{"name": "of another program"}')
    assert greys(load(folder, on_error="skip")) == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.csv", "file_name,x\na/1.png,1\nb/4.png,2\n", "metadata.csv row 3.*b/4.png"),
        ("metadata.csv", "file_name,x\na/1.png,1\na//1.png,2\n", "metadata.csv row 3.*a//1.png is in another"),
        ("metadata.csv", "file_name,x\na/1.png,1\n,2\n", "metadata.csv row 3.*None is not"),
        ("metadata.csv", "file_name,x\na/1.png,1\nb/2.png\n", "metadata.csv.*Expected 2 columns, got 1.*b/2.png"),
        ("metadata.csv", "filename,x\na/1.png,1\n", "metadata.csv.*'file_name'.*did you mean 'filename'"),
        ("metadata.csv", "file_name;x\na/1.png;1\n", "metadata.csv.*'file_name;x'"),
        ("metadata.csv", "file_name,x,x\na/1.png,1,2\n", "metadata.csv.*'x', 'x'"),
        ("metadata.csv", "", "metadata.csv.*mpty"),
        ("metadata.csv", "file_name\n", "metadata.csv.*0 rows"),
        ("metadata.csv", "file_name\n../secret.png\n", "metadata.csv row 2.*../secret.png"),
        ("metadata.csv", "file_name\n/etc/x.png\n", "metadata.csv row 2.*/etc/x.png"),
        ("metadata.csv", "file_name\nnotes.txt\n", "metadata.csv row 2.*notes.txt"),
        ("metadata.jsonl", '{"file_name": "a/1.png"}\n{"file_name": \n', "metadata.jsonl.*row 2"),
        ("metadata.jsonl", '{"file_name": "a/1.png"}\n[1]\n', "metadata.jsonl.*row 2.*JSON object"),
        ("metadata.jsonl", '{"file_name": "a/1.png"}\n{"x": 1}\n', "metadata.jsonl row 2.*None is not"),
        ("metadata.jsonl", '{"file_name": "a/1.png"}\n{"file_name": 5}\n', "metadata.jsonl row 2.* 5 is not"),
        ("metadata.csv", b"file_name,x\na/1.png,\xe9\n", "metadata.csv.*UTF-8"),
        ("metadata.jsonl", "{}\n", "metadata.jsonl.*1 rows"),
        ("metadata.jsonl", "[" * 10**6, "metadata.jsonl.*row 1"),
        ("metadata.jsonl", '{"file_name": "a/1.png"}\n' * 4, "metadata.jsonl.*4 rows"),
        ("metadata.parquet", "PAR1", "metadata.parquet"),
        ("dataset.json", '{"labels": [["a/1.png", 1], ["b/2.png"]]}', "dataset.json.*row 1.*b/2.png"),
        ("dataset.json", '{"labels": [["a/1.png", 1], ["b/4.png", 1]]}', "dataset.json row 1.*b/4.png"),
    ],
)
def test_errors_name_file_and_row(folder, load, name, content, message):
    (folder / "notes.txt").write_text("")
    (folder.parent / "secret.png").write_bytes((folder / "a" / "1.png").read_bytes())
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        load(folder)


def test_values_are_text_numbers_and_booleans(folder):
    names = [row["file_name"] for row in ROWS]
    day = pa.array([0, 1, None], pa.timestamp("s"))
    kind = pa.array(["b", "a", "b"]).dictionary_encode()
    table = pa.table({"file_name": names, "kind": kind, "day": day, "box": [{"x": 1}] * 3})
    pq.write_table(table, folder / "metadata.parquet")
    source = open_source(str(folder), "train")
    assert (source.columns, source.values("kind")) == (["image", "kind", "day", "label"], ["a", "b", "b"])
    assert source.values("day") == ["1970-01-01 00:00:01", "1970-01-01 00:00:00", None]


def test_metadata_of_arrays(tmp_path):
    for i in range(2):
        np.save(tmp_path / f"{i}.npy", np.zeros((8, 8, 2), np.float32))
    write_rows(tmp_path / "metadata.parquet", [{"file_name": f"{1 - i}.npy", "label": "ab"[i]} for i in range(2)])
    assert open_source(str(tmp_path), "train").labels() == ["b", "a"]


def test_hostile_metadata(folder, load, monkeypatch):
    rows = [{"file_name": "a/1.png", "x": "x" * 1000}] * 10**4
    write_rows(folder / "metadata.parquet", rows)  # 10 MB in few bytes
    with pytest.raises(DataError, match="10000 rows"):
        load(folder)
    (folder / "metadata.parquet").unlink()
    (folder / "metadata.csv").touch()
    with open(folder / "metadata.csv", "r+b") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(DataError, match="metadata.csv.*1099511627776 bytes"):
        load(folder)


def test_images_without_a_row(folder, load, greys):
    write_rows(folder / "metadata.csv", ROWS[1:])
    with pytest.raises(DataError, match=r"1 images .*row.*2.png"):
        load(folder)
    table = load(folder, on_error="skip")
    assert (greys(table), dict(table.unread)) == ([1, 3], {".png": 1})


def test_only_the_metadata_of_the_split_is_read(tmp_path, write_images, load, greys):
    write_images(tmp_path, {"train/1.png": 1, "train/x/2.png": 2, "test/1.png": 3})
    (tmp_path / "test" / "metadata.csv").write_text("broken")
    write_rows(tmp_path / "train" / "x" / "metadata.csv", [{"file_name": "2.png", "label": 7}])
    write_rows(tmp_path / "train" / "metadata.jsonl", [{"file_name": "1.png", "label": 5}])
    table = load(tmp_path)
    assert (greys(table), table.class_names) == ([1, 2], ("5", "7"))
    with pytest.raises(DataError, match="test/metadata.csv"):
        load(tmp_path, split="test")
    (tmp_path / "test" / "metadata.csv").unlink()
    for folder in ("x/", ""):
        next((tmp_path / "train" / folder).glob("metadata.*")).unlink()
    write_rows(tmp_path / "metadata.csv", [{"file_name": f"{name}.png", "label": name[-1]} for name in (
        "train/1", "train/x/2", "test/1")])  # fmt: skip
    assert [greys(load(tmp_path, split=split)) for split in ("train", "test", "all")] == [[1, 2], [3], [3, 1, 2]]


def test_changed_metadata_is_noticed(folder, load):
    write_rows(folder / "metadata.csv", ROWS)
    before = load(folder, label_column="size").labels.tolist()
    write_rows(folder / "metadata.csv", [{**row, "size": i} for i, row in enumerate(ROWS)])
    assert load(folder, label_column="size").labels.tolist() != before


@pytest.mark.parametrize(
    ("labels", "classes"),
    [([["b/2.png", 6], ["a/1.png", 1], ["b\\3.png", 6]], ("1", "6")), (None, ()), ({"background": 0}, ("a", "b"))],
)
def test_edm_labels(folder, load, greys, labels, classes):
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    table = load(folder)
    assert (greys(table), table.class_names) == ([1, 2, 3], classes)
