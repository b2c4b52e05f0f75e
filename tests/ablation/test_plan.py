"""From a study to trials: settings, layers, names, tuning, and errors that name the variant and the key."""

import hashlib
import math

import pytest
import yaml

from gnunet.ablation.plan import Trial, check_records, make_plan, nested
from gnunet.ablation.study import load_study
from gnunet.config import Config
from gnunet.errors import CheckpointError, ConfigError

BASE = {
    "data.resolution": 16,
    "model": {"block_out_channels": [8, 16], "norm.groups": 4, "add_attention": False},
    "model.down_block_types": ["DownBlock2D", "DownBlock2D"],
    "model.up_block_types": ["UpBlock2D", "UpBlock2D"],
    "train": {"total_images": 64, "batch_size": 8},
}
VARIANTS = {
    "group": {},
    "layer": {"model.norm.kind": "layer"},
    "none": {"set": {"model.norm.kind": "none"}, "axes": []},
}
BATCH = {"label": "images", "values": {2: {"train.batch_size": 2}, 4: {"train.batch_size": 4}}}
BUDGETS = {"large": {"train.total_images": 1000}, "small": "small.yaml"}
CLASSES = {**BASE, "data.class_conditional": True, "data.validation_images": 4}
TUNING = {"key": "train.learning_rate", "values": [1e-3, 2e-3, 4e-3], "seeds": [100, 101]}
STUDY = {
    "title": "T", "question": "Q", "base": BASE, "baseline": "group", "seeds": [0, 1], "variants": VARIANTS,
}  # fmt: skip


@pytest.fixture
def plan(tmp_path):
    """The plan of a study with the given keys."""

    def plan(*, options=None, **keys):
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({**STUDY, **keys}, sort_keys=False))
        return make_plan(load_study(path), path, **(options or {}))

    return plan


def refusal(plan, **keys) -> str:
    with pytest.raises(ConfigError) as caught:
        plan(**keys)
    return str(caught.value)


def test_variants_cross_their_axes_and_seeds(plan):
    size = {"label": "channels", "values": {"narrow": {"model.block_out_channels": [4, 8]}, "wide": {}}}
    variants = {**VARIANTS, "layer": {"set": VARIANTS["layer"], "axes": ["size"]}}
    trials = plan(axes={"batch": BATCH, "size": size}, variants=variants).trials
    found = [(trial.variant, *(value for _, value in trial.setting), trial.seed) for trial in trials]
    assert found == [
        *[("group", batch, width, seed) for batch in "24" for width in ("narrow", "wide") for seed in (0, 1)],
        *[("layer", width, seed) for width in ("narrow", "wide") for seed in (0, 1)],
        *[("none", 0), ("none", 1)],
    ]
    first = trials[0]
    assert (first.config.train.batch_size, first.config.model.block_out_channels) == (2, [4, 8])
    assert first.config.seed == 0 and first.title == "group, batch 2, size narrow, seed 0"


def test_later_layers_win(plan, tmp_path):
    (tmp_path / "file.yaml").write_text(
        "train: {total_images: 1, warmup_images: 1, ema_half_life: 1, log_every: 1}\nseed: 9"
    )
    base = {**BASE, "train": {"batch_size": 8, "warmup_images": 2, "ema_half_life": 2, "log_every": 2}}
    variants = {"group": {"train.log_every": 4}}
    axis = {"label": "x", "values": {"a": {"train.keep_checkpoints": 5}}}
    trial = plan(
        config="file.yaml", base=base, budgets={"small": {"train.ema_half_life": 3, "train.log_every": 3}},
        variants=variants,
        axes={"x": axis}, options={"flags": {"train": {"keep_checkpoints": 7}}},
    ).trials[1]  # fmt: skip
    train = trial.config.train
    assert (train.total_images, train.warmup_images, train.ema_half_life, train.log_every) == (1, 2, 3, 4)
    assert train.keep_checkpoints == 7 and trial.config.seed == 1


def test_a_budget_is_overrides_or_a_file(plan, tmp_path):
    (tmp_path / "small.yaml").write_text("train: {total_images: 24}")
    for options, images in (({}, 1000), ({"budget": "small"}, 24)):
        assert plan(budgets=BUDGETS, options=options).trials[0].config.train.total_images == images


def test_only_some_variants(plan):
    assert {trial.variant for trial in plan(options={"only": ["none", "layer"]}).trials} == {"none", "layer"}


