"""RePaint against Algorithm 1 of the paper, and against a distribution that is known."""

import math
from itertools import pairwise

import pytest
import torch

from gnunet.diffusion import make_process
from gnunet.diffusion.sampling import repaint, repaint_positions


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


def test_positions():
    assert repaint_positions(4, 1, 1) == [4, 3, 2, 1, 0]
    # Algorithm 1: each step but the last U times.
    assert repaint_positions(3, 1, 2) == [3, 2, 3, 2, 1, 2, 1, 0]
    assert repaint_positions(5, 2, 2) == [5, 4, 3, 5, 4, 3, 2, 1, 3, 2, 1, 0]
    assert repaint_positions(2, 4, 3) == [2, 1, 0]
    assert sum(after > before for before, after in pairwise(repaint_positions(250, 10, 10))) == 9 * 24


def test_ddpm_is_algorithm_1_of_the_paper():
    steps, resample = 12, 3
    process = make_process("ddpm", num_train_timesteps=steps, beta_schedule="cosine")
    noise = torch.randn(2, 3, 4, 6)
    known = torch.cat([torch.rand(2, 3, 4, 6) * 2 - 1, (torch.rand(2, 1, 4, 6) < 0.5).float()], dim=1)

    def network(x, timestep):
        return 0.3 * x + 0.01 * timestep.view(-1, 1, 1, 1)

    found = repaint(process, network, noise, known, generators(2), steps=steps, jump_length=1, resample=resample)

    streams = generators(2)

    def draw():
        return torch.stack([torch.randn(noise.shape[1:], generator=stream) for stream in streams])

    beta = process.schedule.betas.double()
    bar = torch.cat([torch.ones(1).double(), (1 - beta).cumprod(0)])  # of t = 0..T
    image, m = known[:, :3], known[:, 3:]
    x = noise.double() * (1 - bar[steps]).sqrt()
    for t in range(steps, 0, -1):
        for u in range(1, resample + 1 if t > 1 else 2):
            eps = network(x, torch.full((2,), t - 1))
            x0 = ((x - (1 - bar[t]).sqrt() * eps) / bar[t].sqrt()).clamp(-1, 1)
            eps = (x - bar[t].sqrt() * x0) / (1 - bar[t]).sqrt()  # of the clipped estimate
            mean = (x - beta[t - 1] / (1 - bar[t]).sqrt() * eps) / (1 - beta[t - 1]).sqrt()
            variance = (1 - bar[t - 1]) / (1 - bar[t]) * beta[t - 1]
            unknown = mean + variance.sqrt() * draw()
            x = m * (bar[t - 1].sqrt() * image + (1 - bar[t - 1]).sqrt() * draw()) + (1 - m) * unknown
            if u < resample and t > 1:
                x = (1 - beta[t - 1]).sqrt() * x + beta[t - 1].sqrt() * draw()
    torch.testing.assert_close(found, x.float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(found * m, image * m)


@pytest.mark.parametrize("kind", ["ddpm", "edm", "flow"])
def test_resampling_harmonizes_the_unknown_part_with_the_known(kind, monkeypatch):
    """Pixels of standard deviation 0.5 and correlation 0.9, of which one is 0.6: the other is 0.54 on average."""
    process, covariance = make_process(kind), 0.25 * torch.tensor([[1, 0.9], [0.9, 1]])
    count = 300
    known = torch.tensor([[0.6, 0.0], [1.0, 0.0]]).view(1, 2, 1, 2).expand(count, -1, -1, -1)
    noise = torch.randn(count, 1, 1, 2)

    def exact(output, x, level):
        alpha, sigma = level.alpha[0], level.sigma[0]
        gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(2))
        return (x.view(-1, 2) @ gain.T).view_as(x)

    monkeypatch.setattr(process, "predict_x0", exact)
    process.clip = math.inf
    errors = []
    for resample in (1, 8):
        x = repaint(
            process, lambda x, t: x, noise, known, generators(count), steps=20, jump_length=3, resample=resample
        )
        assert torch.equal(x[..., 0], known[:, :1, :, 0])
        errors.append(abs(x[..., 1].mean().item() - 0.54))
    assert errors[1] < 0.8 * errors[0]
