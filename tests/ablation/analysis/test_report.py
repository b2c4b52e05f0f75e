import re
import sys
from pathlib import Path

import pytest

from gnunet.ablation.analysis.report import write_report
from gnunet.ablation.records import FORMAT, write_record
from gnunet.ablation.study_runner import StudyRunner
from gnunet.errors import ConfigError

TUNING = "tuning: {key: train.learning_rate, values: [1e-3, 2e-3, 3e-3], seeds: [9]}\n"


def worse(trial):
    """b is 10% worse than a at size 1, where one of its trials diverged; at size 2 one of its trials is missing."""
    if trial.variant == "a":
        return 0.0
    size = dict(trial.setting)["size"]
    if trial.seed == 1:
        return "diverged" if size == "1" else "missing"
    return 0.1


@pytest.fixture
def without_figures(monkeypatch):
    """Reports without figures, which take seconds."""
    monkeypatch.setattr("gnunet.ablation.analysis.report.draw_all", lambda results: [])


@pytest.fixture
def report(made_up, without_figures):
    """`report(text, effect, change)`: the Markdown of a made-up study whose records `change` was called with."""

    def write(text, effect, change=lambda records: None):
        made = made_up(text, effect)
        change(list(made[2].values()))
        return write_report(*made, command="gnunet ablate made_up").with_suffix(".md").read_text()

    return write


def rows(markdown, heading):
    """The cells of each row of the table below a heading."""
    return main_rows(markdown.split(f"## {heading}\n")[1].split("\n## ")[0])