class TestNames:
    def test_equal_configurations_share_a_name(self, plan):
        variants = {"group": {}, "same": {"model.norm": {"kind": "group"}}, "other": {"train.batch_size": 4}}
        trials = plan(variants=variants).trials
        group, same, other = trials[::2]
        assert group.name == same.name != other.name
        assert group.name != trials[1].name  # another seed
        assert len(group.name) == 12 and int(group.name, 16)

    def test_of_other_tasks_differ(self, plan):
        names = {
            trial.name for task in ("diffusion", "classification") for trial in plan(base=CLASSES, task=task).trials
        }
        assert len(names) == 2 * len(plan(base=CLASSES).trials)

    def test_do_not_depend_on_where_and_how_fast(self, plan):
        flags = {"data": {"cache_dir": "/x", "num_workers": 5}, "train": {"trackers": ["wandb"]}}
        assert plan(options={"flags": flags}).trials[0].name == plan().trials[0].name
        trial = plan().trials[0]
        moved = trial.config.model_copy(update={"run_dir": "elsewhere"})
        assert Trial("other variant", (), 0, moved).name == trial.name

    def test_do_not_depend_on_keys_at_their_default(self):
        """A key that gnunet gets later has a default, and must not orphan the records that there are."""
        text = '{"diffusion":{"kind":"ddpm"},"model":{"norm":{"kind":"group"}}}'
        assert Trial("a", (), 0, Config()).name == hashlib.sha256(text.encode()).hexdigest()[:12]

    def test_kinds_at_their_defaults_differ(self, plan):
        variants = {"group": {}, **{kind: {"diffusion.kind": kind} for kind in ("ddpm", "edm", "flow")}}
        assert len({trial.name for trial in plan(variants=variants, seeds=[0]).trials}) == 3


class TestErrors:
    def test_name_the_key_and_the_variant_or_axis_value(self, plan):
        variants = {**VARIANTS, "layer": {"model.norm.kimd": "layer"}, "none": {"model.norm.kind": "non"}}
        axes = {"batch": {"label": "x", "values": {2: {"train.batchsize": 2}, 4: {"train.total_images": "many"}}}}
        _, *lines = refusal(plan, variants=variants, axes=axes).splitlines()
        expected = {
            "model.norm.kimd": "variant 'layer'", "model.norm.kind": "variant 'none'",
            "train.batchsize": "batch 2", "train.total_images": "batch 4",
        }  # fmt: skip
        assert len(lines) == 4
        assert all(any(f"{key}:" in line and where in line for line in lines) for key, where in expected.items())

    def test_of_some_variants_name_them(self, plan):
        text = refusal(plan, axes={"groups": {"label": "x", "values": {3: {"model.norm.groups": 3}}}})
        assert "model.norm.groups" in text and "[with variant 'group']" in text
        assert "[with variant 'layer']" in text  # where the key does not exist

    @pytest.mark.parametrize(
        ("keys", "named"),
        [
            ({"base": {**BASE, "train.imags": 1}}, ("train.imags", "base")),
            ({"options": {"flags": {"train": {"imags": 1}}}}, ("train.imags", "command line")),
            ({"config": "none.yaml"}, ("none.yaml", "study.yaml")),
            ({"base": {**BASE, "seed": 3}}, ("seed", "base")),
            ({"variants": {"group": {"run_dir": "x"}}}, ("run_dir", "variant 'group'")),
            ({"axes": {"s": {"label": "x", "values": {1: {"seed": 1}}}}}, ("seed", "s 1")),
            ({"options": {"flags": {"seed": 3}}}, ("seed", "command line")),
            ({"options": {"only": ["non"]}}, ("--only", "non", "group, layer, none")),
            ({"options": {"budget": "tiny"}, "budgets": BUDGETS}, ("--budget", "tiny", "large, small")),
            ({"options": {"budget": "tiny"}}, ("--budget", "tiny", "no budgets")),
            ({"budgets": {"small": "none.yaml"}}, ("budget 'small'", "none.yaml", "study.yaml")),
            (
                {"tuning": TUNING, "variants": {"group": {TUNING["key"]: 1e-2}}},
                (TUNING["key"], "0.01", "variant 'group'", "tuning"),
            ),
            (
                {"tuning": TUNING, "options": {"flags": {"train": {"learning_rate": 1e-2}}}},
                (TUNING["key"], "command line", "tuning"),
            ),
            (
                {"task": "classification", "base": {**CLASSES, "data.class_conditional": False}},
                ("data.class_c", "true"),
            ),
            ({"task": "classification", "base": {**CLASSES, "data.validation_images": 0}}, ("data.validation_i", "3")),
            ({"task": "classification", "base": {**CLASSES, "train.micro_batch_size": 4}}, ("train.micro_b", "null")),
            ({"tuning": {**TUNING, "values": [-1, 1e-3]}}, (TUNING["key"], "-1", "tuning of study.yaml", "above 0")),
        ],
    )
    def test_are_reported_once_and_name_the_key_and_the_source(self, plan, keys, named):
        text = refusal(plan, **keys)
        assert "\n" not in text and all(name in text for name in named), text

    def test_metrics_must_be_measured(self, plan):
        comparison = {"left": {"variant": "group"}, "expect": "lower", "right": {"variant": "none"}}
        hypothesis = {"claim": "C", "metric": "kid_efficientnet_lite0", "comparisons": [comparison]}
        text = refusal(plan, hypotheses=[hypothesis])
        assert "kid_efficientnet_lite0" in text and "hypothesis 'C'" in text
        hypothesis["metric"] = "error_rate"
        assert "error_rate" in refusal(plan, hypotheses=[hypothesis])
        assert plan(hypotheses=[hypothesis], task="classification", base=CLASSES).trials
        hypothesis["metric"] = "kid_efficientnet_lite0"
        evaluated = {**BASE, "evaluate.every": 0, "evaluate.metrics": ["kid_efficientnet_lite0"]}
        assert plan(hypotheses=[hypothesis], base=evaluated).trials
        tuning = {**TUNING, "set": {"evaluate.every": None}}
        assert plan(hypotheses=[hypothesis], base=evaluated, tuning=tuning).tuning_trials
        text = refusal(plan, base=evaluated, tuning={**tuning, "metric": "kid_efficientnet_lite0"})
        assert "kid_efficientnet_lite0 (tuning)" in text


