import copy
import json

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from gnunet.checkpoint.checkpoint import (
    TrainState,
    checkpoint_files,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    optimizer_tensors,
    prune_checkpoints,
    read_state,
    save_checkpoint,
)
from gnunet.errors import CheckpointError

FILES = checkpoint_files(1)


def network() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    return model.to(memory_format=torch.channels_last)


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):
        model(torch.randn(2, 3, 5, 5)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def save(folder, images, model=None, optimizer=None):
    if model is None:
        model, optimizer = trained()
    state = TrainState(images=images, loss_sum=0.1 + 0.2, scaler={"scale": 2.0**16})
    tensors = {"model": model.state_dict(), "ema": copy.deepcopy(model).state_dict()}
    tensors["optimizer"] = optimizer_tensors(optimizer.state_dict()["state"], model)
    return save_checkpoint(folder, tensors, state=state, config_text="seed: 0\n", accelerator=Accelerator(cpu=True))


def test_round_trip_is_exact(tmp_path):
    model, optimizer = trained()
    before = network()
    save(tmp_path, 24, before, torch.optim.AdamW(before.parameters()))
    path = save(tmp_path, 24, model, optimizer)  # replaces the first
    assert sorted(p.name for p in path.iterdir()) == sorted([*FILES, "manifest.json"])

    torch.manual_seed(1)
    other, ema = network(), network()
    again = torch.optim.AdamW(other.parameters(), fused=True)
    state = load_checkpoint(path, {"model": other, "ema": ema}, again)
    assert state == TrainState(images=24, loss_sum=0.1 + 0.2, scaler={"scale": 2.0**16})
    for a, b, c in zip(
        model.state_dict().values(), other.state_dict().values(), ema.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert other[0].weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 5, 5)
    for net, opt in ((model, optimizer), (other, again)):
        opt.zero_grad()
        net(x).square().mean().backward()
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "empty"])
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, caplog, name, damage):
    older, newer = save(tmp_path, 8), save(tmp_path, 16)
    file = newer / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    assert newest_checkpoint(tmp_path) == older
    assert str(newer) in caplog.text and name in caplog.text


def test_training_does_not_restart_when_all_checkpoints_are_damaged(tmp_path):
    for images in (8, 16):
        (save(tmp_path, images) / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="000000016: model.safetensors is missing"):
        newest_checkpoint(tmp_path)


def test_only_directories_named_by_a_number_are_checkpoints(tmp_path):
    assert newest_checkpoint(tmp_path / "checkpoints") is None
    for name in (".000000016.tmp", "²", "٣", "-1", "8.0"):
        (tmp_path / name).mkdir()
    assert newest_checkpoint(tmp_path) is None
    path = save(tmp_path, 8)
    assert list_checkpoints(tmp_path) == [path]


def test_rotation_keeps_those_with_most_images(tmp_path):
    for images in (8, 1_000_000_000, 16):
        save(tmp_path, images)
    prune_checkpoints(tmp_path, 2, TrainState(1_000_000_000))
    assert [p.name for p in list_checkpoints(tmp_path)] == ["000000016", "1000000000"]


def test_rotation_does_not_count_damaged_later_checkpoints(tmp_path):
    for images in (8, 16, 24):
        save(tmp_path, images)
    (tmp_path / "000000024" / "state.json").unlink()  # so the run resumed from 16, and is now at 20
    save(tmp_path, 20)
    prune_checkpoints(tmp_path, 1, TrainState(20))
    assert [p.name for p in list_checkpoints(tmp_path)] == ["000000020"]


def test_state_that_lacks_a_field_is_rejected(tmp_path):
    path = save(tmp_path, 8)
    state = json.loads((path / "state.json").read_text())
    del state["images"]
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="state.json: images"):
        read_state(path)
