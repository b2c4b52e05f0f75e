"""Untrusted checkpoints and diffusers folders: rejected by name, in bounded memory, without running any code."""

import copy
import io
import json
import os
import pickle
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from gnunet.checkpoint.checkpoint import (
    TrainState,
    checkpoint_files,
    file_sha256,
    load_checkpoint,
    newest_checkpoint,
    optimizer_tensors,
    save_checkpoint,
)
from gnunet.checkpoint.export import export_model
from gnunet.checkpoint.run_dir import RunDir
from gnunet.checkpoint.trained_model import load_trained_model
from gnunet.config import Config, from_yaml, to_yaml, unet_kwargs
from gnunet.diffusion import make_process
from gnunet.errors import CheckpointError, GnunetError
from gnunet.models import UNet2D

FILES = checkpoint_files(1)

MODEL = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm": {"groups": 4},
}
TREE = {"data": {"resolution": 16, "class_conditional": True}, "model": MODEL, "diffusion": {"kind": "flow"}}
DATA = {"fingerprint": "f", "num_images": 3, "class_names": ["a", "b"], "class_counts": [1, 2]}
SPARE = 2**30
"""Bytes that loading may allocate; the hostile files declare about a thousand times as much."""
MARKER = Path(tempfile.gettempdir()) / f"gnunet-hostile-{os.getpid()}"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"