class TestTuning:
    def records(self, plan, losses: dict | None = None) -> dict:
        """Records of the tuning trials: the loss of each variant at each value, collapsed from 50; 1 by default."""
        records = {}
        for trial in plan.tuning_trials:
            loss = losses[trial.variant][trial.tuned] if losses else 1.0
            loss += 0.1 if trial.seed == 101 else -0.1
            records[trial.name] = {
                "outcome": "complete" if math.isfinite(loss) else "diverged",
                "errors": {"running": [loss, loss], "precise": None, "batch": None},
                "bank": {
                    "bins": [0, 1],
                    "log_snr_edges": [-1.0, 0.0, 1.0],
                    "density": [1.0, 1.0],
                    "factor": [1.0, 1.0],
                    "predictors": {"scalar": [50.0, 50.0]},
                },
            }
        return records

    def test_every_variant_at_every_setting_tries_the_same(self, plan):
        first = plan(tuning=TUNING, axes={"batch": BATCH})
        assert first.trials == [] and len(first.tuning_trials) == (2 + 2 + 1) * 3 * 2
        assert len(first.pending_tuning) == 5 and first.chosen == {}
        assert {trial.config.train.learning_rate for trial in first.tuning_trials} == {1e-3, 2e-3, 4e-3}
        assert first.tuning_trials[0].title == "group, batch 2, seed 100, trying 0.001"

    def test_the_best_mean_is_chosen(self, plan):
        losses = {
            "group": {"0.001": 2.0, "0.002": 1.0, "0.004": 3.0},
            "layer": {"0.001": 1.0, "0.002": 1.0, "0.004": math.inf},  # of equal ones the first
            "none": {"0.001": math.inf, "0.002": 60.0, "0.004": 9.0},  # divergence and collapse are the worst
        }
        second = plan(tuning=TUNING, options={"records": self.records(plan(tuning=TUNING), losses)})
        assert second.chosen == {("group", ()): "0.002", ("layer", ()): "0.001", ("none", ()): "0.004"}
        assert [trial.config.train.learning_rate for trial in second.trials] == [2e-3, 2e-3, 1e-3, 1e-3, 4e-3, 4e-3]
        assert {trial.seed for trial in second.trials} == {0, 1} and not second.pending_tuning

    @pytest.mark.parametrize(
        ("losses", "steps_below", "chosen", "at_edge"),
        [
            ([3.0, 2.0, 1.0, 0.9], 1, "0.004", True),  # nothing fails, but who knows what is beyond
            ([3.0, 2.0, 1.0, 60.0], 1, "0.002", False),
            ([3.0, 2.0, 1.0, 60.0], 0, "0.004", False),
            ([1.0, 2.0, 3.0, 60.0], 1, "0.001", True),
            ([60.0, 3.0, 2.0, 4.0], 1, "0.004", True),
            ([60.0, 2.0, 60.0, 3.0], 1, "0.002", True),  # nowhere far enough below
            ([3.0, 2.0, 1.0, 60.0], 2, "0.001", True),
            ([60.0, 60.0, 60.0, 60.0], 1, "0.001", True),
        ],
    )
    def test_it_stays_below_values_that_fail(self, plan, losses, steps_below, chosen, at_edge):
        values, variants = [1e-3, 2e-3, 4e-3, 8e-3], {"group": {}}
        tuning = {**TUNING, "values": values, "steps_below": steps_below}
        by_value = {"group": dict(zip(map(str, values), losses, strict=True))}
        records = self.records(plan(tuning=tuning, variants=variants), by_value)
        tuned = plan(tuning=tuning, variants=variants, options={"records": records})
        assert tuned.chosen == {("group", ()): chosen} and bool(tuned.tuned_at_edge) == at_edge

    def test_records_without_its_metric_are_an_error(self, plan):
        records = self.records(plan(tuning=TUNING))
        for record in records.values():
            del record["bank"]["density"]
        assert "tuning.metric: given training_loss" in refusal(plan, tuning=TUNING, options={"records": records})
        assert plan(tuning={**TUNING, "metric": "validation_loss"}, options={"records": records}).trials

    def test_a_variant_waits_for_all_its_tuning_trials(self, plan):
        first = plan(tuning=TUNING)
        records = self.records(first)
        del records[next(trial.name for trial in first.tuning_trials if trial.variant == "layer")]
        second = plan(tuning=TUNING, options={"records": records})
        assert second.pending_tuning == [("layer", ())]
        assert {trial.variant for trial in second.trials} == {"group", "none"}

    def test_its_trials_may_have_overrides(self, plan):
        tuning = {**TUNING, "set": {"train.total_images": 8}}
        first = plan(tuning=tuning)
        assert {trial.config.train.total_images for trial in first.tuning_trials} == {8}
        second = plan(tuning=tuning, options={"records": self.records(first)})
        assert {trial.config.train.total_images for trial in second.trials} == {64}


