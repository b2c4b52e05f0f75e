"""The classes of the modules in a fused model.

A parent whose whole forward is known applies its children's norm and SiLU in one operation, and the children do not
change. Elsewhere the norm applies both, and the SiLU none. At each call they look at the modules that take part, and
nothing is fused if one of them has been replaced, hooked or given another forward.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor, nn

from gnunet.ops import group_norm_silu
from gnunet.ops.hooks import runs_forward_of


class Fused(nn.Module):
    """Base of the classes from which `fused_class` makes subclasses of a module's class."""

    unfused_class: ClassVar[type[nn.Module]]

    def fused_norms(self) -> list[str]:
        """Names of the children (or "" for the module itself) that are norms whose SiLU is now fused with them."""
        raise NotImplementedError

    def __prepare_scriptable__(self) -> nn.Module:
        raise NotImplementedError("torch.jit.script does not support fused modules; call gnunet.unfuse(model) first")

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        cls = type(self)
        if "unfused_class" in vars(cls):
            return _new, (cls.__bases__[0], cls.unfused_class), reduced[2]
        return reduced


@cache
def fused_class(fused: type[Fused], cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of cls that is called as cls is, because accelerate and FSDP find modules by their class's name."""
    body = {"__module__": fused.__module__, "__doc__": fused.__doc__, "unfused_class": cls}
    return type(cls.__name__, (fused, cls), body)


def unfused_class(cls: type) -> type:
    """cls without `fused_class`, also where it is a base of cls, as after FSDP2's fully_shard or a parametrization."""
    if "unfused_class" in vars(cls):
        unfused: type = cls.unfused_class  # type: ignore[attr-defined]
        return unfused
    bases = tuple(map(unfused_class, cls.__bases__))
    if bases == cls.__bases__:
        return cls
    return type(cls.__name__, bases, {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")})


def _new(fused: type[Fused], cls: type[nn.Module]) -> nn.Module:
    made = fused_class(fused, cls)
    return made.__new__(made)


def norm_silu(norm: Any, x: Tensor, **conditioning: Tensor) -> Tensor:
    """silu(norm(x)); conditioning: add, scale and shift of gnunet.ops.group_norm_silu."""
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, **conditioning)


class FusedSequential(Fused, nn.Sequential):
    """An nn.Sequential that applies a GroupNorm and the SiLU after it in one operation."""

    def forward(self, input: Any) -> Any:
        norm: nn.Module | None = None  # still to be applied
        for module in self:
            if norm is not None and runs_forward_of(module, nn.SiLU):
                input, norm = norm_silu(norm, input), None
                continue
            input = input if norm is None else norm(input)
            norm = module if runs_forward_of(module, nn.GroupNorm) else None
            input = module(input) if norm is None else input
        return input if norm is None else norm(input)

    def fused_norms(self) -> list[str]:
        pairs = pairwise(self._modules.items())
        return [
            name
            for (name, norm), (_, activation) in pairs
            if runs_forward_of(norm, nn.GroupNorm) and runs_forward_of(activation, nn.SiLU)
        ]


class NormsOfParent:
    """Norms and the SiLU that their parent's forward, which is not ours, applies to the output of each."""

    def __init__(self, parent: nn.Module | None, norms: tuple[str, ...], activation: str) -> None:
        self.parent, self.norms, self.activation = parent, norms, activation

    def are_fused(self) -> bool:
        if self.parent is None:
            return False
        children = self.parent._modules
        activation = children.get(self.activation)
        return (
            isinstance(activation, FusedAwaySiLU)
            and runs_forward_of(activation, type(activation))
            and runs_forward_of(activation.original, nn.SiLU)
            and all(runs_forward_of(children.get(name), FusedGroupNorm) for name in self.norms)
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> NormsOfParent:
        # Copying a norm does not copy its parent.
        return NormsOfParent(memo.get(id(self.parent)), self.norms, self.activation)


class FusedGroupNorm(Fused, nn.GroupNorm):
    """A GroupNorm that also applies the SiLU that its parent calls next."""

    siblings: NormsOfParent

    def forward(self, input: Tensor) -> Tensor:
        return norm_silu(self, input) if self.siblings.are_fused() else super().forward(input)

    def fused_norms(self) -> list[str]:
        return [""] if self.siblings.are_fused() else []


class FusedAwaySiLU(nn.Module):
    """Replaces a SiLU that a FusedGroupNorm applies; `original` is that SiLU."""

    min_dims = 0  # of the inputs that come from the norm

    def __init__(self, original: nn.Module, siblings: NormsOfParent) -> None:
        super().__init__()
        self.original, self.siblings = original, siblings
        self.training = original.training

    def forward(self, x: Tensor) -> Tensor:
        return x if x.dim() >= self.min_dims and self.siblings.are_fused() else self.original(x)


class SiLUOfTimeEmbedding(FusedAwaySiLU):
    """The same in a block whose SiLU also activates the time embedding, (N, C), or (N, frames, C) in videos."""

    min_dims = 4  # images, (N, C, H, W), and videos, (N, C, frames, H, W)
