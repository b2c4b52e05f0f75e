import numpy as np
import pytest

from gnunet.data import DecodedImages
from gnunet.errors import ConfigError, DataError
from gnunet.evaluation import Scorer, get_metrics, load_extractors, sample_size_warnings
from gnunet.evaluation.features import collect_statistics
from gnunet.evaluation.metrics import compute_metrics
from gnunet.evaluation.reference import reference_statistics

ROWS = np.arange(3, 30)
NAMES = ["fd_pixels", "kid_pixels", "precision_pixels"]


def test_scorer_gives_what_its_parts_give(pixels, noise_images, tmp_path, launch):
    table, images = DecodedImages.from_arrays(noise_images(30)), noise_images(25, seed=1) // 2
    metrics = get_metrics(NAMES, ["pixels"])
    [statistics] = collect_statistics(lambda r: images[r.start : r.stop], 25, [pixels], chunk=4)
    reference = reference_statistics(table, ROWS, pixels, tmp_path)
    expected = compute_metrics(metrics, {"pixels": statistics}, {"pixels": reference})

    def work(processes):
        folder = tmp_path / str(processes.world_size)
        scorer = Scorer(metrics, {"pixels": pixels}, table, ROWS, folder, processes=processes)
        assert scorer.num_features == {"pixels": 48}
        return scorer.score(lambda r: images[r.start : r.stop], 25, chunk=4, processes=processes)

    for world_size in (1, 2, 4):
        assert all(found == expected for found in launch(world_size, work))


def test_extractors_that_metrics_need(tmp_path):
    metrics = get_metrics(["kid_efficientnet_lite0", "fd_efficientnet_lite0"])
    assert list(load_extractors(metrics, sources={}, weights={})) == ["efficientnet_lite0"]
    with pytest.raises(ConfigError, match="absent"):
        load_extractors(metrics, sources={}, weights={"efficientnet_lite0": str(tmp_path / "absent")})
    with pytest.raises(ConfigError, match="own.*absent"):
        load_extractors(get_metrics(["fd_own"], ["own"]), sources={"own": str(tmp_path / "absent")}, weights={})


@pytest.mark.parametrize(("name", "needed"), [("fd_pixels", 2), ("kid_pixels", 3), ("recall_pixels", 4)])
def test_too_few_reference_images(pixels, noise_images, tmp_path, name, needed):
    table, metrics = DecodedImages.from_arrays(noise_images(5)), get_metrics([name], ["pixels"])
    with pytest.raises(DataError, match=f"{name}.*at least {needed}.*given {needed - 1}"):
        Scorer(metrics, {"pixels": pixels}, table, np.arange(needed - 1), tmp_path)
    scorer = Scorer(metrics, {"pixels": pixels}, table, np.arange(needed), tmp_path)
    assert scorer.score(lambda r: table.images[r.start : r.stop], needed)[name] == pytest.approx(
        {"recall_pixels": 1}.get(name, 0), abs=1e-12
    )


def test_warnings_name_metrics_of_too_few_images():
    metrics = get_metrics(["fid", "kid", "fd_dinov2", "precision_dinov2"])
    features = {"inception": 2048, "dinov2": 1024}
    few, between = sample_size_warnings(metrics, 1500, 60_000, features)
    assert few.startswith("fid of 1500 images against 60000") and few.endswith("prefer kid")
    assert between.startswith("fd_dinov2 of 1500 images") and "prefer" not in between
    assert sample_size_warnings(metrics, 50_000, 1000, features)[1].endswith("prefer kid_dinov2")
    assert sample_size_warnings(metrics, 50_000, 50_000, features) == []
