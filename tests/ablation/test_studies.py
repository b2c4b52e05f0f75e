"""The studies that are shipped: each resolves at each of its sizes, and the smoke study runs and is reported."""

from pathlib import Path

import pytest

from gnunet.ablation.plan import make_plan
from gnunet.ablation.records import read_records
from gnunet.ablation.study import load_study
from gnunet.commands import ablate
from gnunet.norms import NORMS

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "configs" / "ablations").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_resolves_at_every_size_and_says_what_it_tests(path):
    study = load_study(path)
    assert study.hypotheses and all(hypothesis.source for hypothesis in study.hypotheses)
    for budget in [None, *(study.budgets or {})]:
        plan = make_plan(study, path, budget=budget)
        assert len({trial.variant for trial in plan.trials or plan.tuning_trials}) == len(study.variants)
    assert f"gnunet ablate {path.stem}" in path.read_text()


@pytest.mark.parametrize("name", ["smoke", "kinds"])
def test_it_has_every_kind(name):
    plan = make_plan(load_study(path := ROOT / "configs/ablations" / f"{name}.yaml"), path)
    assert {trial.config.model.norm.kind for trial in plan.trials or plan.tuning_trials} == set(NORMS)


SMALLEST = """--data.resolution 8 --model.block_out_channels [8] --model.attention_head_dim 8
--model.down_block_types [AttnDownBlock2D] --model.up_block_types [AttnUpBlock2D] --train.total_images 32
--train.validate_every 0 --validation.num_examples 4 --validation.num_bins 2 --sampling.num_inference_steps 1
--sampling.num_images 1"""


@pytest.mark.slow
def test_the_smoke_study_runs_and_is_reported(tmp_path, monkeypatch, capfd):
    """At a smaller size; every kind trains to its end."""
    monkeypatch.chdir(tmp_path)
    for more in (["--jobs", "1"], ["--report"]):
        status = ablate.main([str(ROOT / "configs/ablations/smoke.yaml"), "--folder", "out", *SMALLEST.split(), *more])
        assert status == 0, capfd.readouterr()
    records = read_records(tmp_path / "out")
    assert len(records) == len(NORMS)
    assert all(record["outcome"] == "complete" for record in records.values())
    text = (tmp_path / "out" / "report.md").read_text()
    assert all(kind in text for kind in NORMS)
    assert "</html>" in (tmp_path / "out" / "report.html").read_text()
