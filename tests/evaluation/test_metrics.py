import numpy as np
import pytest

from gnunet.data import DecodedImages
from gnunet.errors import ConfigError
from gnunet.evaluation.distances import frechet_distance, kernel_distance, precision_recall
from gnunet.evaluation.features import collect_statistics
from gnunet.evaluation.metrics import compute_metrics, get_metrics, metric_table
from gnunet.evaluation.reference import reference_statistics


def test_metrics_are_named_by_statistic_and_extractor():
    table = metric_table(["inception", "dinov2", "mine"])
    assert list(table) == [
        "fid", "kid", "precision_inception", "recall_inception",
        "fd_dinov2", "kid_dinov2", "precision_dinov2", "recall_dinov2",
        "fd_mine", "kid_mine", "precision_mine", "recall_mine",
    ]  # fmt: skip
    assert all(metric.name == name for name, metric in table.items())
    kid, recall = get_metrics(["kid", "recall_dinov2"])
    assert (kid.extractor, kid.statistic, kid.higher_is_better) == ("inception", "kid", False)
    assert (recall.extractor, recall.statistic, recall.higher_is_better) == ("dinov2", "recall", True)


@pytest.mark.parametrize(
    "name, meant", [("fdi", "fid"), ("fd_dino2", "fd_dinov2"), ("kid_eficientnet_lite0", "kid_efficientnet_lite0")]
)
def test_unknown_name_raises_with_the_closest(name, meant):
    with pytest.raises(ConfigError, match=f"{name}.*{meant}\\?.*fid, kid, "):
        get_metrics(["fid", name])
    with pytest.raises(ConfigError, match="zzz"):
        get_metrics(["zzz"])


@pytest.fixture
def statistics(extractor_of, noise_images, tmp_path):
    """Statistics of copies of a table under noise of some strength, and the table's own."""
    images = noise_images(60) // 4 + 96
    pixels = extractor_of(lambda x: (x.flatten(1).float() / 128 - 1).square())  # noise moves their mean
    reference = reference_statistics(DecodedImages.from_arrays(images), np.arange(60), pixels, tmp_path)
    noise = np.random.default_rng(1).standard_normal(images.shape)

    def noised(strength):
        copies = (images + strength * noise).clip(0, 255).round().astype(np.uint8)
        [found] = collect_statistics(lambda r: copies[r.start : r.stop], 60, [pixels])
        return found

    return noised, reference


def test_values_are_the_distances(statistics):
    noised, reference = statistics
    ours, theirs = noised(20), reference.statistics
    metrics = get_metrics(["kid_pixels", "recall_pixels", "fd_pixels", "precision_pixels"], ["pixels"])
    values = compute_metrics(metrics, {"pixels": ours}, {"pixels": reference})
    kid = kernel_distance(ours.subset, theirs.subset)
    precision, recall = precision_recall(ours.subset, theirs.subset)
    assert values == {
        "kid_pixels": kid.value,
        "kid_pixels_standard_error": kid.standard_error,
        "recall_pixels": recall,
        "fd_pixels": frechet_distance(ours.moments, theirs.moments),
        "precision_pixels": precision,
    }
    assert list(values) == [
        "kid_pixels", "kid_pixels_standard_error", "recall_pixels", "fd_pixels", "precision_pixels",
    ]  # fmt: skip


def test_distances_rise_with_noise(statistics):
    noised, reference = statistics
    metrics = get_metrics(["fd_pixels", "kid_pixels", "precision_pixels", "recall_pixels"], ["pixels"])
    found = [
        compute_metrics(metrics, {"pixels": noised(strength)}, {"pixels": reference}) for strength in (0, 20, 40, 80)
    ]
    assert found[0] == {
        "fd_pixels": pytest.approx(0, abs=1e-12),
        "kid_pixels": pytest.approx(0, abs=1e-15),
        "kid_pixels_standard_error": pytest.approx(0, abs=1e-15),
        "precision_pixels": 1,
        "recall_pixels": 1,
    }
    for name in ("fd_pixels", "kid_pixels"):
        values = [each[name] for each in found]
        assert values == sorted(values) and len(set(values)) == 4
