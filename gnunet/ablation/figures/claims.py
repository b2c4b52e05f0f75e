"""A figure for each claim: the differences that it is judged by, and the range that it expects them in."""

from gnunet.ablation.analysis.formatting import describe, metric_info
from gnunet.ablation.analysis.results import Results
from gnunet.ablation.analysis.tables import expectation
from gnunet.ablation.figures.differences import draw_interval
from gnunet.ablation.figures.scales import clip, relative_axis
from gnunet.ablation.figures.style import GREY, LIGHT, ROW, Picture, hatch, new_figure, render
from gnunet.ablation.study import Hypothesis

_COLOURS = {"supported": "#00664a", "refuted": "#a5161b"}  # as in the report's page


def draw(results: Results, hypothesis: Hypothesis, name: str) -> Picture:
    """Two lines for each comparison: what is expected, and the difference with its interval."""
    verdict, found = results.judge(hypothesis)
    figure = new_figure(2.3 * ROW * len(found) + 0.5)
    panel, table = figure.subplots(1, 2, width_ratios=[1.5, 1])
    table.set_axis_off()
    panel.set_ylim(len(found) - 0.4, -0.75)
    panel.set_yticks([])
    panel.grid(visible=False, axis="y")
    panel.spines["left"].set_visible(False)
    margins = [result.difference.within(hypothesis.margin) for result in found]
    ends = [end for result in found for end in (*result.difference.by_seed, *(result.difference.interval or ()))]
    values = [*ends, *(end for margin in margins for end in margin)]
    relative_axis(panel, "x", values, f"difference in {metric_info(hypothesis.metric).title}")
    left, right = panel.get_xlim()
    for y, (result, (low, high)) in enumerate(zip(found, margins, strict=True)):
        colour, difference = _COLOURS.get(result.verdict, GREY), result.difference
        expected = {"same": (low, high), "higher": (high, right), "lower": (left, low)}[result.direction]
        panel.fill_between(expected, y - 0.25, y + 0.25, color=LIGHT, alpha=0.6, linewidth=0, zorder=0)
        panel.plot([0, 0], [y - 0.25, y + 0.25], color="black", linewidth=1)
        place = {"transform": panel.get_yaxis_transform(), "fontsize": 7.5, "va": "center", "in_layout": False}
        panel.text(0.0, y - 0.52, expectation(results, hypothesis, result), **place)
        mean, interval, _ = describe(difference)
        panel.text(1.03, y, f"{mean} ({interval})" if mean else interval, color=colour, **place)
        if difference.pairs == 0:
            hatch(panel, y, diverged=bool(difference.both_diverged), height=0.4)
            continue
        draw_interval(panel, y, difference, colour)
        if difference.finite_mean is not None:
            at, arrow = clip(panel, "x", difference.finite_mean)
            panel.plot(at, y, marker=arrow or "o", color=colour, clip_on=False, zorder=4)
    caption = f"{verdict.capitalize()}. Paired differences with 95% intervals; grey: where the claim expects them."
    return render(figure, name, hypothesis.claim, caption)
