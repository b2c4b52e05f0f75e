"""Fusing the GroupNorm + SiLU pairs of a model in place, and undoing it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from gnunet.ops import GroupNormSiLU
from gnunet.ops.hooks import has_hooks

from .modules import FusedAwaySiLU, FusedGroupNorm
from .patterns import FusionPattern, patterns_of

if TYPE_CHECKING:
    from .resnet import FusedResnetBlock2D


class FuseReport(int):
    """The number of pairs that a call of `fuse` fused. Its text has the reasons for those that it skipped.

    Attributes:
        fused: the paths of the GroupNorms that were fused, one for each pair.
        skipped: path -> reason of every other group norm in the model.
    """

    fused: list[str]
    skipped: dict[str, str]

    def __new__(cls, fused: Sequence[str], skipped: Mapping[str, str]) -> FuseReport:
        self = super().__new__(cls, len(fused))
        self.fused, self.skipped = list(fused), dict(skipped)
        return self

    def __reduce__(self) -> tuple[type[FuseReport], tuple[list[str], dict[str, str]]]:
        return FuseReport, (self.fused, self.skipped)

    def __str__(self) -> str:
        if not self.fused and not self.skipped:
            return "0 GroupNorm+SiLU pairs fused: the model has no group norm"
        by_reason = defaultdict(list)
        for path, reason in self.skipped.items():
            by_reason[reason].append(path)
        lines = [f"{len(self.fused)} GroupNorm+SiLU pairs fused; {len(self.skipped)} group norms left"]
        for reason, paths in by_reason.items():
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            lines.append(f"  {reason}: {paths[0]}{more}")
        return "\n".join(lines)

    __repr__ = __str__

    def __format__(self, spec: str) -> str:
        return format(int(self), spec)


def fuse(model: nn.Module) -> FuseReport:
    """Replace every GroupNorm whose output goes to a SiLU, and that SiLU, by one operation, in place.

    This works for the U-Nets, ControlNets and autoencoders of diffusers, for images and videos, and for nn.Sequential,
    which is assumed to be run as a whole. In a ResnetBlock2D the addition of the time embedding, or its scale and
    shift, become part of the operation. Modules change their class and nothing else: parameters are the same objects
    under the same names, so that state dicts, optimizers, tied weights and save_pretrained are not affected. The
    report lists what was skipped, such as the group norms of attention.

    Fuse before `accelerator.prepare` and offloading: modules with hooks or a replaced forward are skipped. Exporters
    that do not know the operator (TorchScript, ONNX) need `unfuse` first.

    Args:
        model: any module. Pairs in it that are fused already stay fused and do not count.

    Returns:
        The number of pairs that this call fused, with paths and reasons as attributes.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    _check_is_module(model, "fuse")
    modules = dict(model.named_modules())
    uses = Counter(id(child) for owner in modules.values() for child in owner._modules.values())
    skipped = {path: _default_reason(path, modules) for path, module in modules.items() if _is_group_norm(module)}
    fused: list[str] = []
    for path, owner in modules.items():
        for pattern in patterns_of(owner):
            norms = [m for name in pattern.norms if type(m := owner._modules.get(name)) is nn.GroupNorm]
            if not norms:
                continue
            paths = [f"{path}.{name}" if path else name for name in pattern.norms]
            if reason := _unfusable_reason(owner, pattern, norms, uses):
                skipped |= {path: reason for path in paths if path in skipped}
            else:
                _apply(owner, pattern, norms)
                fused += paths
    return FuseReport(fused, {path: reason for path, reason in skipped.items() if path not in fused})


def unfuse(model: nn.Module) -> int:
    """Undo `fuse`: restore the class of every module and every SiLU.

    Returns:
        The number of pairs that were restored.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: the forward of a fused module was replaced, as offloading does; undo that first.
    """
    _check_is_module(model, "unfuse")
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


def _unfusable_reason(
    owner: nn.Module, pattern: FusionPattern, norms: Sequence[nn.Module], uses: Counter[int]
) -> str | None:
    activation = owner._modules.get(pattern.activation)
    if type(activation) is not nn.SiLU:
        return f"followed by {type(activation).__name__}, not SiLU"
    if len(norms) < len(pattern.norms):
        return f"not every norm in its {type(owner).__name__} is a torch.nn.GroupNorm"
    if any(uses[id(norm)] > 1 for norm in norms):
        return "shared by several modules"
    if _has_own_forward(owner) or any(_has_own_forward(m) or has_hooks(m) for m in (activation, *norms)):
        return "its forward, its SiLU's or its parent's is hooked or replaced"
    if pattern.replacement is None and type(owner) is not _fused_block().unfused_class:
        return f"{type(owner).__name__} is a subclass, and its class would have to change"
    return None


def _apply(owner: nn.Module, pattern: FusionPattern, norms: Sequence[nn.Module]) -> None:
    for norm in norms:
        _change_class(norm, FusedGroupNorm)
    if pattern.replacement is None:
        _change_class(owner, _fused_block())
    else:
        # The SiLU itself stays as it is: before diffusers 0.33 all modules share one.
        setattr(owner, pattern.activation, pattern.replacement(getattr(owner, pattern.activation)))


def _fused_block() -> type[FusedResnetBlock2D]:
    # Imported on first use, since importing diffusers takes seconds.
    from .resnet import FusedResnetBlock2D

    return FusedResnetBlock2D


def _change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = cls
    vars(module).pop("forward", None)  # a bound forward of the former class; modules with another one are skipped


def _has_own_forward(module: nn.Module) -> bool:
    """Whether its forward is not its class's. (Removing accelerate's hooks leaves the class's, bound.)"""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def _is_group_norm(module: nn.Module) -> bool:
    # diffusers' AdaGroupNorm is not a torch.nn.GroupNorm.
    return isinstance(module, (nn.GroupNorm, GroupNormSiLU)) or type(module).__name__ == "AdaGroupNorm"


def _default_reason(path: str, modules: Mapping[str, nn.Module]) -> str:
    """Why a norm is skipped that is in no pattern."""
    if isinstance(modules[path], FusedGroupNorm):
        return "already fused"
    if isinstance(modules[path], GroupNormSiLU):
        return "already gnunet's operator"
    parent = "nothing" if not path else type(modules[path.rpartition(".")[0]]).__name__
    return f"no SiLU is known to follow it in {parent}"


def _check_is_module(model: object, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{function} takes a torch.nn.Module, such as a pipeline's unet or vae; got {type(model).__name__}"
        )
