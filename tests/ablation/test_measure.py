"""What is measured of a network, against plain computations."""

import copy

import numpy as np
import pytest
import torch

from gnunet.ablation.measure import activation_memory_mib, magnitudes, nearest, norm_kinds, step_cost, val_errors
from gnunet.distributed.accelerator import make_accelerator
from gnunet.distributed.signals import StopSignal
from gnunet.evaluation.validation import per_example_errors, summarize
from gnunet.training.evaluation import validate
from gnunet.training.progress import Display
from gnunet.training.session import build_session
from gnunet.training.trainer import train_step

EXTRACTOR = """
import torch

class Coarse(torch.nn.Module):
    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
"""


@pytest.fixture
def session(tiny):
    """A run after two steps, with more flags; `norm` is its kind."""

    def session(norm: str = "group", *flags: str):
        groups = ["--model.norm.groups", "4"] if norm in ("group", "group_rms") else []
        config = tiny("run", "--model.norm.kind", norm, *groups, *flags)
        built = build_session(config, make_accelerator(config))
        batches = built.batches(0)
        for step in range(2):
            train_step(built, batches, step * config.train.batch_size)()
        return built

    return session


def plain_errors(session, network, indices) -> torch.Tensor:
    autocast = session.accelerator.autocast
    return per_example_errors(network, session.process, session.val_set, indices, device="cpu", autocast=autocast)


def test_errors_are_those_of_the_validation_loss(session):
    trained = session()
    errors = val_errors(trained)
    found = summarize(np.array(errors["running"]), trained.val_set.bins, trained.val_set.num_bins)
    logged = validate(trained, 16, stop=StopSignal(), display=Display(images=0, total=16, enabled=False))
    assert found.validation_loss == pytest.approx(logged["validation_loss"], rel=1e-6)
    assert errors["precise"] is errors["batch"] is None  # they would be the same


class TestOfNormsThatDependOnTheBatch:
    @pytest.mark.parametrize(
        ("flags", "size", "together"),
        [
            ([], 8, 8),
            (["--train.micro_batch_size", "4"], 4, 4),
            (["--model.norm.kind", "ghost_batch", "--model.norm.ghost_size", "3"], 8, 3),
            (["--model.norm.kind", "ghost_batch", "--model.norm.ghost_size", "1"], 8, 1),
        ],
    )
    def test_by_the_statistics_of_a_batch_with_others_of_training(self, session, flags, size, together):
        trained = session("batch", "--train.batch_size", "8", *flags)
        before = copy.deepcopy(trained.ema.model.state_dict())
        network = copy.deepcopy(trained.ema.model).train()  # no dropout: training differs by the norms alone
        process, val_set, places = trained.process, trained.val_set, list(range(0, size, together))
        expected = []
        for first in range(0, 16, len(places)):
            chosen = range(first, min(first + len(places), 16))
            batch, start = val_set.batch(chosen), first // len(places) * size
            images, noise, level, inputs = trained.to_device(trained.train_set.__getitems__(range(start, start + size)))
            ours = process.from_log_snr(batch["log_snr"])
            x0 = val_set.table.to_network(batch["images"])
            noisy, times = process.add_noise(images, noise, level), level.timestep.clone()
            labels = inputs["labels"].clone()
            for i in range(len(chosen)):
                noisy[places[i]] = process.add_noise(x0, batch["noise"], ours)[i]
                times[places[i]], labels[places[i]] = ours.timestep[i], batch["labels"][i]
            output = network(noisy, times, labels).sample[places[: len(chosen)]]
            v = noisy[places[: len(chosen)]] - ours.sigma[:, None, None, None] * output - x0
            expected += (v.square().mean((1, 2, 3)) * (1 + ours.log_snr.exp())).tolist()
        errors = val_errors(trained)
        assert errors["batch"] == pytest.approx(expected, rel=1e-5)
        assert errors["batch"] != errors["running"]
        weights = [name for name, _ in trained.ema.model.named_parameters()]
        assert all(torch.equal(before[name], trained.ema.model.state_dict()[name]) for name in weights)

    def test_by_precise_statistics(self, session):
        trained = session("batch")
        errors = val_errors(trained)
        same = session("batch")
        same.update_ema_bn_stats(16)  # batches, which have 64 images and more
        expected = plain_errors(same, same.ema.model.eval(), range(16)).detach()
        assert errors["precise"] == pytest.approx(expected, rel=1e-5)
        assert errors["precise"] != errors["running"]

    def test_kinds(self, session):
        flags = ["--model.norm.overrides", "{decoder: {kind: batch}}"]
        mixed, frn = session("group", *flags), session("frn")
        assert norm_kinds(mixed.unet.norm_layers().values()) == ["group", "batch"] and mixed.batch_norm_scope
        assert norm_kinds(frn.unet.norm_layers().values()) == ["frn"] and not frn.batch_norm_scope


