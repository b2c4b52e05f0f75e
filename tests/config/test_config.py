"""Configurations: values, merging, sources, combinations, and the keyword arguments made from them."""

import pickle
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gnunet.config import (
    Config,
    TrainConfig,
    accumulation_steps,
    changed_keys,
    from_yaml,
    load_config,
    to_yaml,
    unet_kwargs,
)
from gnunet.config.kinds import NORM_SECTIONS
from gnunet.config.load import SHIPPED
from gnunet.config.merge import ConfigSource
from gnunet.config.schema import sections_of, walk
from gnunet.diffusion import PROCESSES, make_process
from gnunet.errors import ConfigError
from gnunet.models import UNet2D, norm_sites
from gnunet.norms import NORMS

SMALL = {"block_out_channels": [8, 16], "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
SMALL_NORM = {"norm": {"groups": 4}}


def build(**sections: Any) -> Config:
    return load_config(sections)


def test_configuration_is_immutable() -> None:
    with pytest.raises(ValidationError):
        Config().seed = 1


@pytest.mark.parametrize(
    ("key", "texts", "expected"),
    [
        ("learning_rate", ["1e-4", "1E-4", "+1.0e-4", "0.0001", ".0001", "1_0e-5"], 1e-4),
        ("total_images", ["1e6", "1_000_000"], 1_000_000),
        ("mixed_precision", ["no", "'no'"], "no"),
    ],
)
def test_every_spelling_of_a_value_is_read(key: str, texts: list[str], expected: Any) -> None:
    for text in texts:
        value = getattr(from_yaml(f"train: {{{key}: {text}}}", "x").train, key)
        assert value == expected and type(value) is type(expected)


def test_resolution_is_one_number_for_squares() -> None:
    square, wide = ({"data": {"resolution": sides}} for sides in ([32, 32], [32, 48]))
    assert load_config(square) == load_config({"data": {"resolution": 32}}) and load_config().data.size == (32, 32)
    assert load_config(wide).data.size == (32, 48) and unet_kwargs(load_config(wide), None)["sample_size"] == [32, 48]


@pytest.mark.parametrize("text", ["train:\nmodel:\n", "# nothing\n"])
def test_empty_section_is_its_defaults(text: str) -> None:
    assert from_yaml(text, "x") == Config()


def test_load_config_takes_paths_names_mappings_and_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("train: {batch_size: 4, learning_rate: 1}")
    overrides = {"train.batch_size": 8, "model.norm.groups": 16}
    config = load_config("cifar10", "mine.yaml", {"seed": 3}, overrides=overrides)
    assert (config.run_dir, config.seed, config.model.dropout) == ("runs/cifar10", 3, 0.1)
    assert (config.train.batch_size, config.train.learning_rate, config.model.norm.groups) == (8, 1.0, 16)
    assert load_config(SHIPPED / "cifar10.yaml") == load_config("cifar10")
    batch = {"kind": "batch"}
    changed = load_config(config, overrides={"model.norm": batch, "model.norm.eps": 1e-3})
    assert batch == {"kind": "batch"}
    assert (changed.model.norm.kind, changed.model.norm.eps, changed.seed) == ("batch", 1e-3, 3)
    assert load_config() == load_config(overrides={}) == Config()
    Path("imagenet64").mkdir()  # a folder of data
    assert load_config("imagenet64").data.resolution == 64
    Path("cifar10").write_text("seed: 5")  # a file goes before the shipped config of its name
    assert load_config("cifar10") == build(seed=5)
    with pytest.raises(ConfigError, match=r"^train.batch_size: given x \(overrides\)"):
        load_config(config, overrides={"train.batch_size": "x"})


def test_change_of_kind_removes_the_keys_that_the_new_kind_lacks() -> None:
    ddpm = {"diffusion": {"kind": "ddpm", "beta_end": 0.03}, "sampling": {"sampler": "ddpm", "num_inference_steps": 7}}
    edm = {"diffusion": {"kind": "edm", "p_mean": -1}}
    config = load_config(ddpm, edm)
    assert (config.diffusion.kind, config.diffusion.p_mean) == ("edm", -1)
    assert (config.sampling.sampler, config.sampling.num_inference_steps) == (None, 7)
    assert load_config(ddpm, edm, {"diffusion": {"p_std": 1.1}}).diffusion.p_std == 1.1
    assert load_config(ddpm, {"diffusion": {"kind": "ddpm"}}).diffusion.beta_end == 0.03
    assert load_config(ddpm, edm, ddpm).sampling.sampler == "ddpm"
    group = {"model": {"norm": {"groups": 16, "eps": 1e-6}}}
    norm = load_config(group, {"model": {"norm": {"kind": "layer"}}}).model.norm
    assert (norm.kind, norm.eps) == ("layer", 1e-6)
    image = {"diffusion": {"kind": "ddpm", "prediction_type": "sample"}}  # whose values differ from those of flow
    assert load_config(image, {"diffusion": {"kind": "flow"}}).diffusion.prediction_type == "velocity"
    for later in ({"kind": "edm", "beta_end": 0.05}, {"kind": "edm", "bta": 1}):  # given with the new kind, or unknown
        with pytest.raises(ConfigError, match="diffusion.b.*: unknown key"):
            load_config(ddpm, {"diffusion": later})


def test_groups_and_channels_per_group_replace_one_another() -> None:
    a, b = {"model": {"norm": {"groups": 16}}}, {"model": {"norm": {"channels_per_group": 8}}}
    for sources, expected in (((a, b), (None, 8)), ((b, a), (16, None)), ((load_config(a), b), (None, 8))):
        norm = load_config(*sources).model.norm
        assert (norm.groups, norm.channels_per_group) == expected


def test_unconditional_run_drops_guidance_of_an_earlier_source() -> None:
    labels = {"data": {"class_conditional": True}, "sampling": {"guidance_scale": 3}}
    unconditional = {"data": {"class_conditional": False}}
    assert load_config(labels).sampling.guidance_scale == 3
    assert load_config(labels, unconditional).sampling.guidance_scale == 1
    with pytest.raises(ConfigError, match="^sampling.guidance_scale: given 2"):
        load_config(labels, {**unconditional, "sampling": {"guidance_scale": 2}})
    with pytest.raises(ConfigError, match="^sampling.guidance_scale: .*data.label_dropout"):
        load_config(labels, {"data": {"label_dropout": 0}})
    dropped = {"condition": {"kind": "grey"}, "condition_dropout": 0.1}
    assert load_config({**labels, "data": dropped}, unconditional).sampling.guidance_scale == 3


def test_values_that_are_mappings_are_replaced() -> None:
    assert load_config({"data": {"subset": {"a": 1}}}, {"data": {"subset": {"b": 2}}}).data.subset == {"b": 2}


def test_error_names_the_last_source_that_gives_the_key() -> None:
    sources = [ConfigSource("a", {"data": {"resolution": 30}}), ConfigSource("b", {"data": {"flip": False}})]
    with pytest.raises(ConfigError, match=r"^data.resolution: given 30 \(a\)"):
        load_config(*sources)


def test_groups_that_an_error_lists_are_those_that_build() -> None:
    model = {**SMALL, "block_out_channels": [12, 30], "attention_head_dim": None}
    for groups in range(1, 31):
        sections = {"model": {**model, "norm": {"groups": groups}}}
        if groups in (1, 2, 3, 6):
            UNet2D(**unet_kwargs(build(**sections), None))
        else:
            with pytest.raises(ConfigError, match="^model.norm.groups: .* valid: 1, 2, 3 or 6 "):
                build(**sections)


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "expected"),
    [(24, None, 1, (24, 1)), (24, None, 2, (12, 1)), (24, 4, 2, (4, 3)), (24, 12, 2, (12, 1)), (1, None, 1, (1, 1))],
)
def test_accumulation_steps(batch: int, micro: int | None, processes: int, expected: tuple[int, int]) -> None:
    train = TrainConfig(batch_size=batch, micro_batch_size=micro)
    assert accumulation_steps(train, processes) == expected


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "named"),
    [
        (24, None, 5, "train.batch_size: given 24 on 5 processes; valid: .*20 or 25; or .*6, 8, 12 or 24 processes"),
        (24, 12, 4, "train.micro_batch_size: given 12 with train.batch_size 24 on 4 processes.*1, 2, 3 or 6"),
        (2, None, 4, "train.batch_size: given 2 .*for instance 4"),
    ],
)
def test_batch_that_does_not_split_is_an_error(batch: int, micro: int | None, processes: int, named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named}"):
        accumulation_steps(TrainConfig(batch_size=batch, micro_batch_size=micro), processes)


