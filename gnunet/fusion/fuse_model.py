"""Fusing the GroupNorm + SiLU pairs of a model in place, and the way back."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from gnunet.ops import GroupNormSiLU
from gnunet.ops.hooks import has_hooks

from .modules import FusedAwaySiLU, FusedGroupNorm
from .patterns import Site, sites_of

if TYPE_CHECKING:
    from .resnet import FusedResnetBlock2D


class FuseReport(int):
    """How many pairs a call of `fuse` fused, as an int that knows more. Its text tells what was left and why.

    Attributes:
        fused: the paths of the GroupNorms that were fused, one a pair.
        left: path -> reason of every other group norm in the model.
    """

    fused: list[str]
    left: dict[str, str]

    def __new__(cls, fused: Sequence[str], left: Mapping[str, str]) -> FuseReport:
        self = super().__new__(cls, len(fused))
        self.fused, self.left = list(fused), dict(left)
        return self

    def __reduce__(self) -> tuple[type[FuseReport], tuple[list[str], dict[str, str]]]:
        return FuseReport, (self.fused, self.left)

    def __str__(self) -> str:
        if not self.fused and not self.left:
            return "0 GroupNorm+SiLU pairs fused: the model has no group norm"
        by_reason = defaultdict(list)
        for path, reason in self.left.items():
            by_reason[reason].append(path)
        lines = [f"{len(self.fused)} GroupNorm+SiLU pairs fused; {len(self.left)} group norms left"]
        for reason, paths in by_reason.items():
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            lines.append(f"  {reason}: {paths[0]}{more}")
        return "\n".join(lines)

    __repr__ = __str__

    def __format__(self, spec: str) -> str:
        return format(int(self), spec)


def fuse(model: nn.Module) -> FuseReport:
    """Have every GroupNorm whose output goes to a SiLU run with it as one operation, in place.

    It knows the U-Nets, ControlNets and autoencoders of diffusers, for images and videos, and nn.Sequential,
    which it takes to be run as a whole. In a ResnetBlock2D the addition of the time embedding, or its scale
    and shift, become part of the operation. Modules change their class and keep all else: parameters are the
    same objects under the same names, so that state dicts, optimizers, ties and save_pretrained are not
    affected. What is left as it was, such as the group norms of attention, is in the report.

    Fuse before `accelerator.prepare` and offloading: modules whose forward is hooked or replaced are left.
    Exporters that do not know the operator (TorchScript, ONNX) need `unfuse` first.

    Args:
        model: any module; fused pairs in it stay as they are and do not count.

    Returns:
        How many pairs this call fused, with the paths and the reasons in its attributes.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    _check(model, "fuse")
    modules = dict(model.named_modules())
    uses = Counter(id(child) for owner in modules.values() for child in owner._modules.values())
    left = {path: _default_reason(path, modules) for path, module in modules.items() if _is_group_norm(module)}
    fused: list[str] = []
    for path, owner in modules.items():
        for site in sites_of(owner):
            norms = [m for name in site.norms if type(m := owner._modules.get(name)) is nn.GroupNorm]
            if not norms:
                continue
            paths = [f"{path}.{name}" if path else name for name in site.norms]
            if obstacle := _obstacle(owner, site, norms, uses):
                left |= {path: obstacle for path in paths if path in left}
            else:
                _fuse_site(owner, site, norms)
                fused += paths
    return FuseReport(fused, {path: reason for path, reason in left.items() if path not in fused})


def unfuse(model: nn.Module) -> int:
    """Undo `fuse`: every module has its class again, and every SiLU is back in its place.

    Returns:
        How many pairs were taken apart.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: the forward of a fused module was replaced, as offloading does; undo that first.
    """
    _check(model, "unfuse")
    for path, module in model.named_modules():
        is_fused = isinstance(module, FusedGroupNorm) or hasattr(type(module), "unfused_class")
        if is_fused and _has_own_forward(module):
            raise ValueError(f"cannot unfuse {path}: its forward was replaced after fuse; undo that first")
    count = 0
    for owner in list(model.modules()):
        if unfused_class := getattr(type(owner), "unfused_class", None):
            _change_class(owner, unfused_class)
        for name, child in owner._modules.items():
            if isinstance(child, FusedAwaySiLU):
                setattr(owner, name, child.original)
            elif isinstance(child, FusedGroupNorm):
                _change_class(child, nn.GroupNorm)
                count += 1
    return count


def _obstacle(owner: nn.Module, site: Site, norms: Sequence[nn.Module], uses: Counter[int]) -> str | None:
    """Why a site whose GroupNorms are `norms` cannot be fused, or None."""
    activation = owner._modules.get(site.activation)
    if type(activation) is not nn.SiLU:
        return f"followed by {type(activation).__name__}, not SiLU"
    if len(norms) < len(site.norms):
        return f"not every norm in its {type(owner).__name__} is a torch.nn.GroupNorm"
    if any(uses[id(norm)] > 1 for norm in norms):
        return "shared by several modules"
    if _has_own_forward(owner) or any(_has_own_forward(m) or has_hooks(m) for m in (activation, *norms)):
        return "its forward, its SiLU's or its parent's is hooked or replaced"
    if site.stand_in is None and type(owner) is not _fused_block().unfused_class:
        return f"{type(owner).__name__} is a subclass, and its class would have to change"
    return None


def _fuse_site(owner: nn.Module, site: Site, norms: Sequence[nn.Module]) -> None:
    for norm in norms:
        _change_class(norm, FusedGroupNorm)
    if site.stand_in is None:
        _change_class(owner, _fused_block())
    else:
        # The SiLU itself is not touched: before diffusers 0.33 all modules share one.
        setattr(owner, site.activation, site.stand_in(getattr(owner, site.activation)))


def _fused_block() -> type[FusedResnetBlock2D]:
    """Imported where it is needed, since diffusers takes seconds to import."""
    from .resnet import FusedResnetBlock2D

    return FusedResnetBlock2D


def _change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = cls
    vars(module).pop("forward", None)  # the former class's, bound; `_has_own_forward` lets no other come here


def _has_own_forward(module: nn.Module) -> bool:
    """Whether its forward is not its class's. (Where accelerate's hooks were taken off, it is that, bound.)"""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def _is_group_norm(module: nn.Module) -> bool:
    """By name where that is diffusers' one that is no torch.nn.GroupNorm."""
    return isinstance(module, (nn.GroupNorm, GroupNormSiLU)) or type(module).__name__ == "AdaGroupNorm"


def _default_reason(path: str, modules: Mapping[str, nn.Module]) -> str:
    """Why a norm is left which no site names."""
    if isinstance(modules[path], FusedGroupNorm):
        return "already fused"
    if isinstance(modules[path], GroupNormSiLU):
        return "already gnunet's operator"
    parent = "nothing" if not path else type(modules[path.rpartition(".")[0]]).__name__
    return f"no SiLU is known to follow it in {parent}"


def _check(model: object, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{function} takes a torch.nn.Module, such as a pipeline's unet or vae; got {type(model).__name__}"
        )
