"""No normalization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from .layer import NormAct
from .options import Option


class NoNorm(NormAct):
    """The conditioning and the activation of a norm layer without the normalization, and without parameters.

    y = act((x + add) * (1 + scale) + shift). There is no weight or bias: the convolution before it has both.
    """

    local = True
    options: ClassVar[Mapping[str, Option]] = {}
    affine = ()

    def normalize(self, u: Tensor) -> Tensor:
        return u
