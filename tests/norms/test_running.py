"""Running statistics: noise levels, re-estimation, gradient checkpointing, non-finite batches."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gnunet.norms import NORMS, make_norm, set_noise_level, update_bn_stats

KINDS = [kind for kind, norm in NORMS.items() if norm.has_state]
EDGES = (1.0, 5.0)


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


class TestNoiseLevels:
    def test_a_set_holds_what_its_levels_were_normalized_by(self, draw):
        """Batches of levels (0, 0), (0, 2) and (2, 2): level 1 never comes up."""
        layer = make("batch", noise_edges=EDGES, momentum=0.5)
        batches = [draw(2, 12, 3, 5, seed=seed, mean=seed) for seed in range(3)]
        for x, timestep in zip(batches, ([0.0, 0.5], [0.9, 9.0], [5.0, 7.0]), strict=True):
            set_noise_level(layer, torch.tensor(timestep))
            torch.testing.assert_close(layer(x), make("batch")(x))
        means = [moments(x)[0] for x in batches]
        torch.testing.assert_close(layer.running_mean[0], 0.25 * means[0] + 0.5 * means[1])
        torch.testing.assert_close(layer.running_mean[2], 0.25 * means[1] + 0.5 * means[2])
        assert not layer.running_mean[1].any() and (layer.running_var[1] == 1).all()
        assert layer.num_batches_tracked.tolist() == [2, 0, 2]

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_sample_is_evaluated_by_its_levels_set(self, draw, kind):
        layer, x = make(kind, noise_edges=EDGES), draw(3, 12, 3, 5)
        layer.running_mean.copy_(draw(3, 12))
        layer.running_var.copy_(draw(3, 12).square() + 0.5)
        layer.eval()
        set_noise_level(layer, torch.tensor([7.0, 1.0, 0.0]))
        together = layer(x)
        for sample, level in enumerate((2, 1, 0)):
            one = make(kind).eval()
            one.running_mean.copy_(layer.running_mean[level])
            one.running_var.copy_(layer.running_var[level])
            torch.testing.assert_close(together[sample], one(x[sample : sample + 1])[0])

    @pytest.mark.parametrize("kind", KINDS)
    def test_one_level_for_all_samples_equals_no_levels(self, draw, kind):
        layer, plain = make(kind, noise_edges=EDGES, ghost_size=2), make(kind, ghost_size=2)
        for seed in range(3):
            x = draw(5, 12, 3, 5, seed=seed)
            set_noise_level(layer, torch.full((5,), 3.0))
            torch.testing.assert_close(layer(x), plain(x))
        torch.testing.assert_close(layer.running_mean[1], plain.running_mean)
        torch.testing.assert_close(layer.running_var[1], plain.running_var)

    def test_reaches_the_layers_of_a_compiled_model(self, draw):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = make("batch", noise_edges=EDGES)
                self.plain = make("batch")

            def forward(self, x, timestep):
                set_noise_level(self, timestep)
                return self.plain(self.norm(x))

        model = Model()
        compiled = copy.deepcopy(model)
        compiled.compile(fullgraph=True, backend="aot_eager")
        for seed in range(2):
            x, timestep = draw(4, 12, 3, 5, seed=seed), torch.tensor([0.0, 2.0, 3.0, 8.0]) * seed
            torch.testing.assert_close(compiled(x, timestep), model(x, timestep))
        torch.testing.assert_close(compiled.state_dict(), model.state_dict())
        for either in (model, compiled):
            update_bn_stats(either, [(x, timestep), (x + 1, timestep)])
        torch.testing.assert_close(compiled.state_dict(), model.state_dict())
        assert model.norm.num_batches_tracked.tolist() == [2, 1, 1]

    def test_a_missing_noise_level_is_an_error(self, draw):
        layer = make("batch", noise_edges=EDGES)
        with pytest.raises(RuntimeError, match="no noise level for a batch of 4.*set_noise_level"):
            layer(draw(4, 12, 3))
        set_noise_level(layer, torch.zeros(3))
        with pytest.raises(RuntimeError, match="3 noise levels for a batch of 4"):
            layer.eval()(draw(4, 12, 3))


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

    def test_re_estimates_each_noise_level(self, draw):
        layer = make("batch", noise_edges=EDGES)
        layer.running_mean.fill_(7.0)

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = layer

            def forward(self, x, timestep):
                set_noise_level(self, timestep)
                return self.norm(x)

        low, high = (draw(4, 12, 3, 5, seed=seed, mean=seed) for seed in range(2))
        batches = [(low, torch.zeros(4)), (high, torch.full((4,), 9.0)), (low, torch.zeros(4))]
        update_bn_stats(Model(), batches)
        for level, x in ((0, low), (2, high)):
            torch.testing.assert_close((layer.running_mean[level], layer.running_var[level]), moments(x))
        assert (layer.running_mean[1] == 7.0).all() and (layer.running_var[1] == 1.0).all()

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