def test_changed_keys() -> None:
    a, b = build(), build(seed=3, diffusion={"kind": "flow"}, model={"block_out_channels": [64, 64, 64, 64]})
    changed = changed_keys(a, b)
    assert changed["seed"] == (0, 3) and "run_dir" not in changed
    assert changed["model.block_out_channels"] == ([128, 256, 256, 256], [64, 64, 64, 64])
    assert changed["diffusion.kind"] == ("ddpm", "flow") and changed["diffusion.beta_end"] == (0.02, "absent")
    assert changed_keys(a, a) == {}
    long = [{"name": [*"abcdefgh" * 20, last]} for last in "xy"]  # equal as far as an error shows them
    assert len(changed_keys(*(build(data={"subset": subset}) for subset in long))) == 1


def test_unet_kwargs_build_the_model() -> None:
    data = {"class_conditional": True, "resolution": 16}
    config = build(data=data, model={**SMALL, **SMALL_NORM, "in_channels": 1, "attention_head_dim": 4})
    model = UNet2D(**unet_kwargs(config, 5))
    assert (model.config.sample_size, model.config.in_channels, model.config.out_channels) == (16, 1, 1)
    assert model.config.num_class_embeds == 6
    assert (model.config.norm_num_groups, model.config.norm["groups"]) == (4, 4)
    without = build(data={**data, "label_dropout": 0.0})
    assert unet_kwargs(without, 5)["num_class_embeds"] == 5
    assert unet_kwargs(without, None)["num_class_embeds"] is unet_kwargs(without, 0)["num_class_embeds"] is None


