import io
import itertools
import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from gnunet.ablation.analysis.results import Results
from gnunet.ablation.figures import draw_all, train_eval_gap
from gnunet.ablation.figures.style import DIVERGED, MISSING, variant_styles
from gnunet.norms import NORMS

ALWAYS = [
    "forest_validation_loss", "forest_kid_efficientnet_lite0", "log_snr",
    "loss_over_images", "loss_over_time", "difference_over_images", "pareto", "costs", "train_eval_gap",
    "magnitudes", "largest_activations",
]  # fmt: skip
AXES = ["axis_batch_validation_loss", "axis_batch_kid_efficientnet_lite0"]


@pytest.fixture(scope="module", params=["kinds", "batch"])
def drawn(request):
    """A study's name, its pictures by name, and matplotlib's figures in the same order."""
    results = Results(*request.getfixturevalue(f"{request.param}_study"))
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        save = Figure.savefig

        def watched(figure, *args, **options):
            if not figures or figures[-1] is not figure:
                figures.append(figure)
            return save(figure, *args, **options)

        patch.setattr(Figure, "savefig", watched)
        before = dict(matplotlib.rcParams)
        pictures = draw_all(results)
        assert dict(matplotlib.rcParams) == before
    return request.param, {picture.name: picture for picture in pictures}, figures


def texts_in(svg):
    """What is written in an SVG, in its order."""
    return [
        "".join(element.itertext()) for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("}text")
    ]


class TestAll:
    def test_every_figure_is_there(self, drawn):
        study, pictures, _ = drawn
        extra = [*ALWAYS, "samples"] if study == "kinds" else [*AXES, *ALWAYS, "tuning", "samples"]
        assert list(pictures) == extra

    def test_files(self, drawn):
        _, pictures, _ = drawn
        for picture in pictures.values():
            image = Image.open(io.BytesIO(picture.png))
            assert 300 < image.width <= 1101 and "Software" not in image.info
            assert len(picture.png) < 300_000
            assert (picture.svg is None) == (picture.name == "samples")
            if picture.svg:
                assert len(picture.svg) < 300_000 and "<dc:date>" not in picture.svg
                assert len(texts_in(picture.svg)) > 5

    def test_no_words_overlap_or_are_cut(self, drawn):
        _, pictures, figures = drawn
        for name, figure in zip(pictures, figures, strict=True):
            words = list(written(figure))
            page = figure.bbox.padded(2)
            for text, box in words:
                assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, (name, text)
            for (text, box), (other, other_box) in itertools.combinations(words, 2):
                width = min(box.x1, other_box.x1) - max(box.x0, other_box.x0)
                height = min(box.y1, other_box.y1) - max(box.y0, other_box.y0)
                assert width < 1 or height < 3, (name, text, other)


