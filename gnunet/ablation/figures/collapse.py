"""How often trials do not train, against a study's axis."""

import numpy as np
from matplotlib.ticker import PercentFormatter

from gnunet.ablation.analysis.results import Results
from gnunet.ablation.analysis.statistics import exact_interval
from gnunet.ablation.figures.scales import dodge, positions, study_axis
from gnunet.ablation.figures.style import Picture, VariantStyle, legend_height, new_figure, render, variant_legend
from gnunet.ablation.plan import settings_of

_IN_A_PANEL = 4  # variants


def draw(results: Results, styles: dict[str, VariantStyle], axis: str) -> Picture | None:
    """The share of seeds that collapsed or diverged, by variant; None where the axis has no numbers or none did."""
    study = results.study
    variants = [variant for variant in study.variants if study.axes_of(variant) == [axis]]
    at = settings_of(study, [axis])
    counts = {variant: [results.failures(results.at(variant, setting)) for setting in at] for variant in variants}
    if study.axes[axis].scale == "category" or not any(failed for row in counts.values() for failed, _ in row):
        return None
    rows = -(-len(variants) // (2 * _IN_A_PANEL))
    figure = new_figure(1.9 * rows + legend_height(variants))
    panels = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).flat
    for i, panel in enumerate(panels):
        shown = variants[i :: 2 * rows]
        study_axis(panel, study.axes[axis])
        panel.set_xlabel("")
        for variant, shift in zip(shown, dodge(study.axes[axis], len(shown)), strict=True):
            style, x = styles[variant], positions(study.axes[axis]) + 3 * shift
            shares = [failed / found if found else np.nan for failed, found in counts[variant]]
            panel.plot(x, shares, color=style.colour, linestyle=style.line, marker=style.marker)
            for place, (failed, found) in zip(x, counts[variant], strict=True):
                if found:
                    panel.plot([place] * 2, exact_interval(failed, found), color=style.colour, linewidth=0.8)
        panel.yaxis.set_major_formatter(PercentFormatter(1))
    figure.supxlabel(study.axes[axis].label, fontsize=9)
    figure.supylabel("did not train", fontsize=9)
    variant_legend(figure, styles, variants)
    caption = (
        "Share of the seeds that diverged, or collapsed: ended no better than what is known from the mean and variance "
        "of the training images. Exact 95% intervals (Clopper & Pearson, 1934), of the seeds alone."
    )
    return render(figure, f"failures_{axis}", f"Trials that did not train against {study.axes[axis].label}", caption)
