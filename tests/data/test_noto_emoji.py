import hashlib
import importlib.util
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import gnunet
from gnunet.data import load_images, sources
from gnunet.errors import DataError

ROOT = Path(gnunet.__file__).parent.parent
ASSETS = ROOT / "assets" / "noto_emoji"
PORTRAITS = ["person", "person-role", "person-gesture", "person-fantasy"]
TONES = ("dark", "light", "medium", "medium_dark", "medium_light", "none")


@pytest.fixture(scope="module")
def rows():
    return pq.read_table(ASSETS / "noto_emoji.parquet").to_pylist()


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("build", ROOT / "assets/noto_emoji/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_counts(rows):
    assert len(rows) == len({row["image"]["path"] for row in rows}) == 3786
    assert len({row["category"] for row in rows}) == 10
    assert len({row["subcategory"] for row in rows}) == 99
    portraits = [row["skin_tone"] for row in rows if row["subcategory"] in PORTRAITS]
    assert Counter(portraits) == {"none": 172, **dict.fromkeys(TONES[:-1], 165)}


def test_readme_has_the_counts(rows):
    readme = (ASSETS / "README.md").read_text()
    for column in ("category", "skin_tone"):
        for name, count in Counter(row[column] for row in rows).items():
            assert "+" in name or f"| {name} | {count:,} |" in readme


def test_licences():
    licence = (ASSETS / "LICENSE").read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    assert "Cal Henderson" in (ASSETS / "LICENSE.emoji-data").read_text()


def test_file_is_the_recorded_one(script):
    assert hashlib.sha256(script.PARQUET.read_bytes()).hexdigest() == script.PARQUET_SHA256


def test_images_are_flat_and_lossless(rows, script):
    for row in rows[::400]:
        image = Image.open(io.BytesIO(row["image"]["bytes"]))
        assert (image.format, image.mode, image.size) == ("WEBP", "RGB", (64, 64))
    transparent = Image.new("RGBA", (2, 1))
    transparent.putpixel((1, 0), (10, 20, 30, 255))
    png = io.BytesIO()
    transparent.save(png, "PNG")
    flat = np.asarray(Image.open(io.BytesIO(script.to_webp(png.getvalue()))))
    assert flat.tolist() == [[[255, 255, 255], [10, 20, 30]]]


def test_rebuilding_gives_the_same_rows(rows, script):
    tones = ["", "1F3FB", "1F3FC-1F3FF", "1F3FD-1F3FD"]
    assert [script.skin_tone(tone) for tone in tones] == ["none", "light", "medium_light+dark", "medium"]
    rebuilt = pq.read_table(io.BytesIO(script.to_parquet(rows)))
    assert rebuilt.to_pylist() == rows
    assert rebuilt.schema == pq.read_schema(script.PARQUET)


def test_default_portraits():
    table = load_images(
        "noto_emoji", resolution=32, channels=3, subset={"subcategory": PORTRAITS}, label_column="skin_tone"
    )
    assert table.images.shape == (997, 32, 32, 3)
    assert table.class_names == TONES
    # Corners are the white that the images were flattened on.
    assert (np.median(table.images[:, 0, 0], axis=0) == 255).all()


def test_category_is_the_label_of_the_whole_set():
    table = load_images("noto_emoji", resolution=8, channels=3)
    assert (len(table), table.num_classes) == (3786, 10)
    assert np.bincount(table.labels)[table.class_names.index("People & Body")] == 2261


def test_missing_file_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "packaged", tmp_path.joinpath)
    with pytest.raises(DataError, match="noto_emoji.parquet"):
        load_images("noto_emoji", resolution=32, channels=3)
