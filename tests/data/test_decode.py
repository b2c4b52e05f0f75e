import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile

from gnunet.data import decode
from gnunet.data.decode import decode_image


def encode(image: Image.Image, kind="PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def picture(mode: str, rows: list) -> Image.Image:
    """A 2x2 image from pixel values."""
    image = Image.new(mode, (2, 2))
    image.putdata([pixel for row in rows for pixel in row])
    return image


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *extra: bytes, pixels: bytes = b"", bits: int = 8) -> bytes:
    """A grey PNG written by hand, whatever its pixels are."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
    body = b"".join([*extra, chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")])
    return b"\x89PNG\r\n\x1a\n" + header + body


def grey_16_png(rows: list[list[int]], *extra: bytes) -> bytes:
    pixels = b"".join(b"\0" + struct.pack(f">{len(row)}H", *row) for row in rows)
    return png(len(rows[0]), len(rows), *extra, pixels=pixels, bits=16)


def palette(transparency=None) -> bytes:
    image = picture("P", [[0, 1], [2, 1]])
    image.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    return encode(image) if transparency is None else encode(image, transparency=transparency)


COLOURS = picture("RGB", [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (1, 2, 3)]])
INKS = picture("CMYK", [[(0, 0, 0, 0), (0, 0, 0, 255)], [(0, 255, 255, 0), (255, 255, 0, 0)]])
GREYS = picture("L", [[0, 50], [100, 255]])
GREY_ALPHA = picture("LA", [[(0, 255), (0, 0)], [(0, 51), (100, 255)]])
COLOUR_ALPHA = picture("RGBA", [[(255, 0, 0, 255), (9, 9, 9, 0)], [(0, 0, 255, 51), (1, 2, 3, 255)]])
RED, GREEN, BLUE, BLACK, WHITE = [255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0], [255, 255, 255]


MODES = {
    "L": (encode(GREYS), [[BLACK, [50] * 3], [[100] * 3, WHITE]]),
    "L+tRNS": (encode(GREYS, transparency=50), [[BLACK, WHITE], [[100] * 3, WHITE]]),
    "1": (encode(picture("1", [[0, 255], [255, 0]])), [[BLACK, WHITE], [WHITE, BLACK]]),
    "RGB": (encode(COLOURS), [[RED, GREEN], [BLUE, [1, 2, 3]]]),
    "RGB+tRNS": (encode(COLOURS, transparency=(0, 255, 0)), [[RED, WHITE], [BLUE, [1, 2, 3]]]),
    "P": (palette(), [[RED, GREEN], [[10, 20, 30], GREEN]]),
    "P+index": (palette(transparency=1), [[RED, WHITE], [[10, 20, 30], WHITE]]),
    # 255 * (1 - 51 / 255) = 204 of white shows through an opacity of 51
    "P+alphas": (palette(transparency=bytes([255, 51, 0])), [[RED, [204, 255, 204]], [WHITE, [204, 255, 204]]]),
    "LA": (encode(GREY_ALPHA), [[BLACK, WHITE], [[204] * 3, [100] * 3]]),
    "RGBA": (encode(COLOUR_ALPHA), [[RED, WHITE], [[204, 204, 255], [1, 2, 3]]]),
    # 65535 / 257 = 255; 257 is one step of 8 bits; 128 is the last value nearer to 0 than to 1
    "16": (grey_16_png([[0, 65535], [257, 32896]]), [[BLACK, WHITE], [[1] * 3, [128] * 3]]),
    "16-rounding": (grey_16_png([[128, 129], [300, 40000]]), [[BLACK, [1] * 3], [[1] * 3, [156] * 3]]),
    "16+tRNS": (grey_16_png([[0, 300], [300, 65535]], chunk(b"tRNS", b"\x01\x2c")), [[BLACK, WHITE], [WHITE, WHITE]]),
    "CMYK": (encode(INKS, "TIFF"), [[WHITE, BLACK], [RED, BLUE]]),
}


@pytest.mark.parametrize(("file", "expected"), MODES.values(), ids=MODES)
def test_modes(file, expected):
    np.testing.assert_array_equal(decode_image(file, 2, 3), expected)


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B"])
def test_16_bit_tiffs(mode):
    values = np.array([[0, 65535], [257, 32896]], {"I": "<i4", "I;16": "<u2", "I;16B": ">u2"}[mode])
    image = Image.frombytes(mode, (2, 2), values.tobytes())
    np.testing.assert_array_equal(decode_image(image, 2, 1)[..., 0], [[0, 255], [1, 128]])


def test_colour_to_grey_is_luma():
    # 0.299, 0.587, 0.114 of 255
    np.testing.assert_array_equal(decode_image(COLOURS, 2, 1)[..., 0], [[76, 150], [29, 2]])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    upright = np.array([[10, 20], [30, 40]], np.uint8)
    stored = [  # what a camera stores for orientations 1 to 8, by the EXIF standard
        upright, upright[:, ::-1], upright[::-1, ::-1], upright[::-1],
        upright.T, np.rot90(upright), upright[::-1, ::-1].T, np.rot90(upright, -1),
    ][orientation - 1]  # fmt: skip
    image = Image.fromarray(np.ascontiguousarray(stored))
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode_image(encode(image, exif=exif), 2, 1)[..., 0], upright)


def test_kinds_of_cells(tmp_path):
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    image, file = Image.fromarray(pixels), tmp_path / "a.png"
    image.save(file)
    for cell in (
        pixels.astype(np.int64), pixels.tolist(), np.moveaxis(pixels, -1, 0), image, encode(image), file, str(file),
        {"bytes": encode(image), "path": None}, {"bytes": None, "path": str(file)},
    ):  # fmt: skip
        np.testing.assert_array_equal(decode_image(cell, 2, 3), pixels)


@pytest.mark.parametrize(
    "cell",
    [
        None, 3, [], [[0.5, 0.5], [1.0, 0.0]], [[0, 256], [0, 0]], [1, 2, 3, 4], np.zeros((2, 2, 7), np.uint8), b"x",
        Image.new("I", (2, 2), 70000), Image.new("F", (2, 2), 70000),
    ],
)  # fmt: skip
def test_cells_that_are_not_images_or_have_no_known_range(cell):
    with pytest.raises((ValueError, OSError)):
        decode_image(cell, 2, 1)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_files_are_errors(kind):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    file = encode(Image.fromarray(noise), kind)
    with pytest.raises((OSError, SyntaxError, ValueError)):
        decode_image(file[: len(file) * 2 // 3], 32, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM"])
def test_images_beyond_the_limit_are_errors(kind, monkeypatch):
    file = encode(Image.new("RGB", (10, 10)), kind)
    assert decode_image(file, 8, 3).shape == (8, 8, 3)
    monkeypatch.setattr(decode, "MAX_PIXELS", 99)
    with pytest.raises(ValueError, match="10 x 10 pixels"):
        decode_image(file, 8, 3)


def tiff(width: int, height: int, tile: int = 0) -> bytes:
    """Deflated grey; with `tile`, in tiles of that side."""
    data = zlib.compress(bytes(1000))
    layout = {322: tile, 323: tile, 324: 8, 325: len(data)} if tile else {273: 8, 278: height, 279: len(data)}
    tags = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1, **layout}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def sized(kind: str, mark: bytes, offset: int, *sides: int, form: str) -> bytes:
    """A small picture whose header, `offset` bytes after `mark`, is changed to declare these sides."""
    file = bytearray(encode(Image.new("L", (4, 4)), kind))
    start, content = file.index(mark) + offset, struct.pack(form, *sides)
    file[start : start + len(content)] = content
    return bytes(file)


BOMBS = {
    "PNG": png(12_000, 12_000), "PNG 2^31": png(2**31 - 1, 2**31 - 1), "PPM": b"P5 12000 12000 255 ",
    "PPM 10^8": b"P5 99999999 99999999 255 ", "GIF": sized("GIF", b",\0\0\0\0", 5, 65_535, 65_535, form="<HH"),
    "JPEG": sized("JPEG", b"\xff\xc0", 5, 65_500, 65_500, form=">HH"),
    "BMP": sized("BMP", b"BM", 18, 2**30, 2**30, form="<ii"), "TIFF": tiff(12_000, 12_000),
    "TIFF 2^31": tiff(2**31, 2**31), "TIFF tile": tiff(16, 16, tile=2**14), "TIFF tile 2^31": tiff(16, 16, tile=2**31),
    "text": png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**24)))),
    "much text": png(8, 8, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20)))] * 70),
    "international text": png(8, 8, chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(2**24)))),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("file", BOMBS.values(), ids=BOMBS)
def test_decompression_bombs_take_no_memory(file, little_memory):
    assert len(file) < 200_000
    refusals = "limit|too large|Too much memory|bomb|cannot identify|exceeds|size|decoder"
    with little_memory(), pytest.raises(Exception, match=refusals):
        decode_image(file, 8, 1)


def test_more_pixels_than_a_file_declares_are_not_unpacked(little_memory):
    file = png(8, 8, pixels=bytes(2**28))
    assert len(file) < 2**20
    with little_memory(2**26):
        assert decode_image(file, 8, 1).max() == 0


@pytest.mark.parametrize("kind", ["ICO", "EPS", "PDF", "TGA", "ICNS", "JPEG2000"])
def test_formats_that_are_not_read(kind, monkeypatch):
    """An icon's image may be larger than it declares; PostScript is a program; JPEG 2000 takes any memory."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("ran"))
    with pytest.raises(OSError, match="cannot identify"):
        decode_image(encode(Image.new("RGB", (32, 32)), kind), 8, 3)