def main_rows(section):
    """The cells of each row of the first table."""
    section = section.split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[trial.strip() for trial in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


class TestFiles:
    def test_are_complete_and_the_same_again(self, made_up, small_study):
        study, plan, records, folder = made_up(small_study + TUNING, worse)
        stale = folder / "figures" / "of_an_earlier_report.png"
        stale.parent.mkdir()
        stale.touch()
        path = write_report(study, plan, records, folder, command="gnunet ablate made_up --budget tiny")
        assert path == folder / "report.html"
        files = sorted(folder.glob("report.*")) + sorted((folder / "figures").iterdir())
        before = [file.read_bytes() for file in files]
        assert stale not in files

        write_report(
            study, plan, dict(reversed(records.items())), folder, command="gnunet ablate made_up --budget tiny"
        )
        assert [file.read_bytes() for file in files] == before

        page, markdown = path.read_text(), (folder / "report.md").read_text()
        shown = set(re.findall(r"\]\((figures/[^)]+)\)", markdown))
        assert shown == {f"figures/{file.name}" for file in files if file.parent.name == "figures"}
        names = ("claim_1.png", "axis_size_validation_loss.png", "samples.png", "tuning.png")
        assert {f"figures/{name}" for name in names} <= shown
        # One file: pictures are in the page, and nothing is loaded.
        assert page.count("<svg") == len(shown) - 1 and page.count("<img") == 1  # the samples are pixels
        links = re.findall(r'(?:src|href)="([^"]*)', page)
        assert links and all(link.startswith(("#", "data:")) for link in links)
        assert "gnunet ablate made_up --budget tiny --report" in page and "--budget tiny --report" in markdown
        ids = re.findall(r' id="([^"]+)"', page)
        assert len(ids) == len(set(ids))
        assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', page)) <= set(ids)

    def test_what_users_write_is_text(self, made_up, small_study, without_figures):
        page = write_report(*made_up(small_study, worse), command="gnunet ablate made_up")
        text = page.read_text()
        assert "<h1>Two &lt;variants&gt;</h1>" in text and "b is &lt;worse&gt; | here" in text
        assert "b is &lt;worse> \\| here" in page.with_suffix(".md").read_text()


class TestFindsRecords:
    """Of a run with other flags than the report."""

    @pytest.fixture
    def runner(self, made_up, small_study, without_figures, tmp_path, monkeypatch):
        """`runner(runs, **given)`: a runner, after runs with these (folder, images)."""
        monkeypatch.chdir(tmp_path)

        def open_after(runs, budget=None, folder=None, only=()):
            for name, images in runs:
                text = small_study.replace("total_images: 2000", f"total_images: {images}")
                for record in made_up(text, worse)[2].values():
                    write_record(tmp_path / "runs" / "ablations" / name, {"format": FORMAT, **record})
            (tmp_path / "study.yaml").write_text(
                f"{small_study}budgets: {{large: {{}}, tiny: {{train.total_images: 100}}}}\n"
            )
            return StudyRunner(Path("study.yaml"), budget=budget, folder=folder and Path(folder), only=only, flags={})

        return open_after

    @pytest.mark.parametrize(
        ("run", "given", "flags"),
        [
            (("study-tiny", 100), {}, "--budget tiny"),
            (("study-large", 700), {}, "--budget large --train.total_images 700"),
            (("mine", 100), {"folder": "runs/ablations/mine"}, "--budget tiny --folder runs/ablations/mine"),
            (("study-large", 2000), {"only": ["b"]}, ""),
        ],
    )
    def test_takes_the_only_run(self, runner, capsys, run, given, flags):
        assert runner([run], **given).report() == Path("runs/ablations", run[0], "report.html")
        assert capsys.readouterr().out == (f"records of: gnunet ablate study.yaml {flags} --report\n" if flags else "")

    def test_names_the_runs_where_there_are_several(self, runner):
        with pytest.raises(ConfigError, match="--budget large .*images 700 --report\n.*--budget tiny --report"):
            runner([("study-tiny", 100), ("study-large", 700)]).report()
        with pytest.raises(ConfigError, match="--budget tiny --report"):
            runner([], budget="large", folder="runs/ablations/study-tiny").report()


class TestErrors:
    def test_no_records(self, made_up, small_study, tmp_path):
        study, plan, _, folder = made_up(small_study, worse)
        with pytest.raises(ConfigError, match="records.*made_up"):
            write_report(study, plan, {}, folder, command="gnunet ablate made_up")
        assert not (tmp_path / "report.md").exists()

    def test_a_missing_package(self, made_up, small_study, tmp_path, monkeypatch):
        made_up(small_study, worse)
        runner = StudyRunner(tmp_path / "study.yaml", budget=None, folder=tmp_path, only=[], flags={})
        monkeypatch.delitem(sys.modules, "gnunet.ablation.analysis.report")
        monkeypatch.setitem(sys.modules, "jinja2", None)
        with pytest.raises(ConfigError, match="jinja2"):
            runner.report()


class TestTables:
    def test_verdicts(self, report, small_study):
        markdown = report(small_study, worse)
        assert "### 1. b is &lt;worse> \\| here: not enough evidence\n" in markdown
        first, second = rows(markdown, "Comparisons")
        assert first[:3] == ["1", "b: 1 higher than a by over 1%", "validation loss"]
        assert first[3] == "" and re.fullmatch(r"\+\d+\.\d+% to ∞, 1 failed", first[4])
        assert (first[5], float(first[6]) > 0.05, first[8]) == ("2", True, "**supported**")
        assert second[1] == "b: 2 the same as a within 1%"
        assert second[5:] == ["1", "", "", "**not enough evidence**"]

    def test_conclusion(self, report, small_study):
        text = small_study.replace("seeds: [0, 1]", "seeds: [0, 1, 2, 3]")
        markdown = report(text, lambda trial: 0.3 if trial.setting == (("size", "1"),) else 0.0)
        first, second, third = re.findall(r"^\*\*(.*)\*\*$", markdown, re.MULTILINE)
        assert "of a is not below" in first and "Wiener" in first
        assert re.search(
            r"b: 1 \(\+\d.*%, \+.*% to \+.*%, n = 4\) worse than a; 1 (same|unclear) \(2 comparisons", second
        )
        assert third.startswith("Of 1 claim, ")
        nothing = report(text, lambda trial: 0.0 if trial.variant == "a" else "missing")
        assert "nothing is clearly better or worse than a (0 comparisons" in nothing

    def test_differences(self, report, small_study):
        found = main_rows(report(small_study, worse))
        assert [row[0] for row in found] == ["a", "b: how large", "1", "2"]
        assert found[0][2] == "baseline" and found[2][2] == "" and found[3][2].startswith("+")
        assert [row[5] for row in found[2:]] == ["**worse**", "**unclear**"]  # one diverged, one is missing

    def test_means(self, report, small_study):
        means = rows(report(small_study, worse), "Means")
        assert [row[:2] for row in means] == [["a", "2 of 2"], ["b: 1", "1 of 2"], ["b: 2", "1 of 2"]]
        assert all(len(row) == len(means[0]) and float(row[2]) > 0 for row in means)

    def test_variants_without_axes_are_sorted_by_their_differences(self, kinds_study, without_figures, tmp_path):
        study, plan, records, _ = kinds_study
        write_report(study, plan, records, tmp_path, command="gnunet ablate x")
        found = main_rows((tmp_path / "report.md").read_text())
        losses = [float(row[1]) for row in found[1:-2]]
        assert len(found) == 21 and losses == sorted(losses)
        assert found[-1] == ["pixel", "", "", "missing", "", ""]

    def test_trials(self, report, small_study):
        trials = rows(report(small_study, worse), "Trials")
        assert [row[0] for row in trials] == ["a", "b: 1", "b: 2"]
        assert trials[1][2] == "*diverged at 1,000*" and trials[2][2] == "*missing*"
        assert all(re.fullmatch(r"0\.\d{4}", trial) for trial in (*trials[0][1:], trials[1][1], trials[2][1]))

    def test_tuning(self, batch_study, without_figures, tmp_path):
        study, plan, records, _ = batch_study
        page = write_report(study, plan, records, tmp_path, command="gnunet ablate x").read_text()
        markdown = (tmp_path / "report.md").read_text()
        chosen = dict(rows(markdown, "Tuning"))
        assert chosen["group"] == "0.001" and chosen["batch_renorm: 64"] == "*not finished*"
        assert rows(markdown, "Trials")[-1] == ["batch_renorm: 64", *["*waits for tuning*"] * 3]
        assert page.count('class="number absent missing"') == 7 + 1 and page.count('absent diverged"') == 4
        assert "57 trials, 46 complete, 4 diverged, 7 missing; 3 seeds" in markdown

    def test_setting_and_environment(self, report, small_study):
        markdown = report(small_study, worse, lambda records: records[0].update(parameters=77))
        assert ["torch", "2.13.0"] in rows(markdown, "Environment")
        setting = dict(rows(markdown, "Configuration"))
        assert setting["train.total_images"] == "2000" and setting["data.resolution"] == "16"
        assert setting["parameters"] == "123456 (4), 77 (1)"


class TestWarnings:
    def test_none_where_all_is_well(self, report, small_study):
        assert "\n>" not in report(small_study, lambda trial: 0.1)

    @pytest.mark.parametrize(
        ("change", "warning"),
        [
            (lambda records: records[0]["environment"].update(commit="f" * 40), "more than one commit"),
            (lambda records: records[1]["environment"].update(device="another"), "more than one device"),
            (lambda records: records[1]["environment"].update(torch="2.14.0"), "more than one torch"),
            (lambda records: [r["environment"].update(commit="0-dirty") for r in records], "differ from their commit"),
            (lambda records: records[2]["bank"].update(fingerprint="0"), "2 validation sets"),
            (lambda records: records[0].update(nonfinite_steps=3), "1 complete trial skipped steps"),
        ],
    )
    def test_of_records_that_differ(self, report, small_study, change, warning):
        assert warning in report(small_study, lambda trial: 0.1, change)

    def test_of_one_seed(self, report, small_study):
        text = small_study.replace("seeds: [0, 1]", "seeds: [3]")
        assert "One seed contains no information" in report(text, lambda trial: 0.1)

    def test_of_a_choice_at_the_end_of_the_values(self, report, small_study):
        text = small_study + TUNING
        text = text.replace("3e-3", "3e-3, 4e-3")
        best = {"a": 0.002, "b": 0.003}
        markdown = report(text, lambda trial: abs(float(trial.tuned or 0) - best[trial.variant]) * 100)
        assert ": b: 1, b: 2." in markdown