def written(figure):
    """The texts that are to be seen in a figure with their boxes, in pixels."""
    figure.draw_without_rendering()  # legends stay where the last drawing had them, which had another resolution
    hidden = set()
    for panel in figure.findobj(matplotlib.axes.Axes):
        for axis in (panel.xaxis, panel.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low - 1e-9 <= tick.get_loc() <= high + 1e-9:
                    hidden |= {tick.label1, tick.label2}
        if not panel.get_visible():
            hidden |= set(panel.findobj(Text))
        elif not panel.axison:
            hidden |= {text for axis in (panel.xaxis, panel.yaxis) for text in axis.findobj(Text)}
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and text not in hidden:
            yield text.get_text(), text.get_window_extent()


class TestForest:
    def test_rows_are_sorted_with_their_numbers(self, drawn):
        study, pictures, _ = drawn
        texts = texts_in(pictures["forest_validation_loss"].svg)
        if study == "kinds":
            rows = [text for text in texts if text in NORMS]
            assert len(rows) == 20 and "group" not in rows
            assert rows[-2:] == ["none", "pixel"]  # diverged, then missing
            means = [float(text[:-1].replace("−", "-")) for text in texts if re.fullmatch(r"[+−]\d+\.\d+%", text)]
            assert means == sorted(means) and len(means) == 18
            assert any(text.endswith("to ∞, 2 diverged") for text in texts)
        else:
            assert texts.count("missing") == 2 and "3 of 3 diverged" in texts
            assert [t for t in texts if ": " in t and t.startswith("images")] == [
                f"images per normalization batch: {2**i}" for i in range(7)
            ]


@pytest.mark.parametrize("drawn", ["batch"], indirect=True)
class TestAxisPlot:
    def test_ticks_and_legend(self, drawn):
        _, pictures, _ = drawn
        texts = texts_in(pictures["axis_batch_validation_loss"].svg)
        assert [text for text in texts if re.fullmatch(r"[1-9]\d*", text)] == [str(2**i) for i in range(7)] * 2
        assert texts.count("images per normalization batch") == 2
        assert {"group", "layer", "instance", "rms", "none", "batch", "batch_renorm"} <= set(texts)

    def test_marks_are_where_the_records_are(self, drawn, batch_study):
        _, _, figures = drawn
        results = Results(*batch_study)
        left = figures[0].axes[0]
        crosses = [line for line in left.lines if line.get_marker() == "x"]
        assert len(crosses) == 2  # at 1 and 2 images
        [line] = [line for line in left.lines if len(line.get_xdata()) == 7 and line.get_color() == "#E69F00"]
        expected = [results.mean(results.at("batch", [("batch", str(2**i))]), "validation_loss") for i in range(7)]
        np.testing.assert_allclose(line.get_ydata(), expected)


class TestHeatMap:
    def test_colours_are_even_about_zero_and_gaps_stay_empty(self, drawn):
        study, pictures, figures = drawn
        figure = figures[list(pictures).index("log_snr")]
        [image] = figure.axes[0].images
        low, high = image.get_clim()
        assert low == -high < 0
        grid = np.ma.filled(image.get_array(), np.nan)
        labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert grid.shape == (len(labels), 8)
        empty = [label for label, row in zip(labels, grid, strict=True) if label and np.isnan(row).all()]
        assert empty == (["pixel"] if study == "kinds" else ["batch (3 diverged)", "batch_renorm", "batch_renorm"])
        assert ("beyond" in pictures["log_snr"].caption) == bool(np.nanmax(np.abs(grid)) > high)


class TestCurves:
    def test_a_panel_for_each_variant_or_setting(self, drawn, kinds_study):
        study, pictures, figures = drawn
        figure = figures[list(pictures).index("loss_over_images")]
        panels = {panel.get_title(loc="left"): panel for panel in figure.axes if panel.get_visible()}
        if study == "batch":
            assert list(panels) == [f"batch: {2**i}" for i in range(7)]
            return
        assert list(panels) == list(NORMS)
        assert [variant for variant, panel in panels.items() if panel.patches] == ["pixel"]  # hatched
        results = Results(*kinds_study)
        records = results.records(results.at("layer", []))
        [line] = [line for line in panels["layer"].lines if line.get_color() == "#0072B2"]
        losses = [[setting["validation_loss"] for setting in record["validation"]] for record in records]
        np.testing.assert_allclose(line.get_ydata(), np.mean(losses, axis=0))
        crosses = [line for line in panels["none"].lines if line.get_marker() == "x"]
        assert len(crosses) == 2


class TestPareto:
    def test_the_line_joins_what_none_beats(self, drawn, request):
        study, pictures, figures = drawn
        results = Results(*request.getfixturevalue(f"{study}_study"))
        panels = figures[list(pictures).index("pareto")].axes
        for panel, (cost, sign) in zip(
            panels, [("images_per_second", -1), ("saved_mib", 1), ("peak_memory_mib", 1)], strict=True
        ):
            means = [(sign * results.mean(c, cost), results.mean(c, "validation_loss")) for c in results.conditions]
            settings = {setting for setting in means if not np.isnan(setting).any()}
            front = sorted(p for p in settings if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in settings))
            [line] = [line for line in panel.lines if line.get_color() == "0.45"]
            np.testing.assert_allclose(line.get_xdata(), [sign * x for x, _ in front])
            np.testing.assert_allclose(line.get_ydata(), [y for _, y in front])