def test_records_that_would_differ_now_are_errors(plan, tmp_path):
    trial = plan().trials[0]
    config = trial.config.model_dump(exclude={"run_dir": True, "data": {"cache_dir"}})
    record = {"config": config, "batch_dependent": True, "environment": {"processes": 1}}
    for processes in (1, None):
        check_records([trial], {trial.name: record}, tmp_path, processes=processes)
    with pytest.raises(CheckpointError, match=trial.name):  # of other batches
        check_records([trial], {trial.name: record}, tmp_path, processes=2)

    record["batch_dependent"] = False
    del record["config"]["train"]["bn_update_batches"]  # a key that was not there yet
    record["config"]["data"]["num_workers"] = 17  # says how fast, not what
    check_records([trial], {trial.name: record}, tmp_path, processes=2)
    record["config"]["train"]["max_nonfinite_steps"] = 3  # another default
    with pytest.raises(CheckpointError, match=rf"{trial.name}.json: .* train.max_nonfinite_steps 3"):
        check_records([trial], {trial.name: record}, tmp_path)


def test_records_of_a_kind_whose_network_was_another_are_errors(plan, tmp_path):
    trial = plan().trials[0]
    config = trial.config.model_dump(exclude={"run_dir": True, "data": {"cache_dir"}})
    record = {"config": config, "batch_dependent": False, "environment": {"processes": 1}, "norm_kinds": ["none"]}
    check_records([trial], {trial.name: record}, tmp_path)
    del config["validation"]["draw"]  # of version 0.1.0
    check_records([trial], {trial.name: {**record, "norm_kinds": ["group"]}}, tmp_path)
    with pytest.raises(CheckpointError, match=trial.name):
        check_records([trial], {trial.name: record}, tmp_path)


class TestNested:
    def test_dotted_and_nested_keys(self):
        given = {"train.compile": 1, "train": {"batch_size": 2}, "model.norm": {"kind": "group"}, "model.dropout": 0.1}
        assert nested(given, "x") == {
            "train": {"compile": 1, "batch_size": 2}, "model": {"norm": {"kind": "group"}, "dropout": 0.1},
        }  # fmt: skip

    def test_a_mapping_that_is_a_value_stays_whole(self):
        given = {"data.subset": {"a.b": [1]}, "model": {"norm.overrides": {"decoder": {"kind": "none"}}}}
        assert nested(given, "x") == {
            "data": {"subset": {"a.b": [1]}}, "model": {"norm": {"overrides": {"decoder": {"kind": "none"}}}},
        }  # fmt: skip

    @pytest.mark.parametrize(
        "given",
        [{"train.dim": 1, "train": {"dim": 2}}, {"train": 5, "train.dim": 1}, {"seed": 1, "seed.x": 2}],
    )
    def test_a_key_given_twice(self, given):
        with pytest.raises(ConfigError, match=r"\(here\)"):
            nested(given, "here")
