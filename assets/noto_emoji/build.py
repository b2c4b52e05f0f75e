"""Rebuild the embedded data set, assets/noto_emoji/noto_emoji.parquet, byte for byte from its source.

    python assets/noto_emoji/build.py [TGZ] [--check]

TGZ is the npm package emoji-datasource-google 16.0.0 as `npm pack` writes it; without it, `npm pack` is run.
With --check nothing is written: the result is compared with the committed file. The bytes depend on the
versions in VERSIONS; with others, --check compares every column and every decoded pixel instead.
"""

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import PIL
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, features

PACKAGE = "emoji-datasource-google@16.0.0"
PACKAGE_SHA256 = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
PARQUET = Path(__file__).resolve().parent / "noto_emoji.parquet"
PARQUET_SHA256 = "4b26d7062d6691c6211815589db2f813c77ac2f291ed92a0ba11a914cb03ecbd"
VERSIONS = {"pillow": "13.0.0", "libwebp": "1.6.0", "pyarrow": "26.0.1"}

SKIN_TONES = {
    "1F3FB": "light",
    "1F3FC": "medium_light",
    "1F3FD": "medium",
    "1F3FE": "medium_dark",
    "1F3FF": "dark",
}
TEXT_COLUMNS = ["name", "category", "subcategory", "skin_tone"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tgz", type=Path, nargs="?", metavar="TGZ", help="package; default: run npm pack")
    parser.add_argument("--check", action="store_true", help="compare with the committed file, write nothing")
    arguments = parser.parse_args()

    package = arguments.tgz.read_bytes() if arguments.tgz else npm_pack()
    if (found := hashlib.sha256(package).hexdigest()) != PACKAGE_SHA256:
        sys.exit(f"the package's sha256 is {found}; {PACKAGE} has {PACKAGE_SHA256}")
    built = to_parquet(read_rows(package))
    if arguments.check:
        check(built)
    else:
        PARQUET.write_bytes(built)
        print(f"{PARQUET}: {len(built)} bytes, sha256 {hashlib.sha256(built).hexdigest()}")


def npm_pack() -> bytes:
    """Download the package with npm."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        return next(Path(folder).glob("*.tgz")).read_bytes()


def read_rows(package: bytes) -> list[dict]:
    """One row for each PNG, in Unicode's order (emoji.json's sort_order), plain before skin tones."""
    with tarfile.open(fileobj=io.BytesIO(package), mode="r:gz") as archive:
        files = {
            member.name: archive.extractfile(member).read()
            for member in archive
            if member.name == "package/emoji.json" or member.name.startswith("package/img/google/64/")
        }
    emoji = json.loads(files.pop("package/emoji.json"))
    rows = []
    for entry in sorted(emoji, key=lambda entry: entry["sort_order"]):
        variations = sorted(entry.get("skin_variations", {}).items())
        for tones, variant in [("", entry), *variations]:
            png = files.pop(f"package/img/google/64/{variant['image']}")
            rows.append(
                {
                    "image": {"bytes": to_webp(png), "path": variant["image"]},
                    "name": entry["name"],
                    "category": entry["category"],
                    "subcategory": entry["subcategory"],
                    "skin_tone": skin_tone(tones),
                }
            )
    if files:
        sys.exit(f"{len(files)} images are not in emoji.json, for instance {min(files)}")
    return rows


def skin_tone(code_points: str) -> str:
    """Name of a variation: none, one tone, or for two people of different tones both, as in light+dark."""
    tones = [SKIN_TONES[code_point] for code_point in code_points.split("-") if code_point]
    return "+".join(dict.fromkeys(tones)) or "none"


def to_webp(png: bytes) -> bytes:
    """Flatten an image on white and store it without loss."""
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    out = io.BytesIO()
    flat.save(out, "WEBP", lossless=True, quality=75, method=4)
    return out.getvalue()


def to_parquet(rows: list[dict]) -> bytes:
    """Write the rows with every setting that decides bytes spelled out; images are compressed already."""
    text = {"dtype": "string", "_type": "Value"}
    columns = {"image": {"_type": "Image"}, **dict.fromkeys(TEXT_COLUMNS, text)}
    schema = pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            *((name, pa.string()) for name in TEXT_COLUMNS),
        ],
        # What `datasets` reads to give the column as images.
        metadata={"huggingface": json.dumps({"info": {"features": columns}})},
    )
    out = io.BytesIO()
    pq.write_table(
        pa.Table.from_pylist(rows, schema),
        out,
        version="2.6",
        data_page_version="1.0",
        compression="none",
        use_dictionary=TEXT_COLUMNS,
        write_statistics=TEXT_COLUMNS,
        row_group_size=1000,
        store_schema=True,
    )
    return out.getvalue()


def check(built: bytes) -> None:
    """Compare with the committed file and the recorded sums; exit with status 1 where they differ."""
    committed = PARQUET.read_bytes()
    if (found := hashlib.sha256(committed).hexdigest()) != PARQUET_SHA256:
        sys.exit(f"{PARQUET} has sha256 {found}; recorded is {PARQUET_SHA256}")
    if built == committed:
        print("the same bytes")
        return
    versions = {
        "pillow": PIL.__version__,
        "libwebp": features.version("webp"),
        "pyarrow": pa.__version__,
    }
    if versions == VERSIONS or decoded(built) != decoded(committed):
        sys.exit(f"{PARQUET} differs from what {PACKAGE} gives")
    print(f"the same columns and pixels; the bytes differ, made with {versions} instead of {VERSIONS}")


def decoded(parquet: bytes) -> list[tuple]:
    """Every row of a file with its image decoded."""
    rows = pq.read_table(pa.BufferReader(parquet)).to_pylist()
    return [
        (Image.open(io.BytesIO(row["image"]["bytes"])).tobytes(), row["image"]["path"])
        + tuple(row[name] for name in TEXT_COLUMNS)
        for row in rows
    ]


if __name__ == "__main__":
    main()
