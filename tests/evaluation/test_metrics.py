import numpy as np
import pytest
import torch

from gnunet.errors import ConfigError, DataError
from gnunet.evaluation import Scorer, get_metrics, load_extractors
from gnunet.evaluation.distances import RunningCovariance, frechet_distance, kernel_distance, precision_recall
from gnunet.evaluation.features import FeatureStatistics, collect_statistics
from gnunet.evaluation.metrics import sample_size_warnings
from tests.tables import make_table


def test_metrics_are_named_by_statistic_and_extractor():
    names = [
        "fid", "kid", "precision_inception", "recall_inception",
        "fd_dinov2", "kid_dinov2", "precision_dinov2", "recall_dinov2",
        "fd_mine", "kid_mine", "precision_mine", "recall_mine",
    ]  # fmt: skip
    metrics = get_metrics(names, ["inception", "dinov2", "mine"])
    assert [metric.name for metric in metrics] == names
    with pytest.raises(ConfigError, match=f"valid: {', '.join(names)}$"):
        get_metrics(["fd_inception"], ["inception", "dinov2", "mine"])
    kid, recall = get_metrics(["kid", "recall_dinov2"])
    assert (kid.extractor, kid.statistic, kid.higher_is_better) == ("inception", "kid", False)
    assert (recall.extractor, recall.statistic, recall.higher_is_better) == ("dinov2", "recall", True)


@pytest.mark.parametrize(
    "name, meant", [("fdi", "fid"), ("fd_dino2", "fd_dinov2"), ("kid_eficientnet_lite0", "kid_efficientnet_lite0")]
)
def test_unknown_name_raises_with_the_closest(name, meant):
    with pytest.raises(ConfigError, match=f"{name}.*'{meant}'\\?.*fid, kid, "):
        get_metrics(["fid", name])
    with pytest.raises(ConfigError, match="zzz"):
        get_metrics(["zzz"])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_scores_are_the_distances_on_every_rank(pixels, noise_images, tmp_path, launch, world_size):
    rows, table = np.arange(3, 60), make_table(noise_images(60))
    images = noise_images(50, seed=1) // 2
    [ours] = collect_statistics(lambda r: images[r.start : r.stop], 50, [pixels], chunk=4)
    [theirs] = collect_statistics(lambda r: table.images[rows[r.start : r.stop]], len(rows), [pixels])
    kid, error = kernel_distance(ours.subset, theirs.subset)
    precision, recall = precision_recall(ours.subset, theirs.subset)
    expected = [
        ("kid_pixels", kid),
        ("kid_pixels_standard_error", error),
        ("recall_pixels", recall),
        ("fd_pixels", frechet_distance(ours.moments, theirs.moments)),
        ("precision_pixels", precision),
    ]
    metrics = get_metrics(["kid_pixels", "recall_pixels", "fd_pixels", "precision_pixels"], ["pixels"])

    def work(processes):
        scorer = Scorer(metrics, {"pixels": pixels}, table, rows, tmp_path, processes=processes)
        return scorer.score(lambda r: images[r.start : r.stop], 50, chunk=4)

    assert [list(scores.items()) for scores in launch(world_size, work)] == [expected] * world_size


def test_only_the_extractors_that_metrics_need_are_loaded(tmp_path):
    metrics = get_metrics(["kid_efficientnet_lite0", "fd_efficientnet_lite0"])
    assert list(load_extractors(metrics, sources={}, weights={})) == ["efficientnet_lite0"]
    with pytest.raises(ConfigError, match="absent"):
        load_extractors(metrics, sources={}, weights={"efficientnet_lite0": str(tmp_path / "absent")})
    with pytest.raises(ConfigError, match="own.*absent"):
        load_extractors(get_metrics(["fd_own"], ["own"]), sources={"own": str(tmp_path / "absent")}, weights={})


@pytest.mark.parametrize(("name", "needed"), [("fd_pixels", 2), ("kid_pixels", 3), ("recall_pixels", 4)])
def test_too_few_images_and_other_features_raise(pixels, noise_images, tmp_path, name, needed):
    table, metrics = make_table(noise_images(5)), get_metrics([name], ["pixels"])
    with pytest.raises(DataError, match=f"given {needed - 1} .*at least {needed}.*{name}"):
        Scorer(metrics, {"pixels": pixels}, table, np.arange(needed - 1), tmp_path)
    scorer = Scorer(metrics, {"pixels": pixels}, table, np.arange(needed), tmp_path)
    with pytest.raises(DataError, match=f"given {needed - 1} .*at least {needed}.*{name}"):
        scorer.score(lambda r: table.images[r.start : r.stop], needed - 1)
    with pytest.raises(ConfigError, match="pixels.* 12 .* 48"):
        scorer.score(lambda r: table.images[r.start : r.stop, ::2, ::2], needed)
    assert scorer.score(lambda r: table.images[r.start : r.stop], needed)[name] == pytest.approx(
        {"recall_pixels": 1}.get(name, 0), abs=1e-12
    )


def test_warnings_name_metrics_of_too_few_images():
    metrics = get_metrics(["fid", "kid", "fd_dinov2", "precision_dinov2"])

    def warnings(num_images, num_reference):
        none = torch.empty(0)
        moments = {
            "inception": RunningCovariance(num_reference, torch.empty(2048), none),
            "dinov2": RunningCovariance(num_reference, torch.empty(1024), none),
        }
        references = {name: FeatureStatistics(each, none) for name, each in moments.items()}
        return sample_size_warnings(metrics, num_images, references)

    few, between = warnings(1500, 60_000)
    assert few.startswith("fid of 1500 images against 60000") and few.endswith("prefer kid")
    assert between.startswith("fd_dinov2 of 1500 images") and "prefer" not in between
    assert warnings(50_000, 1000)[1].endswith("prefer kid_dinov2")
    assert warnings(50_000, 50_000) == []