@pytest.mark.parametrize("norm", [*({"kind": kind} for kind in NORM_SECTIONS), {"channels_per_group": 4}])
def test_every_kind_of_norm_is_built(norm: dict) -> None:
    if "groups" in NORM_SECTIONS[norm.get("kind", "group")].model_fields and "channels_per_group" not in norm:
        norm = {**norm, "groups": 4}
    arguments = unet_kwargs(build(model={**SMALL, "norm": norm}), None)
    UNet2D(**arguments)
    assert len(norm_sites(arguments)) > 0


def test_keys_of_a_kind_are_its_options() -> None:
    assert list(NORM_SECTIONS) == list(NORMS)
    for kind, section in NORM_SECTIONS.items():
        options = NORMS[kind].options()
        keys = {"kind", "overrides", "separate_skip_norm", *options} - {"input_std", "sample_levels"}
        assert set(section.model_fields) == keys
        for name in keys & set(options) - {"renorm_warmup", "data_std"}:
            assert section.model_fields[name].default == options[name].default


def test_configuration_can_be_pickled() -> None:
    config = build(model={**SMALL, "norm": {"kind": "switchable"}})
    assert pickle.loads(pickle.dumps(config)) == config


def test_overrides_give_regions_other_norms() -> None:
    overrides = {"decoder": {"kind": "batch", "momentum": 0.2}, 8: {"kind": "layer"}, "out": {"groups": 2}}
    config = build(data={"resolution": 16}, model={**SMALL, "norm": {"groups": 4, "overrides": overrides}})
    model = UNet2D(**unet_kwargs(config, None))
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["down_blocks.0.resnets.0.norm1"] is NORMS["group"]
    assert kinds["down_blocks.1.resnets.0.norm1"] is NORMS["layer"]
    assert kinds["up_blocks.1.resnets.0.norm1"] is NORMS["batch"]
    with pytest.raises(ConfigError, match="^model.norm: .*groups = 32"):
        build(model={**SMALL, "norm": {"kind": "batch", "overrides": {"out": {"kind": "group"}}}})
    assert model.conv_norm_out.num_groups == 2
    assert from_yaml(to_yaml(config), "again") == config


@pytest.mark.parametrize(("given", "expected"), [({}, 25), ({"renorm_warmup": 0}, 0), ({"renorm_warmup": 7}, 7)])
def test_batch_renorm_warms_up_for_a_tenth_of_the_steps(given: dict, expected: int) -> None:
    overrides = {"decoder": {"renorm_warmup": None}, "out": {"kind": "batch"}}
    norm = {"kind": "batch_renorm", "overrides": overrides, **given}
    config = build(train={"total_images": 4000, "batch_size": 16}, model={**SMALL, "norm": norm})
    model = UNet2D(**unet_kwargs(config, None))
    assert model.down_blocks[0].resnets[0].norm1.renorm_warmup == expected
    assert model.up_blocks[0].resnets[0].norm1.renorm_warmup == 25


def test_batch_renorm_in_a_region_warms_up_too() -> None:
    norm = {"kind": "group", "groups": 4, "overrides": {"decoder": {"kind": "batch_renorm"}}}
    config = build(train={"total_images": 4000, "batch_size": 16}, model={**SMALL, "norm": norm})
    assert UNet2D(**unet_kwargs(config, None)).up_blocks[0].resnets[0].norm1.renorm_warmup == 25


