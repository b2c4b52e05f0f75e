"""What a stranger may put into a checkpoint or a diffusers folder: refused by name, at no cost, and never run."""

import copy
import io
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gnunet.checkpoint.checkpoint import (
    FILES,
    TrainState,
    _digest,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from gnunet.checkpoint.export import export_model
from gnunet.checkpoint.trained_model import load_trained_model
from gnunet.config import Config, from_yaml, to_yaml, unet_kwargs
from gnunet.diffusion import make_process
from gnunet.errors import CheckpointError, GnunetError
from gnunet.models import UNet2D

MODEL = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm": {"groups": 4},
}
DATA = {"fingerprint": "f", "num_images": 3, "class_names": ["a", "b"], "class_counts": [1, 2]}
SPARE = 2**30
"""Bytes that reading something may take beyond what the process has; what is asked for is a thousand times that."""


@pytest.fixture
def assert_refused(little_memory: Callable[..., AbstractContextManager[None]]) -> Callable[..., None]:
    """`assert_refused(path, *words, opened=load_trained_model)`: by an error with these words, in little memory."""

    def check(path: Path, *words: str, opened: Callable[[Path], Any] = load_trained_model) -> None:
        with little_memory(SPARE), pytest.raises(GnunetError) as caught:
            opened(path)
        text = str(caught.value)
        assert len(text) < 3000 and not [word for word in words if word not in text], text

    return check


