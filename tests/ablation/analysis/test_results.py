import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from gnunet.ablation.analysis.formatting import describe, metric_info, percent
from gnunet.ablation.analysis.results import Condition, Results
from gnunet.ablation.analysis.statistics import holm

TWO_AXES = """
title: Two axes
question: Which?
base: {data.resolution: 16, train.total_images: 2000, sampling.num_images: 6}
seeds: [0, 1]
baseline: a
variants:
  a: {set: {}, axes: [size]}
  b: {train.weight_decay: 0.1}
  c: {set: {train.weight_decay: 0.2}, axes: []}
axes:
  size: {label: how large, scale: log, values: {1: {train.adam_beta1: 0.8}, 2: {train.adam_beta1: 0.85}}}
  way: {label: the way, values: {up: {train.adam_eps: 1e-7}, down: {train.adam_eps: 1e-6}}}
"""


@pytest.fixture
def crossed(made_up):
    return Results(*made_up(TWO_AXES, lambda trial: 0.0))


@pytest.fixture(scope="module")
def kinds(kinds_study):
    return Results(*kinds_study)


@pytest.fixture(scope="module")
def batches(batch_study):
    return Results(*batch_study)


class TestConditions:
    def test_conditions_and_their_names(self, crossed):
        labels = [crossed.label(condition) for condition in crossed.conditions]
        assert labels == [
            "a: size 1", "a: size 2",
            "b: size 1, way up", "b: size 1, way down", "b: size 2, way up", "b: size 2, way down",
            "c",
        ]  # fmt: skip
        assert crossed.describe_setting((("size", "1"), ("way", "up"))) == "how large: 1; the way: up"

    def test_the_base_variant_stands_at_the_same_setting(self, crossed):
        pairs = [(c.setting, crossed.label(c.left), crossed.label(c.right)) for c in crossed.contrasts]
        assert len(pairs) == 4 + 2  # b at every setting; c, which crosses nothing, at each of the base's
        assert ((("size", "2"), ("way", "up")), "b: size 2, way up", "a: size 2") in pairs
        assert ((("size", "2"),), "c", "a: size 2") in pairs

    def test_conditions_by_the_settings_of_the_base(self, crossed):
        found = {at: list(map(crossed.label, conditions)) for at, conditions in crossed.by_base_setting.items()}
        sizes = {(("size", s),): [f"a: size {s}", f"b: size {s}, way up", f"b: size {s}, way down", "c"] for s in "12"}
        assert found == sizes

    def test_main_conditions_are_those_where_the_base_trains(self, crossed, monkeypatch):
        assert crossed.main_setting == (("size", "2"),) and crossed.main_conditions == crossed.conditions
        monkeypatch.setattr("gnunet.ablation.analysis.results.MAX_ROWS", 3)
        labels = ["a: size 2", "b: size 2, way up", "b: size 2, way down", "c"]
        assert list(map(crossed.label, crossed.main_conditions)) == labels
        rows = crossed.main_contrast_rows("validation_loss")
        assert [row.label for row in rows] == ["b: size, way", "2, up", "2, down", "c: how large", "2"]

    def test_with_one_axis_its_name_is_left_out(self, batches):
        assert batches.label(Condition("batch", (("batch", "32"),))) == "batch: 32"


