"""The validation loss by noise level, with the losses of trivial predictors."""

import math

import numpy as np

from gnunet.ablation.analysis.results import Results
from gnunet.ablation.figures.scales import PREDICTORS, draw_predictors, loss_axis
from gnunet.ablation.figures.style import (
    LIGHT,
    SHADES,
    Picture,
    VariantStyle,
    legend_height,
    new_figure,
    render,
    shades,
    variant_legend,
)

_MAX_COLOURED = 8  # variants; more are grey but the baseline


def draw(results: Results, styles: dict[str, VariantStyle]) -> Picture | None:
    """Lines of the conditions in the main setting; None where no record has losses by noise level."""
    study, conditions = results.study, results.by_base_setting[results.main_setting]
    edges = next((record["bank"]["log_snr_edges"] for record in results.found), [0.0])
    bins = range(len(edges) - 1)
    losses = {c: [results.mean(c, "validation_loss", b) for b in bins] for c in conditions}
    predictors = [results.predictors("validation_loss", b) for b in bins]
    finite = [loss for row in losses.values() for loss in row if math.isfinite(loss)]
    if len(bins) < 2 or not finite:
        return None
    coloured = [v for v in study.variants if len(study.variants) <= _MAX_COLOURED or v == study.baseline]
    figure = new_figure(2.8 + legend_height([*coloured, *(PREDICTORS[name][0] for name in predictors[0])]))
    panel = figure.subplots()
    centres = np.add(edges[1:], edges[:-1]) / 2
    for condition, alpha in shades(conditions).items():
        style, grey = styles[condition.variant], condition.variant not in coloured
        line = {"color": LIGHT, "zorder": 1} if grey else {"color": style.colour, "linestyle": style.line, "zorder": 3}
        panel.plot(centres, losses[condition], alpha=alpha, **line)
    loss_axis(panel, "y", [*finite, *(predictor["wiener"] for predictor in predictors if predictor)])
    lines = draw_predictors(panel, {name: [p[name] for p in predictors] for name in predictors[0]}, x=centres)
    panel.set_xlabel("log-SNR (natural logarithm; left: mostly noise)")
    panel.set_ylabel("squared error of v")
    panel.set_title(results.describe_setting(results.main_setting))
    variant_legend(figure, styles, coloured, lines, marker=None)
    caption = (
        "Means over the seeds that trained, and trivial predictors by what they know of the training images: the best "
        "linear filter from their mean and covariance, that from mean and variance, the mean image, and nothing (the "
        f"noisy image, scaled). {SHADES if len(conditions) > len(study.variants) else ''}"
    )
    return render(figure, "noise_levels", "Validation loss by noise level", caption)
