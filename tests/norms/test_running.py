"""Running statistics: re-estimation, gradient checkpointing, non-finite batches."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gnunet.norms import NORMS, make_norm, update_bn_stats

KINDS = [kind for kind, norm in NORMS.items() if norm.has_state]


def make(kind, **options):
    return make_norm({"kind": kind, **options}, 12, activation=None).double()


def moments(x):
    """Mean and biased variance of each channel."""
    columns = x.movedim(1, 0).flatten(1)
    return columns.mean(1), columns.var(1, correction=0)


@pytest.mark.parametrize("kind", KINDS)
def test_non_finite_batches_are_left_out(draw, kind):
    layer, clean = make(kind, ghost_size=2), make(kind, ghost_size=2)
    bad = draw(2, 12, 3, 5)
    bad[1, 4, 0, 0] = float("inf")
    layer(bad)
    assert layer.num_batches_tracked == 0
    for module in (layer, clean):
        module(draw(4, 12, 3, 5))
    torch.testing.assert_close(layer.state_dict(), clean.state_dict())


def test_ghost_batches_count_by_their_average(draw):
    layer, x = make("ghost_batch", ghost_size=2, momentum=0.25), draw(5, 12, 3, 5)
    layer(x)
    parts = [moments(part) for part in x.split(2)]
    unbiased = [v * n / (n - 1) for (_, v), n in zip(parts, (30, 30, 15), strict=True)]
    torch.testing.assert_close(layer.running_mean, 0.25 * sum(m for m, _ in parts) / 3)
    torch.testing.assert_close(layer.running_var, 0.75 + 0.25 * sum(unbiased) / 3)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_layers_count_a_batch_once(draw, kind):
    plain, layer = make(kind), make(kind)
    x = draw(4, 12, 3, 5).requires_grad_()
    plain(x).sum().backward()
    y = checkpoint(layer, x, use_reentrant=False)
    if kind == "batch_renorm":
        with pytest.raises(RuntimeError, match="gradient checkpointing"):
            y.sum().backward()
    else:
        y.sum().backward()
    torch.testing.assert_close(layer.state_dict(), plain.state_dict())


def test_compiled_layers_keep_the_same_statistics(draw):
    model = nn.Sequential(make("batch"), make("batch"))
    compiled = copy.deepcopy(model)
    compiled.compile(fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x = draw(4, 12, 3, 5, seed=seed)
        torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(compiled.state_dict(), model.state_dict())
    for either in (model, compiled):
        update_bn_stats(either, [(x,), (x + 1,)])
    torch.testing.assert_close(compiled.state_dict(), model.state_dict())


class TestUpdateBNStats:
    @pytest.mark.parametrize("kind", KINDS)
    def test_gives_population_statistics_of_all_inputs(self, draw, kind):
        layer = make(kind, ghost_size=2)
        batches = [draw(4, 12, 3, 5, seed=seed, mean=seed) for seed in range(3)]
        layer(batches[0])
        assert update_bn_stats(layer, ((x,) for x in batches)) == 3
        mean, variance = moments(torch.cat(batches))
        torch.testing.assert_close(layer.running_mean, mean)
        torch.testing.assert_close(layer.running_var, variance)
        assert layer.num_batches_tracked == 1

    def test_leaves_out_non_finite_batches(self, draw):
        layer, x = make("batch"), draw(4, 12, 3, 5)
        layer.running_mean.fill_(7.0)
        bad = torch.full_like(x, float("nan"))
        update_bn_stats(layer, [(bad,)])
        assert (layer.running_mean == 7.0).all() and (layer.running_var == 1.0).all()
        update_bn_stats(layer, [(bad,), (x,)])
        torch.testing.assert_close((layer.running_mean, layer.running_var), moments(x))

    def test_later_layers_see_the_inputs_of_training(self, draw):
        """Behind a first layer that normalizes by the batch, and without dropout."""
        model = nn.Sequential(make("batch"), nn.Dropout(0.5), make("batch")).eval()
        model[0].train()
        x = draw(4, 12, 3, 5, mean=3.0)
        update_bn_stats(model, [(x,)])
        assert [module.training for module in model] == [True, False, False]
        torch.testing.assert_close(model[2].running_mean, torch.zeros(12).double())
        first = make("batch")(x)
        torch.testing.assert_close(model[2].running_var, moments(first)[1])

    def test_statistics_are_unchanged_after_an_error(self, draw):
        layer = make("batch")
        layer(draw(4, 12, 3))
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(ValueError, match="no batches"):
            update_bn_stats(layer, [])
        with pytest.raises(AttributeError):
            update_bn_stats(layer, [(draw(4, 12, 3),), (None,)])
        torch.testing.assert_close(layer.state_dict(), before)
        layer(draw(4, 12, 3))
        assert layer.num_batches_tracked == 2

    def test_without_running_statistics_reads_no_batches(self):
        assert update_bn_stats(make("group", groups=4), []) == 0