class Marker:
    """Unpickling it creates MARKER."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(MARKER), "w"))


def torch_pickle() -> bytes:
    torch.save({"weight": Marker()}, file := io.BytesIO())
    return file.getvalue()


PICKLES = {"pickle": pickle.dumps(Marker()), "torch pickle": torch_pickle()}


def config_of(**sections: Any) -> Config:
    return from_yaml(json.dumps({**TREE, **sections}), "test")


@pytest.fixture(scope="module")
def network() -> UNet2D:
    return UNet2D(**unet_kwargs(config_of(), 2))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, network: UNet2D) -> Path:
    """A run with one checkpoint in checkpoints/, and its export in model/."""
    folder, config = tmp_path_factory.mktemp("run"), config_of()
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    network(torch.randn(1, 3, 16, 16), 0.5, torch.tensor([1])).sample.mean().backward()
    optimizer.step()
    tensors = {"model": network.state_dict(), "ema": copy.deepcopy(network).state_dict()}
    tensors["optimizer"] = optimizer_tensors(optimizer.state_dict()["state"], network)
    save_checkpoint(
        folder / "checkpoints",
        tensors,
        state=(state := TrainState(images=8, data=DATA)),
        config_text=to_yaml(config),
        accelerator=Accelerator(cpu=True),
    )
    run = RunDir(config.model_copy(update={"run_dir": str(folder)}))
    export_model(run, network, make_process(**config.diffusion.model_dump()), state)
    return folder


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


@pytest.fixture
def checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "000000008"


@pytest.fixture
def exported(run: Path) -> Path:
    return run / "model"


@pytest.fixture
def resume(network: UNet2D) -> Callable[[Path], Any]:
    optimizer = torch.optim.AdamW(network.parameters())
    return lambda path: load_checkpoint(path, {"model": network, "ema": copy.deepcopy(network)}, optimizer)


@pytest.fixture
def assert_rejected(little_memory: Callable[..., AbstractContextManager[None]]) -> Callable[..., None]:
    """`assert_rejected(path, word, load)`: loading raises a short error with this word, and runs no code."""

    def check(path: Path, word: str, load: Callable[[Path], Any] = load_trained_model) -> None:
        with little_memory(SPARE), pytest.raises(GnunetError) as caught:
            load(path)
        assert word in str(caught.value) and len(str(caught.value)) < 3000
        assert not MARKER.exists()

    return check


def seal(checkpoint: Path) -> None:
    """Write a manifest that matches the files as they are."""
    manifest = {name: file_sha256(checkpoint / name) for name in FILES if (checkpoint / name).is_file()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def safetensors(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


# Each case is a file and what is wrong with it: its whole content (bytes), or values that replace those in it (dict).

ZEROS = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_SAFETENSORS = {
    "nothing": b"",
    "header beyond the file": safetensors(b"{}", length=10**6),
    "long header": safetensors(b"{" + b" " * 2**24 + b"}"),
    "header of 8 EiB": safetensors(b"{}", length=2**63 - 1),
    "not JSON": safetensors(b"[[["),
    "deep": safetensors(b'{"a":' * 5000),
    "a terabyte that is not there": safetensors({"a": {**ZEROS, "shape": [2**38], "data_offsets": [0, 2**40]}}),
    "a shape larger than its bytes": safetensors({"a": {**ZEROS, "shape": [2**38]}}, bytes(8)),
    "a shape that overflows": safetensors({"a": {**ZEROS, "shape": [2**62, 2**62, 4]}}, bytes(8)),
    "two in one place": safetensors({"a": ZEROS, "b": ZEROS}, bytes(8)),
    "unknown dtype": safetensors({"a": {**ZEROS, "dtype": "PICKLE"}}, bytes(8)),
    "another model": safetensors({"a": ZEROS}, bytes(8)),
    "empty tensors of any shape": safetensors({"a": {**ZEROS, "shape": [0, 10**15], "data_offsets": [0, 0]}}),
}
BAD_JSON = {
    "nothing": b"", "a list": b"[]", "null": b"null", "deep": b"[" * 100_000, "not UTF-8": b"\xff{}",
    "many digits": b'{"images": ' + b"9" * 5000 + b"}", "large": b" " * (2**24 + 1),
}  # fmt: skip
BAD_YAML = {
    "exponential aliases": b"data:\n a0: &a0 [x]\n"
    + b"".join(b" a%d: &a%d [*a%d, *a%d]\n" % (i, i, i - 1, i - 1) for i in range(1, 40)) + b"seed: *a39\n",
    "deep": b"[" * 100_000,
    "deep blocks": "".join(" " * i + "a:\n" for i in range(500)).encode(),
    "a long integer": b"seed: 0x" + b"f" * 20_000,
    "an integer out of range": b"seed: " + b"9" * 2000,
    "large": b"# " + b"x" * 2**20,
    "a tag that does not fit": b"seed: !!bool maybe",
    "very many keys": b"".join(b"k%d: 1\n" % i for i in range(20_000)),
    "a tag that constructs": b"seed: !!python/object/apply:os.system [touch marker]",
    "not UTF-8": b"\xff\xfe\0",
    "a NUL": b"run_dir: a\0b",
    "a list as a key": b"? [a]\n: 1",
    "a list": b"[1, 2]",
    "infinity": b"train: {learning_rate: 1e400}",
}  # fmt: skip
BAD_CONFIGS: dict[str, dict[str, Any]] = {
    "wide": {"model": {**MODEL, "block_out_channels": [8, 65536]}},
    "a billion channels": {"model": {**MODEL, "block_out_channels": [8, 10**9]}},
    "many levels": {"model": {**MODEL, "block_out_channels": [8] * 10_000}},
    "many layers": {"model": {**MODEL, "layers_per_block": 10**9}},
    "a wide embedding": {"model": {**MODEL, "time_embedding_dim": 10**15}},
    "many timesteps": {"diffusion": {"kind": "ddpm", "num_train_timesteps": 10**12}},
    "large images": {"data": {"resolution": 2**40}},
    "a kind that is a list": {"model": {**MODEL, "norm": {"overrides": {"encoder": {"kind": ["x"]}}}}},
}
BAD_STATES = [
    *({"images": value} for value in (-1, "eight", 8.5, True, None, float("nan"), 16, 10**12)),
    {"reported": 16},
    {"loss_sum": "0"}, {"loss_sum": float("nan")}, {"best": {"images": "8"}}, {"best": {"value": 1.0}},
    {"scaler": []}, {"best": 1}, {"normalized_by": []}, {"format": 2}, {"format": [1]},
    *({"data": {**DATA, "class_counts": value}} for value in ("ab", [1], [1, -1], [0, 0], [1, 2.5], [1] * 3)),
    {"data": {}}, {"data": []}, {"data": {**DATA, "class_names": [1, 2]}}, {"data": {**DATA, "class_names": None}},
]  # fmt: skip
BAD_MANIFESTS = [{"ema.safetensors": entry} for entry in (None, 1, [], {"bytes": "8"}, {"bytes": 2**62, "sha256": ""})]
BAD_POINTERS = [{"checkpoint": name} for name in ("../../other", "/etc", "..", "", "²", "8/../../x", 8, None, ["8"])]
BAD_UNETS = [
    *({"block_out_channels": value} for value in ([8, 65536], [8, 10**9], [8] * 10_000, "ab", None, [8, 16.0])),
    *({"layers_per_block": value} for value in (64, 10**9, "1")), {"down_block_types": ["DownBlock2D"] * 10_000},
    *({"sample_size": value} for value in (10**9, "16", [16])), {"in_channels": 10**9}, {"in_channels": 5},
    {"time_embedding_dim": 10**12}, {"num_class_embeds": 10**12}, {"num_class_embeds": 4},
    {"class_embed_type": "identity", "num_class_embeds": 10**12}, {"attention_head_dim": 10**12},
    {"norm_num_groups": 0}, {"norm_eps": float("nan")}, {"norm": "x"}, {"norm": {"kind": "evil"}},
    {"quantization_config": {"quant_method": "bitsandbytes"}}, {"_class_name": {}},
]  # fmt: skip
BAD_SCHEDULERS = [
    *({"_class_name": name} for name in ("os", "DiffusionPipeline", "UNet2DModel", "Scheduler", 3, None)),
    *({"num_train_timesteps": value} for value in (10**12, "1000", None, -1)), {"shift": float("inf")}, {"shift": "x"},
    {"_class_name": "DDPMScheduler", "trained_betas": [0.1] * 200_000},
    {"_class_name": "DDPMScheduler", "num_train_timesteps": 10**12},
]  # fmt: skip
BAD_CLASSES = [{"class_counts": [1] * 5, "class_names": ["x"] * 5}, {"class_counts": None}, {"class_names": None}]


def cases(name: str, *tables: dict[str, Any] | list[Any]) -> Iterator[Any]:
    for table in tables:
        items = table.items() if isinstance(table, dict) else ((str(value)[:60], value) for value in table)
        yield from (pytest.param(name, content, id=f"{name}: {label}") for label, content in items)


def corrupt(file: Path, content: bytes | dict[str, Any]) -> None:
    if isinstance(content, dict):
        before = TREE if file.suffix == ".yaml" else json.loads(file.read_text()) if file.exists() else {}
        content = json.dumps({**before, **content}).encode()
    file.write_bytes(content)


def test_these_pickles_run_code_when_unpickled():
    for load in (lambda: pickle.loads(PICKLES["pickle"]),
                 lambda: torch.load(io.BytesIO(PICKLES["torch pickle"]), weights_only=False)):  # fmt: skip
        load()
        MARKER.unlink()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(case for name in FILES for case in cases(name, PICKLES)),
        *cases("ema.safetensors", BAD_SAFETENSORS),
        *cases("state.json", BAD_JSON, BAD_STATES),
        *cases("config.yaml", BAD_YAML, BAD_CONFIGS),
    ],
)
def test_corrupted_file_of_a_checkpoint_is_rejected(assert_rejected, resume, checkpoint, name, content):
    corrupt(checkpoint / name, content)
    seal(checkpoint)
    load = resume if name in ("model.safetensors", "optimizer.safetensors") else load_trained_model
    assert_rejected(checkpoint, name, load)


@pytest.mark.parametrize(
    ("name", "content"),
    [*cases("manifest.json", PICKLES, BAD_JSON, BAD_MANIFESTS), *cases("../best", PICKLES, BAD_JSON, BAD_POINTERS)],
)
def test_corrupted_manifest_or_pointer_is_rejected(assert_rejected, checkpoint, name, content):
    corrupt(checkpoint / name, content)
    if name == "manifest.json":
        assert_rejected(checkpoint, "ema.safetensors" if isinstance(content, dict) else name)
        with pytest.raises(CheckpointError):
            newest_checkpoint(checkpoint.parent)
    else:
        assert_rejected(checkpoint.parent / "best", str(checkpoint.parent / "best"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *cases(WEIGHTS, PICKLES, BAD_SAFETENSORS),
        *cases(f"{WEIGHTS}.index.json", PICKLES),
        *cases("unet/config.json", PICKLES, BAD_JSON, BAD_UNETS),
        *cases(SCHEDULER, PICKLES, BAD_JSON, BAD_SCHEDULERS),
        *cases("gnunet.json", PICKLES, BAD_JSON, BAD_CLASSES),
    ],
)
def test_corrupted_file_of_a_diffusers_folder_is_rejected(assert_rejected, exported, name, content):
    corrupt(exported / name, content)
    assert_rejected(exported, str(exported / "unet") if name.startswith("unet/") else name)


@pytest.mark.parametrize("name", [*FILES, WEIGHTS])
def test_huge_sparse_file_is_not_read(assert_rejected, checkpoint, exported, name):
    """8 TB of zeros, whose digest would take hours, behind a header that declares them."""
    size = 2**43
    file = exported / name if name == WEIGHTS else checkpoint / name
    tensor = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    file.write_bytes(safetensors({"conv_in.weight": tensor}))
    os.truncate(file, file.stat().st_size + size)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(
        json.dumps({**manifest, name: {"bytes": file.stat().st_size, "sha256": "0" * 64}})
    )
    assert_rejected(exported if name == WEIGHTS else checkpoint, Path(name).name)


@pytest.mark.parametrize("channels", [(6, 3), (3, 6)])
def test_a_network_for_other_than_images_is_rejected(assert_rejected, exported, channels):
    config = {**json.loads((exported / "unet/config.json").read_text()), "sample_size": 16}
    network = UNet2D.from_config({**config, "in_channels": channels[0], "out_channels": channels[1]})
    network.save_pretrained(exported / "unet")
    assert_rejected(exported, "out_channels")


def test_pickles_next_to_the_files_of_a_model_are_not_read(assert_rejected, checkpoint, exported):
    for content in PICKLES.values():
        for suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
            for stem in ("model", "ema", "optimizer", "state", "random_states_0", "scheduler"):
                (checkpoint / f"{stem}{suffix}").write_bytes(content)
            for folder in (exported, exported / "unet", exported / "scheduler"):
                (folder / f"diffusion_pytorch_model{suffix}").write_bytes(content)
        load_trained_model(checkpoint)
        load_trained_model(exported)
    (exported / WEIGHTS).unlink()
    with pytest.raises(OSError, match="safetensors"):
        UNet2D.from_pretrained(exported / "unet")
    assert_rejected(exported, "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("name", ["unet/config.json", SCHEDULER, "gnunet.json"])
def test_pipe_in_a_diffusers_folder_is_not_opened(assert_rejected, exported, name):
    (exported / name).unlink()
    os.mkfifo(exported / name)
    assert_rejected(exported, str(exported))


def test_configuration_cannot_name_code_or_a_directory_to_write_to(checkpoint, tmp_path):
    config = config_of(
        data={**TREE["data"], "cache_dir": str(tmp_path / "elsewhere")},
        evaluate={
            "metrics": ["fd_evil"], "extractors": {"evil": "antigravity:Evil"},
            "weights": {"inception": "evil.pth", "dinov2": "weights.safetensors"},
        },
    )  # fmt: skip
    (checkpoint / "config.yaml").write_text(to_yaml(config))
    seal(checkpoint)
    loaded = load_trained_model(checkpoint).config
    assert loaded.evaluate.extractors == {} and loaded.evaluate.weights == {"dinov2": "weights.safetensors"}
    assert loaded.data.cache_dir is None
    cache = tmp_path / "elsewhere" / "images-0"
    cache.mkdir(parents=True)
    (cache / "table.json").touch()
    assert load_trained_model(checkpoint).config.data.cache_dir == str(tmp_path / "elsewhere")


def test_control_characters_in_the_run_name_are_replaced(checkpoint):
    (checkpoint / "config.yaml").write_text(to_yaml(config_of(run_dir="runs/a\x1b[2Jb\n")))
    seal(checkpoint)
    assert load_trained_model(checkpoint).name == "a_[2Jb_-000000008"


@pytest.mark.parametrize("name", ["/etc/passwd", "../unet/x.safetensors", "..", "evil.bin", "a\\b.safetensors", 3])
def test_index_can_only_name_safetensors_in_its_directory(assert_rejected, exported, name):
    (exported / "unet" / "evil.bin").write_bytes(PICKLES["torch pickle"])
    keys = list(load_file(exported / WEIGHTS))
    weight_map = {**dict.fromkeys(keys, Path(WEIGHTS).name), keys[0]: name}
    (exported / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_rejected(exported, "index.json")


def test_sharded_diffusers_weights_load(exported, network):
    expected = load_trained_model(exported).network.state_dict()
    shutil.rmtree(exported / "unet")
    shards = UNet2D(**unet_kwargs(config_of(), 2))
    shards.load_state_dict(expected)
    shards.save_pretrained(exported / "unet", max_shard_size="20KB")
    assert len(list((exported / "unet").glob("*-of-*.safetensors"))) > 1
    actual = load_trained_model(exported).network.state_dict()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_symbolic_links_are_followed_only_to_regular_files(assert_rejected, checkpoint, tmp_path):
    """Download caches consist of links; reading a device or a pipe would not end."""
    for name in FILES:
        shutil.move(checkpoint / name, tmp_path / name)
        (checkpoint / name).symlink_to(tmp_path / name)
    load_trained_model(checkpoint)
    for name in (*FILES, "manifest.json"):
        target = (checkpoint / name).resolve()
        (checkpoint / name).unlink()
        (checkpoint / name).symlink_to("/dev/zero")
        assert_rejected(checkpoint, name)
        (checkpoint / name).unlink()
        os.mkfifo(checkpoint / name)
        assert_rejected(checkpoint, name)
        (checkpoint / name).unlink()
        if name in FILES:
            (checkpoint / name).symlink_to(target)


def test_mismatched_tensor_is_rejected_before_anything_changes(assert_rejected, checkpoint):
    network, ema = (UNet2D(**unet_kwargs(config_of(), 2)) for _ in range(2))
    optimizer = torch.optim.AdamW(network.parameters())
    before = copy.deepcopy(network.state_dict())

    def load(path: Path) -> TrainState:
        return load_checkpoint(path, {"model": network, "ema": ema}, optimizer)

    for file in FILES[:3]:
        tensors = load_file(checkpoint / file)
        name = next(name for name, value in tensors.items() if value.dim() == 4)
        for value in (tensors[name].flatten(), tensors[name].long(), tensors[name][..., :1].contiguous()):
            save_file({**tensors, name: value}, checkpoint / file)
            assert_rejected(checkpoint, name, load)
        save_file(tensors, checkpoint / file)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    assert optimizer.state_dict()["state"] == {}
    load(checkpoint)
    assert torch.equal(network.conv_in.weight, load_file(checkpoint / "model.safetensors")["conv_in.weight"])


def test_unmodified_checkpoint_and_export_load_in_little_memory(little_memory, original):
    weights = load_file(original / "checkpoints" / "000000008" / "ema.safetensors")
    for path in (original, original / "checkpoints" / "000000008"):
        with little_memory(SPARE):
            model = load_trained_model(path)
        assert all(torch.equal(model.network.state_dict()[name], value) for name, value in weights.items())
        assert model.class_counts == [1, 2] and model.null_label == 2 and model.size == (16, 16)
    assert load_trained_model(original / "model").class_names == ["a", "b"]