def test_pipes_and_folders_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for cell in (tmp_path / "a.png", {"bytes": None, "path": str(tmp_path / "a.png")}, str(tmp_path)):
        with pytest.raises(FileNotFoundError, match="is not a file"):
            decode_image(cell, 8, 1)


JPEG = encode(Image.new("L", (64, 64)), "JPEG", progressive=True)
LAST_SCAN = JPEG[JPEG.rindex(b"\xff\xda") : -2]
COSTLY = {
    "tall PNG": png(1, 2**26, pixels=bytes(2**20)), "wide PNG": png(2**26, 1, pixels=bytes(2**20)),
    "wide PGM": b"P5 80000000 1 255 ", "plain PPM": b"P3 3000 3000 255 " + b"1 " * 99, "plain PBM": b"P1 9000 9000 ",
    "PPM of another maximum": b"P6 5000 5000 254 ",
    "BMP with RLE": sized("BMP", b"BM", 18, 9000, 9000, 1 | 8 << 16, 1, form="<iiII"),
    "JPEG of many scans": JPEG[:-2].replace(b"\x00\x40\x00\x40", b"\x23\x28\x23\x28", 1) + LAST_SCAN * 50 + JPEG[-2:],
    "TIFF tile": tiff(16, 16, tile=2**14),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("file", COSTLY.values(), ids=COSTLY)
def test_costly_images_are_refused_by_their_headers(file, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="exceed the limit"):
        decode_image(file, 8, 1)


@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
def test_scans_are_those_of_the_first_image(kind, monkeypatch):
    """Not of a thumbnail in its metadata, nor of what cameras append, such as a film."""
    image = Image.new("L", (8, 8), 5)
    file = encode(image, kind, progressive=True, exif=b"Exif\0\0" + encode(image, "JPEG", progressive=True))
    scans = decode._count_scans(file)
    monkeypatch.setattr(decode, "MAX_SCANNED_PIXELS", 64 * scans)
    assert scans == JPEG.count(b"\xff\xda") == decode._count_scans(JPEG)
    assert decode_image(file + JPEG + b"\xff\xda" * 100, 8, 1).max() == 5
    monkeypatch.setattr(decode, "MAX_SCANNED_PIXELS", 64 * scans - 1)
    with pytest.raises(ValueError, match=f"{scans} scans"):
        decode_image(file, 8, 1)


def test_files_of_terabytes_are_not_opened(tmp_path):
    with open(tmp_path / "a.jpg", "wb") as file:
        file.write(JPEG)
        file.truncate(2**40)
    with pytest.raises(ValueError, match="bytes exceed the limit"):
        decode_image(tmp_path / "a.jpg", 8, 1)


def test_no_resampling_where_the_shorter_side_fits():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 13, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode_image(pixels, 8, 3), pixels[:, 2:10])
    np.testing.assert_array_equal(decode_image(pixels.swapaxes(0, 1), 8, 3), pixels.swapaxes(0, 1)[2:10])


