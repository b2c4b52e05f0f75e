import numpy as np
import pytest
import torch

from gnunet.data import DecodedImages
from gnunet.errors import DataError
from gnunet.evaluation import neighbours
from gnunet.evaluation.neighbours import TEXT, TILE, draw_neighbours, nearest_images
from tests.tables import make_table


def test_agrees_with_brute_force(pixels, noise_images, monkeypatch):
    monkeypatch.setattr(neighbours, "PROBES", 40)
    images, samples = noise_images(300), noise_images(7, seed=1)
    rows = np.random.default_rng(2).permutation(300)[:280]
    found = nearest_images(samples, make_table(images), rows, pixels, k=3)
    train, ours = (z.reshape(len(z), -1) / 255.0 for z in (images[rows], samples))
    train, ours = (np.float32(z.transpose()).transpose().astype(np.float64) for z in (train, ours))
    distances = np.linalg.norm(ours[:, None] - train[None], axis=2)
    np.testing.assert_array_equal(found.rows, distances.argsort(axis=1)[:, :3])
    np.testing.assert_allclose(found.distances, np.sort(distances, axis=1)[:, :3], rtol=1e-6)
    among = np.linalg.norm(train[:, None] - train[None], axis=2)
    np.fill_diagonal(among, np.inf)
    among = among.min(axis=1)[np.arange(40) * 7]
    assert found.distance_ratio == pytest.approx(distances.min(axis=1).mean() / among.mean(), rel=1e-6)
    assert found.threshold == pytest.approx(np.quantile(among, 0.05), rel=1e-6)
    assert found.near_duplicate_rate == (distances.min(axis=1) <= found.threshold).mean()


def test_copies_differ_from_new_images(pixels, noise_images):
    images, rows = noise_images(400), np.arange(400)
    fresh = nearest_images(noise_images(200, seed=1), make_table(images), rows, pixels)
    assert 0.97 < fresh.distance_ratio < 1.03 and 0.01 < fresh.near_duplicate_rate < 0.12
    copies = nearest_images(images[50:60], make_table(images), rows, pixels)
    assert copies.distance_ratio == 0 and copies.near_duplicate_rate == 1
    np.testing.assert_array_equal(copies.rows[:, 0], range(50, 60))
    some = nearest_images(
        np.concatenate([images[:10], np.zeros((10, 4, 4, 3), np.uint8)]), make_table(images), rows, pixels
    )
    assert some.near_duplicate_rate == 0.5 and some.distance_ratio > 0.5


def test_equal_distances_go_to_the_first_row(pixels, noise_images):
    images = np.tile(noise_images(2), (150, 1, 1, 1))  # twice in every chunk
    found = nearest_images(images[:2], make_table(images), np.arange(300), pixels, k=3)
    assert found.rows.tolist() == [[0, 2, 4], [1, 3, 5]]
    assert not found.distances.any()
    assert np.isnan(found.distance_ratio) and found.near_duplicate_rate == 1


def test_result_is_identical_for_any_world_size(efficientnet, noise_images, launch, monkeypatch):
    monkeypatch.setattr(neighbours, "PROBES", 20)
    images, samples, rows = noise_images(150, size=8), noise_images(3, seed=1, size=8), np.arange(5, 145)
    alone = nearest_images(samples, make_table(images), rows, efficientnet, k=2)

    def work(processes):
        return nearest_images(samples, make_table(images), rows, efficientnet, k=2, processes=processes)

    for found in launch(2, work):
        np.testing.assert_array_equal(found.rows, alone.rows)
        np.testing.assert_array_equal(found.distances, alone.distances)
        assert (found.distance_ratio, found.near_duplicate_rate) == (alone.distance_ratio, alone.near_duplicate_rate)


def test_memory_does_not_grow_with_the_number(extractor_of, noise_images, monkeypatch):
    monkeypatch.setattr(neighbours, "PROBES", 8)
    sizes, pictures = [], DecodedImages.pictures
    monkeypatch.setattr(DecodedImages, "pictures", lambda table, rows: sizes.append(len(rows)) or pictures(table, rows))
    extractor = extractor_of(lambda batch: batch.flatten(1).float())
    nearest_images(noise_images(3), make_table(noise_images(1000)), np.arange(1000), extractor)
    assert max(sizes) <= 128


def test_too_few_images_raise(pixels, noise_images):
    with pytest.raises(DataError, match="4 nearest of 4 .* 2 samples"):
        nearest_images(noise_images(2), make_table(noise_images(9)), np.arange(4), pixels)
    with pytest.raises(DataError, match="0 samples"):
        nearest_images(noise_images(0), make_table(noise_images(9)), np.arange(9), pixels)


@pytest.mark.parametrize("size, channels", [(4, 3), (4, 1), (200, 3)])
def test_picture_is_sorted_and_marks_copies(extractor_of, size, channels):
    mean = extractor_of(lambda images: images.float().mean(dim=(2, 3)))
    levels = np.array([0, 50, 100, 150, 200, 201], np.uint8)
    images = np.broadcast_to(levels[:, None, None, None], (6, size, size, channels)).copy()
    samples = images[[1, 4]] + np.uint8([20, 1])[:, None, None, None]  # 70, and 201: a copy
    found = nearest_images(samples, make_table(images), np.arange(6), mean, k=2)
    assert found.rows.tolist() == [[1, 2], [5, 4]]
    picture = draw_neighbours(samples, images[found.rows], found)
    across, down = [0, TILE + 6, 2 * TILE + 8], [0, TILE + TEXT + 2]
    assert picture.size == (3 * TILE + 10, 2 * (TILE + TEXT + 2))
    levels = [[picture.getpixel((x + TILE // 2, y + TILE // 2))[0] for x in across] for y in down]
    assert levels == [[201, 201, 200], [70, 50, 100]]  # the copy first
    under = np.asarray(picture.crop((across[1], TILE, across[1] + TILE, TILE + TEXT))).reshape(-1, 3).astype(int)
    assert (under[:, 0] - under[:, 1]).max() > 150  # its distance is red
    under = np.asarray(picture.crop((across[1], down[1] + TILE, across[2], down[1] + TILE + TEXT))).astype(int)
    assert (under[..., 0] - under[..., 1]).max() == 0 and under.min() < 100
    nearest_only = draw_neighbours(samples, images[found.rows], found, limit=1)
    assert np.array_equal(np.asarray(nearest_only), np.asarray(picture)[: TILE + TEXT + 2])


def test_features_are_compared_in_float64(extractor_of):
    far = extractor_of(lambda images: images.flatten(1).float() * 1e-3 + 4000)
    images = np.arange(0, 250, 10, dtype=np.uint8).repeat(48).reshape(25, 4, 4, 3)
    found = nearest_images(images[:5], make_table(images), np.arange(25), far, k=2)
    assert found.rows[:, 0].tolist() == [0, 1, 2, 3, 4] and not found.distances[:, 0].any()
    assert torch.tensor(found.distances[:, 1]).allclose(torch.tensor(0.01 * 48**0.5).double(), rtol=0.05)