class TestGap:
    def test_norms_that_depend_on_the_batch(self, drawn):
        study, pictures, figures = drawn
        left, right = figures[list(pictures).index("train_eval_gap")].axes
        labels = [label.get_text() for label in left.get_yticklabels()]
        if study == "kinds":
            assert labels == [kind for kind, norm in NORMS.items() if norm.batch_dependent]
        else:
            assert "batch: 1" in labels and "batch: 2" in labels and "group" not in labels
        hatched = [labels[round(patch.get_y() + 0.4)] for patch in left.patches]
        assert hatched == ([] if study == "kinds" else ["batch: 1"])  # all three seeds diverged
        assert len(right.patches) == len(hatched)
        shown = {line.get_marker(): line.get_xdata()[0] for line in right.lines if line.get_marker() in "D^"}
        assert shown == pytest.approx({"D": -0.03, "^": -0.07})

    def test_conditions_without_a_loss_are_hatched(self, made_up, small_study, monkeypatch):
        text = small_study.partition("seeds:")[0] + (
            "seeds: [0, 1]\nbaseline: group\narms: {group: {set: {}, axes: []}, batch: {model.norm.kind: batch}}\n"
            "axes: {size: {label: size, values: {a: {}, b: {train.adam_beta1: 0.7}, c: {train.adam_beta1: 0.8}}}}\n"
        )
        effects = {"a": 0.1, "b": "missing", "c": "diverged"}
        study = made_up(text, lambda trial: effects[dict(trial.setting)["size"]] if trial.variant == "batch" else 0.0)
        monkeypatch.setattr(train_eval_gap, "render", lambda figure, *_: figure)
        left, right = train_eval_gap.draw(Results(*study)).axes
        assert [label.get_text() for label in left.get_yticklabels()] == ["batch: a", "batch: b", "batch: c"]
        for panel in (left, right):
            assert [patch.get_hatch() for patch in panel.patches] == [MISSING["hatch"], DIVERGED["hatch"]]
            assert [round(patch.get_y() + 0.4) for patch in panel.patches] == [1, 2]
            assert {y for line in panel.lines if line.get_marker() in "oD^" for y in line.get_ydata().round()} == {0}


class TestLittle:
    def test_where_everything_diverged(self, made_up, small_study):
        names = [picture.name for picture in draw_all(Results(*made_up(small_study, lambda trial: "diverged")))]
        assert names == ["axis_size_validation_loss", "forest_validation_loss", "log_snr"]

    def test_one_variant_with_one_seed_and_nothing_else_measured(self, made_up, small_study):
        text = small_study.partition("seeds:")[0] + "seeds: [5]\nbaseline: a\narms: {a: {}}\n"
        study, plan, records, folder = made_up(text, lambda trial: 0.0)
        [(name, record)] = records.items()
        times = {key: None for key in record["times"]} | {"seconds_at": []}
        bare = record | {"metrics": {}, "nearest": None, "magnitudes": None, "saved_mib": None, "times": times}
        (folder / "samples" / f"{name}.png").unlink()
        names = [picture.name for picture in draw_all(Results(study, plan, {name: bare}, folder))]
        assert names == ["loss_over_images"]


class TestSamples:
    def test_a_row_of_tiles_for_each_variant(self, drawn):
        study, pictures, _ = drawn
        image = np.asarray(Image.open(io.BytesIO(pictures["samples"].png)).convert("RGB")).astype(int)
        rows = 21 if study == "kinds" else 19
        assert image.shape[0] == pytest.approx(rows * 72, abs=10)
        colours = np.random.default_rng(0).integers(0, 256, (6, 3))  # the tiles of seed 0, as the grids have them
        tiles = image[32, -6 * 72 + 8 + 32 :: 72]
        np.testing.assert_array_equal(tiles, colours)


class TestStyles:
    def test_every_variant_has_its_own(self):
        variants = [f"variant {i}" for i in range(30)]
        styles = variant_styles(variants, "variant 3")
        assert len({(s.colour, s.marker, str(s.line)) for s in styles.values()}) == 30
        assert styles["variant 3"].colour == "black"
        assert variant_styles(variants[:10], "variant 3").items() <= styles.items()