@pytest.mark.parametrize("target", [(32, 32), (32, 48), (48, 20)])
@pytest.mark.parametrize("size", [(64, 48), (31, 77), (50, 50), (9, 12), (100, 33), (64, 32)])
def test_resize_to_cover_then_centre_crop(size, target):
    # Values far from 0 and 255: clipped between its two passes, noise would depend on their order.
    pixels = np.random.default_rng(1).integers(90, 166, (size[1], size[0], 3), dtype=np.uint8)
    scale = max(target[1] / size[0], target[0] / size[1])
    width, height = (round(side * scale) for side in size)
    whole = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - target[1]) // 2, (height - target[0]) // 2
    expected = np.asarray(whole)[top:, left:][: target[0], : target[1]].astype(int)
    assert np.abs(decode_image(pixels, target, 3).astype(int) - expected).max() <= 2  # rounding, in each pass


@pytest.mark.parametrize("size", [(64, 48), (31, 77), (50, 50), (16, 8), (1000, 1)])
def test_pad_fits_the_whole_image_on_white(size):
    padded = decode_image(np.full((*size[::-1], 3), 9, np.uint8), (32, 48), 3, "pad")
    rows, columns = (np.flatnonzero((padded != 255).any(axis=(axis, 2))) for axis in (1, 0))
    scale = min(48 / size[0], 32 / size[1])
    assert (len(columns), len(rows)) == tuple(max(1, round(side * scale)) for side in size)
    assert (padded[np.ix_(rows, columns)] == 9).all() and padded.shape == (32, 48, 3)
    assert abs(rows[0] - (31 - rows[-1])) <= 1 and abs(columns[0] - (47 - columns[-1])) <= 1


def test_resize_is_antialiased():
    # Stripes finer than the result's pixels must average out instead of turning into other stripes.
    stripes = np.tile(np.array([0, 255], np.uint8), (256, 128))
    result = decode_image(stripes, 32, 1)
    assert np.abs(result[4:-4, 4:-4].astype(int) - 127).max() <= 2


def test_extreme_shapes_need_little_memory():
    assert decode_image(np.zeros((1, 1_000_000), np.uint8), 64, 1).shape == (64, 64, 1)