class TestScores:
    @pytest.mark.parametrize(("bin_", "examples"), [(None, slice(None)), (3, slice(3, None, 8))])  # bins in turn
    def test_the_loss_is_that_of_the_errors(self, kinds, bin_, examples):
        outcome = kinds.scores(Condition("rms", ()), "validation_loss_precise", bin_)[1]
        errors = np.array(kinds.record(Condition("rms", ()), 1)["errors"]["running"])
        assert outcome.value == pytest.approx(errors[examples].mean())  # bins of equal size
        assert outcome.resampled.mean() == pytest.approx(outcome.value, rel=0.01)

    @pytest.mark.parametrize("bin_", [None, 3])
    def test_weighted_as_in_training(self, kinds, bin_):
        record = kinds.record(Condition("rms", ()), 1)
        errors, bins = np.array(record["errors"]["running"]), np.array(record["bank"]["bins"])
        density, factor = (np.array(record["bank"][key]) for key in ("density", "factor"))
        expected = errors[bins == bin_].mean() if bin_ else (density * factor * errors).sum() / density.sum()
        assert kinds.scores(Condition("rms", ()), "training_loss", bin_)[1].value == pytest.approx(expected)
        lines = kinds.predictors("training_loss", bin_)
        wiener = np.array(record["bank"]["predictors"]["wiener"])
        assert list(lines) == ["wiener", "scalar", "mean", "identity"]
        assert lines["wiener"] / expected == pytest.approx(wiener[3] / errors[3], rel=0.2)

    def test_collapsed_is_worst(self, made_up, small_study):
        results = Results(*made_up(small_study, lambda trial: 5.0 if trial.variant == "b" else 0.0))
        at_one = results.at("b", [("size", "1")])
        assert results.states(at_one) == ["collapsed"] * 2 and results.failures(at_one) == (2, 2)
        for metric in ("validation_loss", "kid_efficientnet_lite0"):
            assert [score.value for score in results.scores(at_one, metric).values()] == [math.inf] * 2
        assert results.word(results.compare(at_one, results.at("a", []), "training_loss"), "training_loss") == "worse"

    def test_records_of_earlier_versions(self, made_up, small_study):
        study, plan, records, folder = made_up(small_study, lambda trial: 0.1 * (trial.variant == "b"))
        for record in records.values():
            record["bank"] = {key: record["bank"][key] for key in ("fingerprint", "log_snr_edges", "bins")}
        results = Results(study, plan, records, folder)
        left, right = results.at("b", [("size", "1")]), results.at("a", [])
        assert results.compare(left, right, "validation_loss").bootstrap
        assert results.compare(left, right, "training_loss").pairs == 0
        assert results.predictors("training_loss") == {} and results.states(left) == ["complete"] * 2

    def test_seeds_outside_of_the_study(self, made_up, small_study):
        study, plan, records, folder = made_up(small_study, lambda trial: 0.0)
        fewer = study.model_copy(update={"seeds": [0]})
        part = replace(plan, trials=[trial for trial in plan.trials if trial.seed == 0])
        outside = Results(fewer, part, records, folder).outside_seeds
        assert set(outside) == {trial.name for trial in plan.trials if trial.seed == 1} and outside
        assert Results(study, plan, records, folder).outside_seeds == []

    def test_batch_statistics_of_a_norm_that_has_none_are_the_same(self, kinds):
        losses = ("validation_loss", "validation_loss_precise", "validation_loss_batch")
        group, batch = ([kinds.mean(Condition(variant, ()), name) for name in losses] for variant in ("group", "batch"))
        assert group[0] == group[1] == group[2]
        assert batch[0] > batch[1] > batch[2]

    def test_diverged_is_worst_and_says_nothing_of_costs(self, kinds):
        none = Condition("none", ())
        assert kinds.states(none) == ["diverged", "diverged", "complete"]
        assert [o.value for o in kinds.scores(none, "validation_loss").values()][:2] == [math.inf, math.inf]
        assert [o.value for o in kinds.scores(none, "recall_dinov2").values()] == [-math.inf, -math.inf]
        assert list(kinds.scores(none, "images_per_second")) == [2]
        assert math.isfinite(kinds.mean(none, "validation_loss"))

    def test_missing_is_left_out(self, kinds):
        assert kinds.scores(Condition("pixel", ()), "validation_loss") == {}
        assert math.isnan(kinds.mean(Condition("pixel", ()), "validation_loss"))
        assert list(kinds.scores(Condition("derf", ()), "kid_efficientnet_lite0")) == [0]

    def test_an_error_that_is_not_finite_is_worst(self, made_up, small_study):
        study, plan, records, folder = made_up(small_study, lambda trial: 0.0)
        name = plan.trials[0].name
        records[name]["errors"]["running"][5] = None
        outcome = Results(study, plan, records, folder).scores(Condition("a", ()), "validation_loss")[0]
        assert outcome.value == math.inf

    def test_trials_on_another_validation_set_are_paired_by_seed(self, made_up, small_study):
        study, plan, records, folder = made_up(small_study, lambda trial: 0.1 * (trial.variant == "b"))
        for trial in plan.trials:
            if trial.variant == "b":
                records[trial.name]["bank"]["fingerprint"] = "another"
        results = Results(study, plan, records, folder)
        difference = results.compare(results.at("b", [("size", "1")]), results.at("a", []), "validation_loss")
        assert difference.pairs == 2 and difference.bootstrap is None and difference.interval == difference.student

    def test_tuning(self, batches):
        tried = batches.plan.tuning_scores
        batch = tried[Condition("batch", (("batch", "2"),))]
        assert list(batch) == ["0.0005", "0.001", "0.002", "0.004"]
        assert batch["0.004"] == math.inf and batch["0.001"] == min(batch.values())
        assert set(tried[Condition("batch_renorm", (("batch", "64"),))].values()) == {None}


def test_verdicts_of_hypotheses(kinds, batches):
    assert kinds.judge(kinds.study.hypotheses[0])[0] == "supported"
    verdict, judged = batches.judge(batches.study.hypotheses[0])
    assert verdict == "supported"
    assert [batches.label(one.left) for one in judged] == ["batch: 2", "batch: 4"]
    assert judged[0].difference.above == 1 and judged[1].difference.pairs == 3


def test_verdicts_are_marked_where_they_do_not_survive_their_number(made_up, small_study):
    text = small_study.replace("seeds: [0, 1]", "seeds: [0, 1, 2, 3, 4]").replace("expect: same", "expect: better")
    results = Results(*made_up(text, lambda trial: 0.0 if trial.variant == "a" else 0.3))
    (hypothesis,) = results.study.hypotheses
    verdict, (higher, better) = results.judge(hypothesis)
    assert (higher.verdict, better.verdict, verdict) == ("supported", "refuted", "refuted")
    assert better.expect == "better" and results.survives(hypothesis)
    steps = np.array(higher.difference.steps)
    assert higher.p == pytest.approx(stats.ttest_1samp(steps, math.log(1.01)).pvalue)
    assert [higher.adjusted_p, better.adjusted_p] == holm([higher.p, better.p])
    assert not replace(higher, adjusted_p=0.06).survives
    assert replace(higher, adjusted_p=0.06, verdict="not enough evidence").survives


