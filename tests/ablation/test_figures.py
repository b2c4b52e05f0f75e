"""Figures of made-up studies: which there are, and the records' data on their axes."""

import io
import math
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from gnunet.ablation.analysis.results import Results
from gnunet.ablation.analysis.statistics import exact_interval
from gnunet.ablation.figures import claims, draw_all
from gnunet.ablation.figures.scales import clip, relative_axis
from gnunet.ablation.figures.style import GREY, variant_styles
from gnunet.norms import NORMS

ALWAYS = [
    "forest_validation_loss", "forest_training_loss", "forest_kid_efficientnet_lite0", "noise_levels", "log_snr",
    "loss_over_images", "difference_over_images", "pareto", "costs", "train_eval_gap",
    "magnitudes", "largest_activations",
]  # fmt: skip
EXPECTED = {
    "kinds": ["claim_1", "claim_2", "claim_3", *ALWAYS, "samples"],
    "batch": [
        "claim_1",
        "claim_2",
        "failures_batch",
        "axis_batch_validation_loss",
        "axis_batch_training_loss",
        "axis_batch_kid_efficientnet_lite0",
        *ALWAYS,
        "tuning",
        "samples",
    ],
}


@pytest.fixture(scope="module", params=EXPECTED)
def drawn(request):
    """A study's name, its results, and its pictures and matplotlib figures by name."""
    results, figures = Results(*request.getfixturevalue(f"{request.param}_study")), {}
    with pytest.MonkeyPatch.context() as patch:
        save = Figure.savefig
        patch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.setdefault(self), save(self, *a, **k)))
        before = dict(matplotlib.rcParams)
        pictures = draw_all(results)
        assert dict(matplotlib.rcParams) == before
    names = [picture.name for picture in pictures]
    return request.param, results, dict(zip(names, pictures, strict=True)), dict(zip(names, figures, strict=True))


def labels_of(panel) -> list[str]:
    return [label.get_text() for label in panel.get_yticklabels()]


def test_figures_are_complete(drawn):
    study, _, pictures, _ = drawn
    assert list(pictures) == EXPECTED[study]
    for picture in pictures.values():
        assert 500 < Image.open(io.BytesIO(picture.png)).width <= 900 and len(picture.png) < 60_000
        assert (picture.svg is None) == (picture.name == "samples")
        assert picture.svg is None or len(ElementTree.fromstring(picture.svg)) > 0


def test_forest_rows_are_sorted_by_their_differences(drawn):
    study, results, _, figures = drawn
    panel, table = figures["forest_validation_loss"].axes
    rows = results.contrast_rows("validation_loss")
    assert labels_of(panel) == [row.label if row.difference else "" for row in rows]
    texts = [text.get_text() for text in table.texts]
    if study == "kinds":
        assert labels_of(panel)[-2:] == ["none", "pixel"]  # diverged, then missing
        means = [row.difference.relative for row in rows if row.difference.by_seed]
        assert means == sorted(means) and any(text.endswith("to ∞, 2 failed") for text in texts)
    else:
        assert texts.count("missing") == 2 and "3 of 3 failed" in texts


@pytest.mark.parametrize("drawn", ["batch"], indirect=True)
def test_axis_plot_has_the_means_and_crosses_for_divergence(drawn):
    _, results, _, figures = drawn
    left = figures["axis_batch_validation_loss"].axes[0]
    assert [label.get_text() for label in left.get_xticklabels()] == [str(2**i) for i in range(7)]
    assert sum(line.get_marker() == "x" for line in left.lines) == 2  # at 1 and 2 images
    [line] = [line for line in left.lines if len(line.get_xdata()) == 7 and line.get_color() == "#E69F00"]
    expected = [results.mean(results.at("batch", [("batch", str(2**i))]), "validation_loss") for i in range(7)]
    np.testing.assert_allclose(line.get_ydata(), expected)


def test_heat_map_colours_are_symmetric_and_missing_rows_empty(drawn):
    study, _, _, figures = drawn
    panel = figures["log_snr"].axes[0]
    [image] = panel.images
    low, high = image.get_clim()
    grid = np.ma.filled(image.get_array(), np.nan)
    assert low == -high < 0 and grid.shape == (len(labels_of(panel)), 8)
    empty = [label for label, row in zip(labels_of(panel), grid, strict=True) if label and np.isnan(row).all()]
    assert empty == (["pixel"] if study == "kinds" else ["batch (3 diverged)", "batch_renorm", "batch_renorm"])


def test_curves_are_the_mean_over_the_seeds(drawn):
    study, results, _, figures = drawn
    panels = {panel.get_title(loc="left"): panel for panel in figures["loss_over_images"].axes if panel.get_visible()}
    if study == "batch":  # in one panel, since the baseline crosses no axis
        [panel] = panels.values()
        faint = {
            line.get_alpha() for line in panel.lines if line.get_color() == "#56B4E9" and len(line.get_xdata()) == 4
        }
        assert len(faint) == 5  # of seven sizes, two are missing
        return
    assert list(panels) == list(NORMS)
    runs = {variant: sum(line.get_marker() == "." for line in panel.lines) for variant, panel in panels.items()}
    assert runs["layer"] == 2 and [variant for variant, count in runs.items() if count == 1] == ["group", "pixel"]
    losses = [[line["validation_loss"] for line in r["validation"]] for r in results.records(results.at("layer", []))]
    [line] = [line for line in panels["layer"].lines if line.get_color() == "#0072B2"]
    np.testing.assert_allclose(line.get_ydata(), np.mean(losses, axis=0))
    predictors = results.predictors("validation_loss")
    drawn_at = [line.get_ydata()[0] for line in panels["layer"].lines if line.get_color() == GREY]
    assert drawn_at == [predictors["wiener"], predictors["scalar"]]
    assert sum(line.get_marker() == "x" for line in panels["none"].lines) == 2


