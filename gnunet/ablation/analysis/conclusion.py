"""What a study shows, in a few sentences at the top of its report."""

from collections import Counter

from gnunet.ablation.analysis.formatting import counted, describe, metric_info
from gnunet.ablation.analysis.results import ContrastRow, Results
from gnunet.ablation.analysis.tables import primary_metric

_NAMED = 3  # conditions that a list names; the rest are counted


def conclusion(results: Results) -> list[str]:
    """Whether the baseline is better than a linear filter, which conditions are better or worse than it in the primary
    metric, and how many claims hold."""
    return [*_against_wiener(results), _contrasts(results), *_verdicts(results)]


def _against_wiener(results: Results) -> list[str]:
    base, wiener = results.study.baseline, results.predictors("training_loss").get("wiener")
    if wiener is None:
        return []
    losses = {at: results.mean(results.at(base, at), "training_loss") for at in results.by_base_setting}
    above = [results.label(results.at(base, at)) for at, loss in losses.items() if not loss < wiener]
    line = f"that of the best linear (Wiener) filter, {wiener:.4g}"
    if not above:
        return [f"The loss of {base} is below {line}."]
    which = base if len(above) == len(losses) else _list(above)
    return [f"The loss of {which} is not below {line}: there the networks do no better than a linear filter."]


def _contrasts(results: Results) -> str:
    """In the main setting, such as the longest training."""
    metric, base, setting = primary_metric(results), results.study.baseline, results.main_setting
    rows = [row for row in results.contrast_rows(metric) if row.contrast and row.difference.pairs]
    if in_setting := [row for row in rows if set(setting) <= set(row.contrast.setting)]:
        rows = in_setting
    by_word: dict[str, list[ContrastRow]] = {"better": [], "worse": [], "same": [], "unclear": []}
    for row in sorted(rows, key=lambda row: -abs(row.difference.finite_mean or 0)):
        by_word[results.word(row.difference, metric)].append(row)
    clear = [f"{_named(results, by_word[word])} {word} than {base}" for word in ("better", "worse") if by_word[word]]
    found = [*(clear or [f"nothing is clearly better or worse than {base}"])]
    found += [f"{len(by_word[word])} {word}" for word in ("same", "unclear") if by_word[word]]
    where = f", {results.describe_setting(setting)}" if in_setting and setting else ""
    number = f"{counted(len(rows), 'comparison')}, 95% intervals, uncorrected"
    return f"By {metric_info(metric).title}{where}: {'; '.join(found)} ({number})."


def _named(results: Results, rows: list[ContrastRow]) -> str:
    texts = []
    for row in rows:
        mean, interval, n = describe(row.difference)
        texts.append(f"{results.label(row.contrast.left)} ({', '.join(filter(None, [mean, interval]))}, n = {n})")
    return _list(texts)


def _list(texts: list[str]) -> str:
    return ", ".join(texts[:_NAMED]) + (f" and {len(texts) - _NAMED} more" if len(texts) > _NAMED else "")


def _verdicts(results: Results) -> list[str]:
    hypotheses = results.study.hypotheses
    if not hypotheses:
        return []
    counts = Counter(results.judge(hypothesis)[0] for hypothesis in hypotheses)
    decided = [h for h in hypotheses if results.judge(h)[0] in ("supported", "refuted")]
    compared = sum(len(hypothesis.comparisons) for hypothesis in hypotheses)
    text = f"Of {counted(len(hypotheses), 'claim')}, {counts['supported']} supported, {counts['refuted']} refuted"
    if decided:
        kept = sum(map(results.survives, decided))
        text += f" (corrected for {counted(compared, 'comparison')}: {kept} of these {len(decided)})"
    return [f"{text}, {len(hypotheses) - len(decided)} without enough evidence."]