def config_of(**sections: Any) -> Config:
    tree = {"data": {"resolution": 16, "class_conditional": True}, "model": MODEL, "diffusion": {"kind": "flow"}}
    return from_yaml(json.dumps({**tree, **sections}), "test")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint in checkpoints/, and its export in model/."""
    folder, config = tmp_path_factory.mktemp("run"), config_of()
    network = UNet2D(**unet_kwargs(config, 2))
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    network(torch.randn(1, 3, 16, 16), 0.5, torch.tensor([1])).sample.mean().backward()
    optimizer.step()
    save_checkpoint(
        folder / "checkpoints", model=network, ema=copy.deepcopy(network), optimizer=optimizer,
        state=TrainState(images=8, data=DATA), config_text=to_yaml(config),
    )  # fmt: skip
    export_model(folder / "model", network, make_process(**config.diffusion.model_dump()), images=8, data=DATA)
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture
def checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "000000008"


@pytest.fixture
def exported(run: Path) -> Path:
    return run / "model"


def seal(checkpoint: Path) -> None:
    """A stranger's manifest holds."""
    manifest = {name: _digest(checkpoint / name) for name in FILES if (checkpoint / name).is_file()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def safetensors(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


# Code.


class Marker:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def pickles(marker: Path) -> dict[str, bytes]:
    zipped = io.BytesIO()
    torch.save({"weight": Marker(marker)}, zipped)
    return {"plain": pickle.dumps(Marker(marker)), "torch": zipped.getvalue()}


def test_a_pickle_of_these_would_run(tmp_path):
    for kind, content in pickles(tmp_path / "marker").items():
        if kind == "plain":
            pickle.loads(content)
        else:
            torch.load(io.BytesIO(content), weights_only=False)
        assert (tmp_path / "marker").exists()
        (tmp_path / "marker").unlink()


@pytest.mark.parametrize("kind", ["plain", "torch"])
@pytest.mark.parametrize("name", [*FILES, "manifest.json", "../best"])
def test_no_pickle_is_read_under_a_name_of_a_checkpoint(assert_refused, checkpoint, tmp_path, name, kind):
    (checkpoint / name).write_bytes(pickles(tmp_path / "marker")[kind])
    if name in FILES:
        seal(checkpoint)
    best = checkpoint.parent / "best"
    weights = "raw" if name == "model.safetensors" else "ema"
    if name == "optimizer.safetensors":
        network = UNet2D(**unet_kwargs(config_of(), 2))
        optimizer = torch.optim.AdamW(network.parameters())
        assert_refused(
            checkpoint, name, opened=lambda path: load_checkpoint(path, model=network, ema=network, optimizer=optimizer)
        )
    else:
        file = best if name == "../best" else checkpoint
        assert_refused(file, Path(name).name, opened=lambda path: load_trained_model(path, weights))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("kind", ["plain", "torch"])
@pytest.mark.parametrize(
    "name",
    ["unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json", "gnunet.json",
     "unet/diffusion_pytorch_model.safetensors.index.json"],
)  # fmt: skip
def test_no_pickle_is_read_under_a_name_of_a_diffusers_folder(assert_refused, exported, tmp_path, name, kind):
    (exported / name).write_bytes(pickles(tmp_path / "marker")[kind])
    assert_refused(exported, Path(name).name)
    assert not (tmp_path / "marker").exists()


def test_no_pickle_is_read_beside_what_is_whole(assert_refused, checkpoint, exported, tmp_path):
    for content in pickles(tmp_path / "marker").values():
        for suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
            for stem in ("model", "ema", "optimizer", "state", "random_states_0", "scheduler"):
                (checkpoint / f"{stem}{suffix}").write_bytes(content)
            for folder in (exported, exported / "unet", exported / "scheduler"):
                (folder / f"diffusion_pytorch_model{suffix}").write_bytes(content)
        load_trained_model(checkpoint)
        load_trained_model(exported)
    (exported / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert_refused(exported, "diffusion_pytorch_model.safetensors")
    with pytest.raises(OSError, match="safetensors"):
        UNet2D.from_pretrained(exported / "unet")
    assert not (tmp_path / "marker").exists()


def test_a_checkpoint_names_no_code_to_run_and_no_folder_to_write_to(checkpoint, tmp_path, caplog):
    config = config_of(
        data={"resolution": 16, "class_conditional": True, "cache_dir": str(tmp_path / "elsewhere")},
        evaluate={
            "metrics": ["fd_evil"], "extractors": {"evil": "antigravity:Evil"},
            "weights": {"inception": "evil.pth", "dinov2": "weights.safetensors"},
        },
    )  # fmt: skip
    (checkpoint / "config.yaml").write_text(to_yaml(config))
    seal(checkpoint)
    found = load_trained_model(checkpoint).config
    assert found.evaluate.extractors == {} and found.evaluate.weights == {"dinov2": "weights.safetensors"}
    assert found.data.cache_dir is None and "evaluate.extractors" in caplog.text
    cache = tmp_path / "elsewhere" / "images-0"
    cache.mkdir(parents=True)
    (cache / "table.json").touch()
    assert load_trained_model(checkpoint).config.data.cache_dir == str(tmp_path / "elsewhere")


# Paths.


@pytest.mark.parametrize("name", ["../../other", "/etc", "..", "", "²", "8/../../x", 8, None, ["000000008"]])
def test_best_names_a_checkpoint_beside_it(assert_refused, checkpoint, name):
    best = checkpoint.parent / "best"
    best.write_text(json.dumps({"checkpoint": name}))
    assert_refused(best, str(best), "a checkpoint beside it")
    best.write_text(json.dumps({"checkpoint": checkpoint.name}))
    assert load_trained_model(best).name == "default-000000008"


def test_folders_that_are_named_by_no_number_are_no_checkpoints(checkpoint):
    for name in ("²", "٣", "-1", "8.0"):
        (checkpoint.parent / name).mkdir()
    assert list_checkpoints(checkpoint.parent) == [checkpoint]


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../unet/x.safetensors", "..", "evil.bin", "evil", "a\\b.safetensors", 3]
)
def test_shards_lie_beside_their_index_and_are_safetensors(assert_refused, exported, tmp_path, name):
    unet = exported / "unet"
    (unet / "evil.bin").write_bytes(pickles(tmp_path / "marker")["torch"])
    keys = load_file(unet / "diffusion_pytorch_model.safetensors")
    index = {"metadata": {}, "weight_map": {**dict.fromkeys(keys, "diffusion_pytorch_model.safetensors")}}
    index["weight_map"][next(iter(keys))] = name
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(exported, "index.json", ".safetensors files beside it")
    assert not (tmp_path / "marker").exists()


def test_shards_that_belong_together_load(exported):
    plain = load_trained_model(exported).network.state_dict()
    shutil.rmtree(exported / "unet")
    network = UNet2D(**unet_kwargs(config_of(), 2))
    network.load_state_dict(plain)
    network.save_pretrained(exported / "unet", max_shard_size="20KB")
    assert len(list((exported / "unet").glob("*-of-*.safetensors"))) > 1
    found = load_trained_model(exported).network.state_dict()
    assert all(torch.equal(found[name], value) for name, value in plain.items())


def test_links_are_followed_to_files_alone(assert_refused, checkpoint, tmp_path):
    """A download's cache is made of links; a device or a pipe would be read for ever."""
    for name in FILES:
        shutil.move(checkpoint / name, tmp_path / name)
        (checkpoint / name).symlink_to(tmp_path / name)
    load_trained_model(checkpoint)
    for name in (*FILES, "manifest.json"):
        (checkpoint / name).unlink()
        (checkpoint / name).symlink_to("/dev/zero")
        assert_refused(checkpoint, *([] if name == "manifest.json" else [f"{name} is missing"]))
        (checkpoint / name).unlink()
        os.mkfifo(checkpoint / name)
        assert_refused(checkpoint, *([] if name == "manifest.json" else [f"{name} is missing"]))
        if name in FILES:
            (checkpoint / name).unlink()
            shutil.copy(tmp_path / name, checkpoint / name)


# Headers.

ZEROS = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LIES = {
    "nothing": b"",
    "seven bytes": b"\0" * 7,
    "header beyond the file": safetensors(b"{}", length=10**6),
    "header of 8 EiB": safetensors(b"{}", length=2**63 - 1),
    "header beyond its limit": safetensors(b"{}" + b" " * 2**24),
    "no JSON": safetensors(b"[[["),
    "deep": safetensors(b'{"a":' * 5000),
    "a terabyte that is not there": safetensors({"a": {**ZEROS, "shape": [2**38], "data_offsets": [0, 2**40]}}),
    "a shape larger than its bytes": safetensors({"a": {**ZEROS, "shape": [2**38]}}, bytes(8)),
    "a shape that overflows": safetensors({"a": {**ZEROS, "shape": [2**62, 2**62, 4]}}, bytes(8)),
    "negative": safetensors({"a": {**ZEROS, "shape": [-2]}}, bytes(8)),
    "offsets backwards": safetensors({"a": {**ZEROS, "data_offsets": [8, 0]}}, bytes(8)),
    "two in one place": safetensors({"a": ZEROS, "b": ZEROS}, bytes(8)),
    "a hole": safetensors({"a": ZEROS, "b": {**ZEROS, "data_offsets": [16, 24]}}, bytes(24)),
    "more bytes than tensors": safetensors({"a": ZEROS}, bytes(1000)),
    "no such type": safetensors({"a": {**ZEROS, "dtype": "PICKLE"}}, bytes(8)),
    "another model": safetensors({"a": ZEROS}, bytes(8)),
    "a name without end": safetensors({"a" * 10**6: ZEROS}, bytes(8)),
    "empty tensors of any shape": safetensors({"a": {**ZEROS, "shape": [0, 10**15], "data_offsets": [0, 0]}}),
}


@pytest.mark.parametrize("content", LIES.values(), ids=LIES)
def test_headers_that_lie(assert_refused, checkpoint, exported, content):
    (checkpoint / "ema.safetensors").write_bytes(content)
    seal(checkpoint)
    assert_refused(checkpoint, str(checkpoint), "ema.safetensors")
    (exported / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(content)
    assert_refused(exported, str(exported / "unet"))


def test_tensors_of_another_type_or_shape_are_refused_before_anything_is_changed(assert_refused, checkpoint):
    network, averaged = (UNet2D(**unet_kwargs(config_of(), 2)) for _ in range(2))
    optimizer = torch.optim.AdamW(network.parameters())
    before = copy.deepcopy(network.state_dict())
    for file in FILES[:3]:
        good = load_file(checkpoint / file)
        name = next(name for name, value in good.items() if value.dim() == 4)
        for value in (good[name].flatten(), good[name].long(), good[name][..., :1].contiguous()):
            save_file({**good, name: value}, checkpoint / file)
            assert_refused(
                checkpoint, file, name,
                opened=lambda path: load_checkpoint(path, model=network, ema=averaged, optimizer=optimizer),
            )  # fmt: skip
        save_file(good, checkpoint / file)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    assert optimizer.state_dict()["state"] == {}
    load_checkpoint(checkpoint, model=network, ema=averaged, optimizer=optimizer)
    assert torch.equal(network.conv_in.weight, load_file(checkpoint / "model.safetensors")["conv_in.weight"])


# Settings of a checkpoint.

ATTENTION = {"down_block_types": ["AttnDownBlock2D"] * 14, "up_block_types": ["AttnUpBlock2D"] * 14}
CONFIGS = {
    "wide": ({"model": {**MODEL, "block_out_channels": [8, 65536]}}, "not those of its config"),
    "a billion channels": ({"model": {**MODEL, "block_out_channels": [8, 10**9]}}, "block_out_channels"),
    "many levels": ({"model": {**MODEL, "block_out_channels": [8] * 10_000}}, "14 of them at most"),
    "all that is valid": (
        {"data": {"resolution": 8192}, "model": {**ATTENTION, "block_out_channels": [65536] * 14,
                                                "layers_per_block": 64}},
        "not those of its config",
    ),
    "many layers": ({"model": {**MODEL, "layers_per_block": 10**9}}, "layers_per_block"),
    "wide embedding": ({"model": {**MODEL, "time_embedding_dim": 10**15}}, "time_embedding_dim"),
    "many timesteps": ({"diffusion": {"kind": "ddpm", "num_train_timesteps": 10**12}}, "at most 100000"),
    "many steps": ({"sampling": {"num_inference_steps": 10**12}}, "sampling.num_inference_steps"),
    "many images": ({"sampling": {"num_images": 10**12}}, "sampling.num_images"),
    "large images": ({"data": {"resolution": 2**40}}, "at most 8192"),
    "noise bins": (
        {"model": {**MODEL, "norm": {"groups": 4, "overrides": {"encoder": {"noise_bins": 10**12}}}}}, "noise_bins"
    ),
    "noise bins of words": (
        {"model": {**MODEL, "norm": {"groups": 4, "overrides": {"encoder": {"noise_bins": "x"}}}}}, "noise_bins"
    ),
    "a kind that is a list": (
        {"model": {**MODEL, "norm": {"groups": 4, "overrides": {"encoder": {"kind": ["x"]}}}}}, "norm"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("sections", "words"), CONFIGS.values(), ids=CONFIGS)
def test_configs_without_bounds(assert_refused, checkpoint, sections, words):
    tree = {"data": {"resolution": 16, "class_conditional": True}, "model": MODEL, "diffusion": {"kind": "flow"}}
    (checkpoint / "config.yaml").write_text(json.dumps({**tree, **sections}))
    seal(checkpoint)
    assert_refused(checkpoint, "config.yaml", words)


YAML = {
    "laughs": ("a: &a [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1 if i else ''}, *a]\n" for i in range(30)), "alias"),
    "deep": ("[" * 100_000, "deeper"),
    "deep blocks": ("".join(" " * i + "a:\n" for i in range(500)), "deeper"),
    "many keys": ("".join(f"k{i}: 1\n" for i in range(20_000)), "keys and values"),
    "a long number": ("seed: 0x" + "f" * 20_000, "characters"),
    "many digits": ("seed: " + "9" * 2000, "seed: given 99.*at most 18446744073709551615"),
    "large": ("# " + "x" * 2**20, "larger than"),
    "tag": ("seed: !!python/object/apply:os.system [touch marker]", "tag"),
    "standard tag": ("seed: !!bool maybe", "tag"),
    "no text": (b"\xff\xfe\0", "config.yaml"),
    "nul": ("run_dir: a\0b", "config.yaml"),
    "key of a list": ("? [a]\n: 1", "config.yaml"),
    "a list": ("[1, 2]", "config.yaml"),
    "not a number": ("seed: .nan", "seed"),
    "infinity": ("train: {learning_rate: 1e400}", "learning_rate"),
}


@pytest.mark.parametrize(("text", "words"), YAML.values(), ids=YAML)
def test_yaml_that_grows(assert_refused, checkpoint, text, words):
    (checkpoint / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    seal(checkpoint)
    assert_refused(checkpoint, "config.yaml")
    with pytest.raises(GnunetError, match=words):
        load_trained_model(checkpoint)


def test_a_name_with_control_characters_is_made_printable(checkpoint):
    (checkpoint / "config.yaml").write_text(to_yaml(config_of(run_dir="runs/a\x1b[2Jb\n")))
    seal(checkpoint)
    assert load_trained_model(checkpoint).name == "a_[2Jb_-000000008"


STATES = {
    "images": (-1, "eight", 8.5, True, None, [8]),
    "loss_sum": ("0", None, [1.0]),
    "scaler": ([], "x", 1),
    "data": (
        [], {}, {**DATA, "class_counts": "ab"}, {**DATA, "class_counts": [1]}, {**DATA, "class_counts": [1, -1]},
        {**DATA, "class_counts": [0, 0]}, {**DATA, "class_counts": [1, 2.5]}, {**DATA, "class_counts": [1, 10**30]},
        {**DATA, "class_names": [1, 2]}, {**DATA, "class_names": None}, {**DATA, "fingerprint": None},
        {**DATA, "class_counts": [1] * 2**20, "class_names": ["x"] * 2**20},
        {**DATA, "class_counts": [1] * 3, "class_names": ["x"] * 3},
    ),
    "normalized_by": (1, []),
    "best": (1, []),
    "format": (2, None, [1]),
}  # fmt: skip


@pytest.mark.parametrize("key", STATES)
def test_states_of_other_types(assert_refused, checkpoint, key):
    text = (checkpoint / "state.json").read_text()
    for value in STATES[key]:
        (checkpoint / "state.json").write_text(text)
        change(checkpoint / "state.json", **{key: value})
        seal(checkpoint)
        assert_refused(checkpoint, str(checkpoint))


JSONS = [b"", b"[]", b"1", b"null", b"[" * 100_000, b'{"a":' * 100_000, b'{"images": ' + b"9" * 5000 + b"}", b"\xff{}",
         b" " * (2**24 + 1)]  # fmt: skip


@pytest.mark.parametrize("name", ["state.json", "manifest.json", "../best"])
def test_json_that_is_none(assert_refused, checkpoint, name):
    for content in JSONS:
        (checkpoint / name).write_bytes(content)
        if name == "state.json":
            seal(checkpoint)
        assert_refused(checkpoint.parent / "best" if name == "../best" else checkpoint, Path(name).name)


@pytest.mark.parametrize("entry", [None, 1, "x", [], {"bytes": "8"}, {"bytes": 2**62, "sha256": ""}, {"bytes": None}])
def test_manifests_of_other_types(assert_refused, checkpoint, entry):
    change(checkpoint / "manifest.json", **{"ema.safetensors": entry, "../../x": {"bytes": 1}})
    assert_refused(checkpoint, "ema.safetensors")
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        newest_checkpoint(checkpoint.parent)


# Settings of a diffusers folder.

UNETS: dict[str, list[Any]] = {
    "block_out_channels": [
        [8, 65536],
        [8, 10**9],
        [8] * 10_000,
        "ab",
        8,
        None,
        [],
        [8, -16],
        [8, 16.0],
        [[8], [16]],
        {},
    ],
    "layers_per_block": [64, 65, 10**9, -1, 0, "1", None, 1.0, True, float("nan")],
    "down_block_types": [[], "DownBlock2D", None, 3, ["DownBlock2D"] * 10_000, [1, 2], [["DownBlock2D"], {}]],
    "sample_size": [10**9, 0, -16, "16", 16.0, [16], [16, 10**9], [16, 16]],
    "in_channels": [10**9, "3", None, 5],
    "time_embedding_dim": [10**12, "x", -1, 64],
    "num_class_embeds": [10**12, -1, "x", 2.0, 4],
    "attention_head_dim": [10**12, "x", [8], float("inf"), -1],
    "norm_num_groups": [0, 10**30, "4", None, -4],
    "norm_eps": [float("nan"), "x", None, -1, 10**400],
    "mid_block_scale_factor": [0, float("inf"), "x", 10**400],
    "downsample_padding": [10**9, -1, "x"],
    "dropout": [2, "x", float("nan")],
    "freq_shift": [10**400, "x", None],
    "norm": [
        [],
        "x",
        {"kind": ["group"]},
        {"kind": "evil"},
        {"overrides": {"encoder": {"kind": {}}}},
        {"eps": 10**400},
    ],
    "_class_name": [1, {}],
    "_use_default_values": [["block_out_channels"], 1],
    "quantization_config": [{"quant_method": "bitsandbytes"}, "x"],
}


@pytest.mark.parametrize("key", UNETS)
def test_unet_configs_without_bounds(assert_refused, exported, key):
    file = exported / "unet" / "config.json"
    text = file.read_text()
    for value in UNETS[key]:
        file.write_text(text)
        change(file, **{key: value})
        assert_refused(exported, str(exported))


def test_a_class_count_that_no_weight_bounds(assert_refused, exported):
    """With these class embeddings no tensor has a row for each class."""
    change(exported / "unet" / "config.json", class_embed_type="identity", num_class_embeds=10**12)
    assert_refused(exported, "num_class_embeds")


SCHEDULERS: dict[str, list[Any]] = {
    "num_train_timesteps": [10**12, 1e12, "1000", None, -1, float("nan"), [10**12]],
    "_class_name": ["os", "DiffusionPipeline", "UNet2DModel", "__class__", 3, None, "EvilScheduler", "Scheduler"],
    "shift": [-1.0, "x", float("inf"), 10**400, {}],
    "trained_betas": [[0.1] * 200_000, [[0.1]]],
    "beta_schedule": ["x" * 10**5],
}


@pytest.mark.parametrize("key", SCHEDULERS)
@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "DDPMScheduler", "EDMEulerScheduler"])
def test_schedulers_without_bounds(assert_refused, exported, key, name):
    file = exported / "scheduler" / "scheduler_config.json"
    text = file.read_text()
    foreign = {"shift": ("Flow",), "num_train_timesteps": ("Flow", "DDPM")}.get(key, ("",))
    for value in SCHEDULERS[key]:
        file.write_text(text)
        change(file, **{"_class_name": name, key: value})
        if name.startswith(foreign):
            assert_refused(exported, str(file))


@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json", "gnunet.json"])
def test_json_that_is_none_in_a_diffusers_folder(assert_refused, exported, name):
    for content in JSONS:
        (exported / name).write_bytes(content)
        assert_refused(exported, Path(name).name)
    (exported / name).unlink()
    os.mkfifo(exported / name)
    assert_refused(exported, str(exported))


@pytest.mark.parametrize("about", [{"class_counts": [1] * 5, "class_names": ["x"] * 5}, {"class_counts": None}, {}])
def test_classes_that_the_network_does_not_have(assert_refused, exported, about):
    (exported / "gnunet.json").write_text(json.dumps({"images": 8, "class_names": None, **about}))
    assert_refused(exported, "gnunet.json")


def test_what_nobody_touched_opens(little_memory, whole):
    weights = load_file(whole / "checkpoints" / "000000008" / "ema.safetensors")
    for path in (whole, whole / "checkpoints" / "000000008"):
        with little_memory(SPARE):
            found = load_trained_model(path)
        assert all(torch.equal(found.network.state_dict()[name], value) for name, value in weights.items())
        assert found.class_counts == [1, 2] and found.null_label == 2 and found.resolution == 16
    assert load_trained_model(whole / "model").class_names == ["a", "b"]
