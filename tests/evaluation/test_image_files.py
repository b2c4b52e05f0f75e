import numpy as np
import pytest
from PIL import ExifTags, Image

from gnunet.data.decode import decode_image
from gnunet.errors import DataError
from gnunet.evaluation import ImageFiles


@pytest.fixture
def folder(tmp_path, noise_images):
    """Six pictures of 8 x 8 in colour, some of them in a subfolder, and what is no image of the set."""
    for i, image in enumerate(noise_images(6, size=8)):
        (tmp_path / "sub").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / ("sub" if i > 3 else "") / f"{i}.png")
    Image.new("RGB", (50, 50)).save(tmp_path / "grid.png")
    (tmp_path / "notes.txt").write_text("no image")
    np.save(tmp_path / "statistics.npy", np.zeros(3))
    return tmp_path


def test_reads_the_images_of_the_given_indices(folder, noise_images):
    files = ImageFiles(folder)
    assert (len(files), files.size, files.channels) == (6, (8, 8), 3)
    assert np.array_equal(files.read([5, 0, 5]), noise_images(6, size=8)[[5, 0, 5]])
    assert files.read(range(2, 4)).dtype == np.uint8


def test_grey_and_colour_do_not_mix(tmp_path):
    for i, mode in enumerate(("L", "1", "I;16")):
        Image.new(mode, (8, 8)).save(tmp_path / f"{i}.png")
    files = ImageFiles(tmp_path)
    assert files.channels == 1 and files.read([0, 1, 2]).shape == (3, 8, 8, 1)
    Image.new("RGB", (8, 8)).save(tmp_path / "3.png")
    with pytest.raises(DataError, match=r"3\.png.*in colour.*0\.png.*grey.*--resolution"):
        ImageFiles(tmp_path)
    assert ImageFiles(tmp_path, 8).channels == 3


def test_sizes_do_not_mix_without_a_resolution(folder):
    Image.new("RGB", (16, 16)).save(folder / "sub" / "odd.png")
    with pytest.raises(DataError, match=r"odd\.png.*16 x 16.*0\.png.*8 x 8.*--resolution"):
        ImageFiles(folder)
    files = ImageFiles(folder, 4)
    assert files.read([6]).shape == (1, 4, 4, 3)
    assert np.array_equal(files.read([0])[0], decode_image(files.files[0], 4, 3))


def test_size_is_that_of_upright_images(tmp_path):
    Image.new("RGB", (8, 4)).save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # a quarter turn
    Image.new("RGB", (4, 8)).save(tmp_path / "b.png", exif=exif)
    files = ImageFiles(tmp_path)
    assert files.size == (4, 8) and files.read([0, 1]).shape == (2, 4, 8, 3)
    Image.new("RGB", (4, 8)).save(tmp_path / "c.png")
    with pytest.raises(DataError, match=r"c\.png is 4 x 8 .*a\.png is 8 x 4 "):
        ImageFiles(tmp_path)


def test_no_images_raise(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")
    with pytest.raises(DataError, match=str(tmp_path)):
        ImageFiles(tmp_path)


def test_broken_image_is_named(folder):
    (folder / "broken.png").write_bytes(b"\x89PNG not really")
    with pytest.raises(DataError, match=r"broken\.png"):
        ImageFiles(folder)
    whole = (folder / "0.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])  # its head is fine
    files = ImageFiles(folder)
    with pytest.raises(DataError, match=r"broken\.png"):
        files.read([files.files.index(folder / "broken.png")])
