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


def test_values_are_the_distances(pixels, noise_images, tmp_path):
    images, other = noise_images(60), noise_images(60, seed=1) // 2
    reference = reference_statistics(DecodedImages.from_arrays(images), np.arange(60), pixels, tmp_path)
    [ours], theirs = collect_statistics(lambda r: other[r.start : r.stop], 60, [pixels]), reference.statistics
    metrics = get_metrics(["kid_pixels", "recall_pixels", "fd_pixels", "precision_pixels"], ["pixels"])
    values = compute_metrics(metrics, {"pixels": ours}, {"pixels": reference})
    kid = kernel_distance(ours.subset, theirs.subset)
    precision, recall = precision_recall(ours.subset, theirs.subset)
    assert list(values.items()) == [
        ("kid_pixels", kid.value),
        ("kid_pixels_standard_error", kid.standard_error),
        ("recall_pixels", recall),
        ("fd_pixels", frechet_distance(ours.moments, theirs.moments)),
        ("precision_pixels", precision),
    ]
