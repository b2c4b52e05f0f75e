"""No normalization."""

from __future__ import annotations

from torch import Tensor

from .layer import NormAct


class NoNorm(NormAct):
    """The conditioning and the activation of a norm layer without normalization and without parameters.

    y = act((x + add) * (1 + scale) + shift). Weight and bias would repeat those of the convolution before it.
    """

    is_pointwise = True
    affine = ()

    def normalize(self, u: Tensor) -> Tensor:
        return u
