"""Study files: what they say, and one readable line for each mistake."""

from pathlib import Path

import pytest

from gnunet.ablation.study import Variant, load_study
from gnunet.errors import ConfigError

ROOT = Path(__file__).parents[2]
STUDY = """
title: Norms
question: Which?
base: {train.total_images: 64}
budgets: {large: {}, small: {train.total_images: 8}}
seeds: [0, 1]
baseline: group
variants:
  group: {model.norm.kind: group}
  none: {set: {model.norm.kind: none}, axes: []}
axes:
  batch:
    label: images
    scale: log
    values: {2: {train.batch_size: 2}, 0.5: {}}
tuning: {key: train.learning_rate, values: [1e-3, 2e-3], seeds: [100]}
hypotheses:
  - claim: It helps
    comparisons:
      - {left: {variant: group, batch: 2}, expect: lower, right: {variant: none}}
"""


@pytest.fixture
def load(tmp_path):
    def load(old: str = "", new: str = ""):
        assert old in STUDY
        path = tmp_path / "norms.yaml"
        path.write_text(STUDY.replace(old, new))
        return load_study(path)

    return load


def test_what_a_file_says(load):
    study = load()
    assert study.variants["group"] == Variant(set={"model.norm.kind": "group"})  # a variant may be its overrides alone
    assert (study.axes_of("group"), study.axes_of("none")) == (["batch"], [])
    assert list(study.axes["batch"].values) == ["2", "0.5"]
    assert study.hypotheses[0].comparisons[0].left == {"variant": "group", "batch": "2"}
    assert (study.hypotheses[0].metric, study.hypotheses[0].margin, study.tuning.metric) == (
        "validation_loss", 0.0, "validation_loss",
    )  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "ablations").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_load(path):
    assert load_study(path).hypotheses


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title", "titel", "titel: unknown key (norms.yaml); did you mean title?"),
        ("axes: []", "axis: []", "axis: unknown key (variant 'none' of norms.yaml); did you mean axes?"),
        ("axes: []", "axes: [bach]", "variants: given axis bach in variant 'none' (norms.yaml); valid: batch"),
        ("label: images", "unit: images", "label: given null (axis 'batch' of norms.yaml); valid: text"),
        ("scale: log", "scale: lgo", "scale: given lgo (axis 'batch' of norms.yaml); valid: linear, log or category"),
        ("2: {train", "few: {train", "given few (axis 'batch' of norms.yaml); valid: numbers above 0 with scale log"),
        ("{model.norm.kind: group}", "3", "set: given 3 (variant 'group' of norms.yaml); valid: a mapping from keys"),
        ("baseline: group", "baseline: grop", "baseline: given grop (norms.yaml); valid: group or none"),
        ("seeds: [0, 1]", "seeds: [0, 0]", "seeds: given [0, 0] (norms.yaml); valid: each seed once"),
        ("seeds: [100]", "seeds: [1]", "tuning.seeds: given [1] (norms.yaml); valid: each seed once, none of the stud"),
        ("key: train.learning_rate", "key: train.lr", "tuning.key: given train.lr (norms.yaml); valid: a key of the c"),
        ("expect: lower", "expect: less", "(comparison 1 of hypothesis 1 of norms.yaml); valid: higher, lower or same"),
        ("expect: lower", "expect: same", "margin: given 0 (hypothesis 1 of norms.yaml); valid: a number above 0"),
        ("batch: 2}, ex", "batch: 3}, ex", "hypotheses: given batch: 3 on the left of 'It helps' (norms.yaml); valid"),
        (", batch: 2}, ex", "}, ex", "hypotheses: given no batch on the left of 'It helps' (norms.yaml); valid: batch"),
        (
            "right: {variant: none}",
            "right: {variant: non}",
            "given variant non on the right of 'It helps' (norms.yaml); valid: v",
        ),
        ("{variant: none}", "{variant: none, batch: 2}", "valid: axes that variant 'none' crosses: none"),
        ("  - claim: It helps", "  - clam: It helps", "clam: unknown key (hypothesis 1 of norms.yaml); did you mean c"),
        ("title: Norms", "title: [", "norms.yaml, line 3: not valid YAML"),
    ],
)
def test_mistakes(load, old, new, message):
    with pytest.raises(ConfigError) as caught:
        load(old, new)
    assert message in str(caught.value)
    assert "Traceback" not in str(caught.value) and "pydantic" not in str(caught.value)


def test_the_spelling_of_older_files_loads(tmp_path, load):
    path = tmp_path / "older.yaml"
    path.write_text(STUDY.replace("variants:", "arms:").replace("variant:", "arm:"))
    assert load_study(path) == load()


def test_mistakes_in_several_parts_are_all_reported(load):
    with pytest.raises(ConfigError) as caught:
        load("axes:\n  batch:", "axes:\n  size: {labl: x, values: {a: {}}}\n  batch:\n    scael: log")
    text = str(caught.value)
    assert text.startswith("3 problems in norms.yaml:")
    assert "scael: unknown key (axis 'batch' of norms.yaml)" in text
    assert "label: given null (axis 'size' of norms.yaml)" in text and "labl: unknown key (axis 'size' of" in text


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml: No such file or directory; valid: a study file"):
        load_study(tmp_path / "nowhere.yaml")
