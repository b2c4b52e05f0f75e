"""Mean and covariance of a stream of features, in float64."""

import torch
from torch import Tensor

from gnunet.evaluation.batching import single_threaded


class RunningCovariance:
    """Mean and covariance of the rows seen so far, in constant memory.

    Blocks of rows are merged by Chan, Golub & LeVeque's update (1983): each block is centred on its own mean, so
    nothing cancels where the mean is large compared with the standard deviation. The result depends on the blocks and
    their order only, so processes that merge the same blocks in the same order agree bit for bit.

    Attributes:
        count: rows seen.
        mean: float64 (D,).
        scatter: float64 (D, D), the sum over rows of (row - mean) (row - mean)^T.
    """

    def __init__(self, count: int, mean: Tensor, scatter: Tensor):
        self.count, self.mean, self.scatter = count, mean, scatter

    @classmethod
    def empty(cls, num_features: int, device: torch.device | str = "cpu") -> "RunningCovariance":
        options = {"dtype": torch.float64, "device": device}
        return cls(0, torch.zeros(num_features, **options), torch.zeros(num_features, num_features, **options))

    def update(self, features: Tensor) -> None:
        """Add the rows of `features`, floating point (n, D) with n at least 1, on the same device."""
        if features.ndim != 2 or features.shape[1] != len(self.mean) or len(features) == 0:
            raise ValueError(f"features have shape {tuple(features.shape)}; valid: (n > 0, {len(self.mean)})")
        with single_threaded():
            rows = features.double()
            mean = rows.mean(dim=0)
            rows = rows - mean
            delta, total = mean - self.mean, self.count + len(rows)
            self.scatter.addmm_(rows.T, rows)
            self.scatter.addr_(delta, delta, alpha=self.count * len(rows) / total)
            self.mean += delta * (len(rows) / total)
            self.count = total

    @property
    def covariance(self) -> Tensor:
        """float64 (D, D), with the divisor count - 1. Raises ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images; {self.count} given")
        return self.scatter / (self.count - 1)