def test_pareto_line_joins_the_conditions_that_none_beats(drawn):
    _, results, _, figures = drawn
    costs = [("images_per_second", -1), ("saved_mib", 1), ("peak_memory_mib", 1)]
    for panel, (cost, sign) in zip(figures["pareto"].axes, costs, strict=True):
        means = [(sign * results.mean(c, cost), results.mean(c, "training_loss")) for c in results.conditions]
        points = {point for point in means if not np.isnan(point).any()}
        front = sorted(p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points))
        [line] = [line for line in panel.lines if line.get_color() == "0.45"]
        np.testing.assert_allclose(np.transpose(line.get_data()), [(sign * x, y) for x, y in front])


def test_gap_is_that_of_norms_that_depend_on_the_batch(drawn):
    study, _, _, figures = drawn
    left, right = figures["train_eval_gap"].axes
    if study == "kinds":
        assert labels_of(left) == [kind for kind, norm in NORMS.items() if norm.batch_dependent]
    hatched = [labels_of(left)[round(patch.get_y() + 0.4)] for patch in left.patches]
    assert hatched == ([] if study == "kinds" else ["batch: 1"])  # all three seeds diverged
    shown = {line.get_marker(): line.get_xdata()[0] for line in right.lines if line.get_marker() in "D^"}
    assert shown == pytest.approx({"D": -0.03, "^": -0.07})


def test_samples_have_the_tiles_of_the_grids(drawn):
    study, _, pictures, _ = drawn
    image = np.asarray(Image.open(io.BytesIO(pictures["samples"].png)).convert("RGB")).astype(int)
    assert image.shape[0] == pytest.approx((21 if study == "kinds" else 19) * 72, abs=10)
    colours = np.random.default_rng(0).integers(0, 256, (6, 3))  # the tiles of seed 0
    np.testing.assert_allclose(image[32, -6 * 72 + 8 + 32 :: 72], colours, atol=2)


def test_claims_have_the_expected_range_and_the_differences(made_up, small_study):
    results = Results(*made_up(small_study, lambda trial: 0.5 if trial.variant == "b" else 0.0))
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "render", lambda figure, *texts: figures.append(figure))
        claims.draw(results, results.study.hypotheses[0], "claim_1")
    panel = figures[0].axes[0]
    higher, same = (collection.get_paths()[0].get_extents() for collection in panel.collections)
    assert (higher.x0, higher.x1) == pytest.approx((0.01, panel.get_xlim()[1]))
    assert (same.x0, same.x1) == pytest.approx((-0.01 / 1.01, 0.01))
    drawn_at = [line.get_xdata()[0] for line in panel.lines if line.get_marker() == "o"]
    assert drawn_at == [result.difference.relative for result in results.judge(results.study.hypotheses[0])[1]]


@pytest.mark.parametrize("drawn", ["batch"], indirect=True)
def test_failures_are_shares_with_exact_intervals(drawn):
    _, _, _, figures = drawn
    lines = [line for line in figures["failures_batch"].axes[0].lines if line.get_color() == "#E69F00"]
    np.testing.assert_allclose(lines[0].get_ydata(), [1, 1 / 3, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(lines[2].get_ydata(), exact_interval(1, 3))


def test_few_far_differences_do_not_stretch_an_axis():
    panel = Figure().subplots()
    relative_axis(panel, "x", [0.01, -0.02, 0.015, 4.0, math.inf], "")
    assert panel.get_xlim()[1] < 0.1
    assert clip(panel, "x", 4.0) == (panel.get_xlim()[1], ">") and clip(panel, "x", 0.01) == (0.01, "")
    assert clip(panel, "x", -math.inf) == (panel.get_xlim()[0], "<")


def test_figures_without_data_are_left_out(made_up, small_study):
    names = [picture.name for picture in draw_all(Results(*made_up(small_study, lambda trial: "diverged")))]
    assert names == [
        "claim_1",
        "failures_size",
        "axis_size_validation_loss",
        "axis_size_training_loss",
        "forest_validation_loss",
        "forest_training_loss",
        "log_snr",
    ]


def test_one_trial_with_a_loss_alone_has_a_curve(made_up, small_study):
    text = small_study.partition("seeds:")[0] + "seeds: [5]\nbaseline: a\nvariants: {a: {}}\n"
    study, plan, records, folder = made_up(text, lambda trial: 0.0)
    [(name, record)] = records.items()
    times = {key: None for key in record["times"]} | {"seconds_at": []}
    bare = record | {"metrics": {}, "nearest": None, "magnitudes": None, "saved_mib": None, "times": times}
    (folder / "samples" / f"{name}.png").unlink()
    assert [p.name for p in draw_all(Results(study, plan, {name: bare}, folder))] == [
        "noise_levels",
        "loss_over_images",
    ]


def test_every_variant_has_a_style_that_does_not_depend_on_later_ones():
    variants = [f"variant {i}" for i in range(30)]
    styles = variant_styles(variants, "variant 3")
    assert len({(s.colour, s.marker, str(s.line)) for s in styles.values()}) == 30
    assert variant_styles(variants[:10], "variant 3").items() <= styles.items()
