import numpy as np
import pytest
import torch

from gnunet.errors import ConfigError, DataError
from gnunet.evaluation import features
from gnunet.evaluation.features import collect_statistics, extract, stream_features


def source(images):
    return lambda indices: images[indices.start : indices.stop]


def same(a, b):
    return (
        a.moments.count == b.moments.count
        and torch.equal(a.moments.mean, b.moments.mean)
        and torch.equal(a.moments.scatter, b.moments.scatter)
        and torch.equal(a.subset, b.subset)
    )


def test_statistics_are_those_of_all_features(pixels, noise_images):
    images = noise_images(37)
    [found] = collect_statistics(source(images), 37, [pixels], chunk=8)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).reshape(37, -1) / 255
    assert found.moments.count == 37 and found.subset.dtype == torch.float32
    assert torch.equal(found.subset, x)
    torch.testing.assert_close(found.moments.mean, x.double().mean(dim=0))
    torch.testing.assert_close(found.moments.covariance, torch.cov(x.double().T))


@pytest.mark.parametrize("chunk", [4, 16])
def test_statistics_are_bit_identical_for_any_world_size(efficientnet, noise_images, launch, chunk):
    images = noise_images(45, size=16)
    [single] = collect_statistics(source(images), 45, [efficientnet], chunk=chunk)
    asked = []

    def work(processes):
        def taken(indices):
            asked.append((processes.rank, indices))
            return images[indices.start : indices.stop]

        return collect_statistics(taken, 45, [efficientnet], chunk=chunk, processes=processes)

    for world_size in (2, 3, 4):
        asked.clear()
        for [found] in launch(world_size, work):
            assert same(found, single)
        chunks = [range(start, min(start + chunk, 45)) for start in range(0, 45, chunk)]
        assert {(i % world_size, indices) for i, indices in enumerate(chunks)} <= set(asked)
        assert len(asked) == -(-len(chunks) // world_size) * world_size  # all keep in step


def test_features_do_not_depend_on_the_number_of_threads(efficientnet, noise_images, with_threads):
    first, *others = with_threads(lambda: extract(efficientnet, noise_images(20, size=16)))
    assert all(torch.equal(first, other) for other in others)


def test_several_extractors_see_the_same_images_once_and_keep_a_subset(pixels, extractor_of, noise_images, monkeypatch):
    monkeypatch.setattr(features, "MAX_SUBSET", 7)
    images, asked = noise_images(50), []
    mean = extractor_of(lambda batch: batch.float().mean(dim=(2, 3)))

    def taken(indices):
        asked.append(indices)
        return images[indices.start : indices.stop]

    first, second = collect_statistics(taken, 50, [pixels, mean], chunk=6)
    assert asked == [range(start, min(start + 6, 50)) for start in range(0, 50, 6)]
    assert first.moments.count == second.moments.count == 50
    assert torch.equal(first.subset, extract(pixels, images[np.arange(7) * 50 // 7]))
    torch.testing.assert_close(second.subset, first.subset.view(7, 3, 16).mean(dim=2) * 255)


def test_progress_counts_the_images_of_all_ranks(pixels, noise_images, launch):
    def work(processes):
        done = []
        options = {"chunk": 3, "processes": processes, "progress": done.append}
        chunks = [list(indices) for indices, _ in stream_features(source(noise_images(20)), 20, [pixels], **options)]
        return chunks, done

    for chunks, done in launch(2, work):
        assert sum(chunks, []) == list(range(20)) and done == [6, 12, 18, 20]


def test_grey_is_rgb_of_equal_channels(efficientnet, noise_images):
    grey = noise_images(3, size=8, channels=1)
    assert torch.equal(extract(efficientnet, grey), extract(efficientnet, np.repeat(grey, 3, axis=3)))


def test_invalid_images_raise(pixels, noise_images):
    with pytest.raises(DataError, match="no images"):
        collect_statistics(source(noise_images(0)), 0, [pixels])
    for images in (noise_images(2)[0], noise_images(0), noise_images(2, channels=4)):
        with pytest.raises(ValueError, match="shape"):
            extract(pixels, images)
    with pytest.raises(TypeError, match="torch.float64"):
        extract(pixels, noise_images(2) / 255)


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (lambda images: images.float(), r"\(2, 3, 4, 4\)"),
        (lambda images: (images,), "tuple"),
        (lambda images: images.flatten(1) / 0, "not finite"),
    ],
)
def test_invalid_features_raise(extractor_of, noise_images, network, named):
    with pytest.raises(ConfigError, match=f"pixels.*{named}"):
        extract(extractor_of(network), noise_images(2))