@pytest.mark.parametrize(
    ("diffusion", "given", "expected"),
    [
        ({"kind": "flow"}, {}, 0.5),
        ({"kind": "flow"}, {"data_std": 0.7}, 0.7),
        ({"kind": "edm", "sigma_data": 0.3}, {}, 0.3),
    ],
)
def test_the_inputs_standard_deviation_is_that_of_the_process(diffusion: dict, given: dict, expected: float) -> None:
    norm = {"kind": "scaled_ws", **given}
    model = UNet2D(**unet_kwargs(build(diffusion=diffusion, model={**SMALL, "norm": norm}), None))
    assert model.input_scale.data_std == expected
    process = make_process(**diffusion)
    level = process.levels(4)  # the first of which is nearly all noise
    factor = process.network_input(torch.ones(4, 1, 1, 1), level).flatten()
    rms = factor * ((level.alpha * expected) ** 2 + level.sigma**2).sqrt()
    torch.testing.assert_close(model.input_scale.expected_std(level.timestep), rms, rtol=0.03, atol=0)


def test_removed_keys_of_stored_configurations() -> None:
    """Where they had no effect; in a user's configuration they are unknown."""
    norm = {"kind": "batch", "noise_bins": 1, "overrides": {"out": {"kind": "ghost_batch", "noise_bins": 1}}}
    config = from_yaml(yaml.safe_dump({"model": {"norm": norm}}), "run")
    assert config.model.norm.overrides == {"out": {"kind": "ghost_batch"}}
    norm["noise_bins"] = 8
    with pytest.raises(ConfigError, match="^model.norm.noise_bins: unknown key"):
        from_yaml(yaml.safe_dump({"model": {"norm": norm}}), "run")


def values_of(annotation: Any, metadata: tuple = ()) -> st.SearchStrategy:
    """Values that an annotation of the tree takes, of the kinds of value that YAML could confuse."""
    if hasattr(annotation, "__metadata__"):
        inner = [m for item in annotation.__metadata__ for m in getattr(item, "metadata", [item])]
        return values_of(annotation.__origin__, (*metadata, *inner))
    bounds = {k: getattr(m, k) for m in metadata for k in ("ge", "gt", "le", "lt") if hasattr(m, k)}
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is list:
        return st.lists(values_of(arguments[0]), min_size=1, max_size=3)
    if origin is dict:
        return st.dictionaries(values_of(arguments[0]), values_of(arguments[1]), max_size=3)
    if arguments:
        return st.one_of([values_of(arm, metadata) for arm in arguments])
    if annotation is float:
        low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
        edges = {"exclude_min": "gt" in bounds, "exclude_max": "lt" in bounds}
        return st.floats(low, high, allow_nan=False, allow_infinity=False, **edges)
    confusing = st.sampled_from(["no", "1e-4", "null", "~", "0x1F", "1_0", "2024-01-01", "- a", "a: b", "", "<<", "="])
    return {
        bool: st.booleans(),
        int: st.integers(bounds.get("ge", -(10**12)), bounds.get("le", 10**12)),
        str: (confusing | st.text()).filter(len),
        type(None): st.none(),
        Any: st.none() | st.booleans() | st.integers() | confusing,
    }[annotation]


LEAVES = [(path, field) for path, field in walk({"": Config}) if not sections_of(field) and path[-1] != "kind"]


@st.composite
def trees(draw: st.DrawFn) -> Config:
    """A valid tree that differs from the defaults in kinds and a few keys."""
    norm = draw(st.sampled_from(list(NORM_SECTIONS)))
    raw: dict[str, Any] = {
        "diffusion": {"kind": draw(st.sampled_from(sorted(PROCESSES)))},
        "model": {"norm": {"kind": norm}},
    }
    leaves = [
        leaf for leaf in LEAVES if leaf[0][:2] != ("model", "norm") or leaf[0][2] in NORM_SECTIONS[norm].model_fields
    ]
    for path, field in draw(st.lists(st.sampled_from(leaves), max_size=4, unique_by=lambda leaf: leaf[0])):
        section = raw
        for name in path[:-1]:
            section = section.setdefault(name, {})
        section[path[-1]] = draw(values_of(field.annotation, tuple(field.metadata)))
    try:
        return load_config(raw)
    except ConfigError as error:
        assume("given" not in str(error) and "unknown key" not in str(error))
        raise


@settings(max_examples=25, deadline=None)
@given(trees())
@example(load_config({"run_dir": "\x85"}))
@example(load_config({"run_dir": "a\u2028b"}))
def test_yaml_round_trip(config: Config) -> None:
    text = to_yaml(config)
    again = from_yaml(text, "again")
    assert again == config
    assert to_yaml(again) == text
    assert changed_keys(again, config) == {}
    assert yaml.safe_load(text).keys() == config.model_dump().keys()
