"""The figures of a report, one file for each family."""

from gnunet.ablation.analysis.formatting import sample_metrics
from gnunet.ablation.analysis.results import Results
from gnunet.ablation.figures import axis_plot, costs, curves, differences, magnitudes, samples, train_eval_gap, tuning
from gnunet.ablation.figures.style import Picture, figure_style, variant_styles


def draw_all(results: Results) -> list[Picture]:
    """Draw every figure that the records of a study allow, in the order of the report."""
    study = results.study
    styles = variant_styles(list(study.variants), study.baseline)
    metrics = ["validation_loss", *sample_metrics(results.found)]
    with figure_style():
        drawn = [
            *(axis_plot.draw(results, styles, axis, metric) for axis in study.axes for metric in metrics),
            *(differences.draw_forest(results, styles, metric) for metric in metrics),
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
