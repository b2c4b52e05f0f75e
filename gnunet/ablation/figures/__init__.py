"""The figures of a report, one file for each family."""

from gnunet.ablation.analysis.results import Results
from gnunet.ablation.analysis.tables import main_metrics
from gnunet.ablation.figures import (
    axis_plot,
    claims,
    collapse,
    costs,
    curves,
    differences,
    magnitudes,
    noise_levels,
    samples,
    train_eval_gap,
    tuning,
)
from gnunet.ablation.figures.style import Picture, figure_style, variant_styles


def draw_all(results: Results) -> list[Picture]:
    """Draw every figure that the records of a study allow, in the order of the report."""
    study = results.study
    styles = variant_styles(list(study.variants), study.baseline)
    metrics = main_metrics(results)
    with figure_style():
        drawn = [
            *(claims.draw(results, hypothesis, f"claim_{i}") for i, hypothesis in enumerate(study.hypotheses, start=1)),
            *(collapse.draw(results, styles, axis) for axis in study.axes),
            *(axis_plot.draw(results, styles, axis, metric) for axis in study.axes for metric in metrics),
            *(differences.draw_forest(results, styles, metric) for metric in metrics),
            noise_levels.draw(results, styles),
            differences.draw_heat_map(results),
            *curves.draw(results, styles),
            costs.draw_pareto(results, styles),
            costs.draw_costs(results, styles),
            train_eval_gap.draw(results),
            *magnitudes.draw(results),
            tuning.draw(results),
            samples.draw(results),
        ]
    return [picture for picture in drawn if picture is not None]