class TestMagnitudes:
    def test_against_plain_computations(self, session):
        trained = session("group", "--validation.batch_size", "3")
        found = magnitudes(trained)
        network = copy.deepcopy(trained.ema.model).requires_grad_(True)
        seen = {}
        middle = ["attentions.0.group_norm", *(f"resnets.{i}.norm{j}" for i in (0, 1) for j in (1, 2))]
        for path in ["conv_norm_out", *(f"mid_block.{name}" for name in middle)]:
            layer = network.get_submodule(path)
            layer.register_forward_pre_hook(lambda _, args, path=path: seen.update({path: args[0]}))
        for b in range(4):
            indices = np.flatnonzero(trained.val_set.bins == b)
            loss = plain_errors(trained, network, indices).mean()
            gradients = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
            norm = torch.cat([g.flatten() for g in gradients if g is not None]).norm()
            assert found["gradient_norm"][b] == pytest.approx(norm.item(), rel=1e-4)
            rms, largest = found["activation_rms"], found["activation_max"]
            out = seen.pop("conv_norm_out")
            assert rms["out"][b] == pytest.approx(out.square().mean().sqrt().item(), rel=1e-4)
            assert largest["out"][b] == pytest.approx(out.abs().max().item(), rel=1e-4)
            squares = [x.square().mean().item() for x in seen.values()]
            assert len(squares) == 5 and rms["middle"][b] == pytest.approx(np.mean(squares) ** 0.5, rel=1e-4)
        assert found["log_snr"] == [-6, -2, 2, 6] and trained.config.validation.bin_edges == [-8, -4, 0, 4, 8]
        assert not any(layer._forward_pre_hooks for layer in trained.ema.model.modules())
        assert all(not p.requires_grad and p.grad is None for p in trained.ema.model.parameters())

    def test_of_an_empty_bin_and_a_network_without_a_middle(self, session):
        flags = ["--validation.num_bins", "5", "--validation.num_examples", "5", "--model.mid_block_type", "null"]
        trained = session("group", *flags)
        trained.val_set.bins = np.array([0, 0, 1, 3, 4])
        found = magnitudes(trained)
        assert found["gradient_norm"][2] is None and found["activation_rms"]["out"][2] is None
        assert found["activation_rms"]["middle"] == found["activation_max"]["middle"] == [None] * 5
        assert min(value for value in found["gradient_norm"] if value is not None) > 0


def test_nearest_is_of_the_evaluations_samples(session, tmp_path, monkeypatch):
    (tmp_path / "coarse_extractor.py").write_text(EXTRACTOR)
    monkeypatch.syspath_prepend(tmp_path)
    flags = ["--evaluate.metrics", "fd_coarse", "--evaluate.extractors", "{coarse: 'coarse_extractor:Coarse'}"]
    trained = session("group", *flags, "--evaluate.every", "0", "--evaluate.num_images", "6")
    found = nearest(trained)
    assert (found["extractor"], found["num_images"]) == ("coarse", 6)
    assert found["distance_ratio"] > 0 and 0 <= found["near_share"] <= 1
    assert nearest(session("group", *flags)) is None  # a run without evaluations


class TestCost:
    def test_what_is_kept_grows_with_the_batch_and_shrinks_by_recomputing(self, session):
        def kept(*flags: str) -> float:
            return activation_memory_mib(session(*flags))

        one, large = kept("group"), ("group", "--train.batch_size", "16")
        assert kept(*large) == pytest.approx(2 * one, rel=0.01)
        assert kept(*large, "--train.micro_batch_size", "8") == one
        assert kept("group", "--model.activation_checkpointing", "norm") < 0.7 * one
        assert kept("batch") > one  # not fused

    @pytest.mark.parametrize(
        "flags",
        [
            ["none"],
            ["batch", "--train.micro_batch_size", "4"],
            ["group", "--model.norm.separate_skip_norm", "true", "--model.resnet_time_scale_shift", "scale_shift"],
            ["group", "--model.activation_checkpointing", "norm", "--train.total_images", "16"],
        ],
        ids=" ".join,
    )
    def test_of_a_step(self, session, flags):
        trained = session(*flags)
        cost = step_cost(trained)
        assert cost.seconds > 0 and cost.norm_share > 0 and cost.peak_memory_mib is None
        assert not any(layer._forward_pre_hooks for layer in trained.unet.modules())
        assert all(p.grad is None for p in trained.unet.parameters())