class TestStabilityEdge:
    """The rates of the study are 0.001, 0.002 and 0.004."""

    @pytest.fixture
    def results(self, made_up, edge_study):
        def results(edges, missing=()):
            """By variant the largest rate that trains for each seed; a trial above a failing one may train again."""

            def effect(trial):
                rate = float(dict(trial.setting)["rate"])
                if (trial.variant, rate, trial.seed) in missing:
                    return "missing"
                return "diverged" if rate == 2 * edges[trial.variant][trial.seed] else 0.0

            return Results(*made_up(edge_study, effect))

        return results

    def test_is_the_largest_value_up_to_which_all_train(self, results):
        edges = {"group": [0.001, 0.002, 0.0005], "batch": [0.004, 0.004, 0.001]}
        found = results(edges, missing=[("batch", 0.001, 1), ("group", 0.004, 0)])
        group, batch = (found.scores(Condition(variant, ()), "stability_edge") for variant in edges)
        assert {seed: score.value for seed, score in group.items()} == {0: 0.001, 1: 0.002, 2: -math.inf}
        assert {seed: score.value for seed, score in batch.items()} == {0: 0.004, 2: 0.001}  # missing is unknown
        assert batch[2].rounding == pytest.approx(math.log(2))

    def test_is_compared_by_variant(self, results):
        found = results({"group": [0.001] * 3, "batch": [0.004, 0.004, 0.002]})
        verdict, (comparison,) = found.judge(found.study.hypotheses[0])
        assert (verdict, found.label(comparison.left)) == ("not enough evidence", "batch")
        edge = math.log(2) * np.array([2, 2, 1])
        assert comparison.p == pytest.approx(stats.ttest_1samp(edge, math.log(1.5)).pvalue)
        (row,) = found.contrast_rows("stability_edge")
        assert row.label == "batch" and row.difference.pairs == 3 and row.difference.relative > 1

    @pytest.mark.parametrize(("edge", "word"), [(0.004, "better"), (0.002, "better"), (0.001, "unclear")])
    def test_edges_are_known_to_a_step(self, results, edge, word):
        """Of 3 seeds that agree: the ratio of true edges, each below the next on the grid, may be twice or half."""
        found = results({"group": [0.001] * 3, "batch": [edge] * 3})
        difference = found.compare(Condition("batch", ()), Condition("group", ()), "stability_edge")
        assert difference.interval == pytest.approx((edge / 0.002 - 1, edge / 0.0005 - 1), abs=1e-6)
        assert found.word(difference, "stability_edge") == word
        assert difference.p_value(edge / 0.001 - 0.9) == pytest.approx(2 * 0.5**3)

    def test_trials_that_failed_are_counted(self, results):
        found = results({"group": [0.001, 0.002, 0.002], "batch": [0.004] * 3}, missing=[("group", 0.004, 1)])
        counts = {found.label(condition): found.failures(condition) for condition in found.conditions}
        assert counts["group: 0.002"] == (1, 3) and counts["group: 0.004"] == (1, 2)
        assert counts["batch: 0.004"] == (0, 3)


class TestText:
    @pytest.mark.parametrize(
        ("value", "text"),
        [(0.01234, "+1.23%"), (-0.0999, "−9.99%"), (0.1, "+10.0%"), (2.5, "+250%"), (math.inf, "∞"), (-math.inf, "−∞")],
    )
    def test_percent(self, value, text):
        assert percent(value) == text

    @pytest.mark.parametrize(
        ("study", "condition", "mean", "interval", "pairs"),
        [
            ("kinds", Condition("pixel", ()), "", "missing", ""),
            ("kinds", Condition("group", ()), "0", "identical", "3"),
            ("kinds", Condition("none", ()), "", "to ∞, 2 failed", "3"),
            ("batches", Condition("batch", (("batch", "1"),)), "", "3 of 3 failed", "3"),
        ],
        ids=["missing", "identical", "some failed", "all failed"],
    )
    def test_of_a_difference(self, request, study, condition, mean, interval, pairs):
        results = request.getfixturevalue(study)
        text, where, count = describe(results.compare(condition, Condition("group", ()), "validation_loss"))
        assert (text, count) == (mean, pairs) and where.endswith(interval)

    @pytest.mark.parametrize(
        ("name", "label", "worst"),
        [
            ("validation_loss", "validation loss", math.inf),
            ("kid_dinov2", "KID, dinov2", math.inf),
            ("fid", "FID", math.inf),
            ("recall_mine", "recall, mine", -math.inf),
            ("images_per_second", "training speed (images/s)", None),
            ("saved_mib", "saved for backward (MiB)", None),
        ],
    )
    def test_of_metrics(self, name, label, worst):
        metric = metric_info(name)
        assert (metric.label, metric.worst) == (label, worst)
