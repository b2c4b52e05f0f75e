"""Study files: what they mean, and errors that name the key and the part of the study."""

import pytest

from gnunet.ablation.study import Variant, load_study
from gnunet.errors import ConfigError

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


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("title", "titel", ["titel", "title?"]),
        ("title: Norms", "title: Norms\ntask: classify", ["task:", "classify", "diffusion or classification"]),
        ("axes: []", "axis: []", ["axis:", "variant 'none'", "axes?"]),
        ("axes: []", "axes: [bach]", ["variants:", "bach", "variant 'none'", "batch"]),
        ("label: images", "unit: images", ["label:", "axis 'batch'"]),
        ("scale: log", "scale: lgo", ["scale:", "lgo", "axis 'batch'", "linear, log or category"]),
        ("2: {train", "few: {train", ["values:", "few", "scale log"]),
        ("{model.norm.kind: group}", "3", ["set:", "variant 'group'"]),
        ("baseline: group", "baseline: grop", ["baseline:", "grop", "group or none"]),
        ("seeds: [0, 1]", "seeds: [0, 0]", ["seeds:", "[0, 0]"]),
        ("seeds: [100]", "seeds: [1]", ["tuning.seeds:", "[1]", "[0, 1]"]),
        ("[1e-3, 2e-3]", "[2e-3, 1e-3]", ["tuning.values:", "[0.002, 0.001]", "steps_below: 0"]),
        ("[1e-3, 2e-3]", "[true, few]", ["tuning.values:", "few", "ascending"]),
        ("key: train.learning_rate", "key: train.lr", ["tuning.key:", "train.lr"]),
        (
            "expect: lower",
            "expect: less",
            ["expect:", "comparison 1 of hypothesis 1", "higher, lower, better, worse or same"],
        ),
        ("expect: lower", "expect: same", ["margin:", "hypothesis 1"]),
        ("batch: 2}, ex", "batch: 3}, ex", ["batch: 3", "left of 'It helps'"]),
        (", batch: 2}, ex", "}, ex", ["no batch", "left of 'It helps'"]),
        ("right: {variant: none}", "right: {variant: non}", ["variant non", "right of 'It helps'", "group or none"]),
        ("{variant: none}", "{variant: none, batch: 2}", ["batch: 2", "variant 'none' crosses: none"]),
        ("  - claim: It helps", "  - clam: It helps", ["clam:", "hypothesis 1", "claim?"]),
        ("title: Norms", "title: [", ["line 3"]),
        ("It helps\n", "It helps\n    metric: stability_edge\n", ["variant: group", "left of 'It helps'", "alone"]),
    ],
)
def test_mistakes_name_the_key_and_the_part_of_the_study(load, old, new, named):
    with pytest.raises(ConfigError) as caught:
        load(old, new)
    text = str(caught.value)
    assert all(name in text for name in ["norms.yaml", *named]), text
    assert "pydantic" not in text


@pytest.mark.parametrize("axis", ["scale: log", "scale: linear"])
def test_a_stability_edge_is_that_of_a_variant_on_an_axis_of_scale_log(load, axis):
    old = STUDY[STUDY.index("scale: log") : STUDY.index("  - claim")]
    side = "{variant: group}"
    edge = f"  - {{claim: E, metric: stability_edge, comparisons: [{{left: {side}, expect: higher, right: {side}}}]}}\n"
    if axis == "scale: log":
        assert load(old, old + edge).hypotheses[0].comparisons[0].left == {"variant": "group"}
        return
    with pytest.raises(ConfigError, match="stability_edge.*one axis.*log"):
        load(old, old.replace("scale: log", axis) + edge)


def test_the_spelling_of_older_files_loads(tmp_path, load):
    path = tmp_path / "older.yaml"
    path.write_text(STUDY.replace("variants:", "arms:").replace("variant:", "arm:"))
    assert load_study(path) == load()


def test_mistakes_in_several_parts_are_all_reported(load):
    with pytest.raises(ConfigError) as caught:
        load("axes:\n  batch:", "axes:\n  size: {labl: x, values: {a: {}}}\n  batch:\n    scael: log")
    lines = str(caught.value).splitlines()[1:]
    expected = {"scael": "axis 'batch'", "label": "axis 'size'", "labl": "axis 'size'"}
    assert len(lines) == 3
    assert all(any(f"{key}:" in line and where in line for line in lines) for key, where in expected.items())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_study(tmp_path / "nowhere.yaml")
