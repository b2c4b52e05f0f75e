"""Fusing the GroupNorm + SiLU pairs of a model in place, and undoing it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from torch import nn

from gnunet.ops import GroupNormSiLU
from gnunet.ops.hooks import has_hooks, has_own_forward, runs_forward_of

from .modules import Fused, FusedAwaySiLU, FusedGroupNorm, FusedSequential, NormsOfParent, fused_class, unfused_class
from .patterns import FusionPattern, patterns_of


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
    """Apply every GroupNorm and the SiLU that its output goes to in one operation, in place.

    This works for the U-Nets, ControlNets and autoencoders of diffusers, for images and videos, and for nn.Sequential,
    whose layers can still be called by themselves. In a ResnetBlock2D the addition of the time embedding, or its scale
    and shift, become part of the operation. Only the forward of modules changes: parameters are the same objects under
    the same names and classes keep their names, so that state dicts, optimizers, tied weights, save_pretrained and
    wrapping by name are not affected. The report lists what was skipped, such as the group norms of attention.

    A norm or a SiLU that is replaced, hooked or given another forward afterwards, as by offloading, is called as usual
    (in a ResnetBlock2D, then both norms are). Outside of nn.Sequential and ResnetBlock2D, a fused norm includes SiLU
    for whoever calls it. Fuse before `accelerator.prepare` and offloading; torch.jit.script needs `unfuse` first.

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
    for path, module in modules.items():
        if isinstance(module, Fused):
            names = (f"{path}.{name}".strip(".") for name in module.fused_norms())
            skipped |= {name: "already fused" for name in names if name in skipped}
    fused: list[str] = []
    for path, owner in modules.items():
        for pattern in patterns_of(owner):
            _restore_if_replaced(owner, pattern)
            norms = [m for name in pattern.norms if isinstance(m := owner._modules.get(name), nn.GroupNorm)]
            paths = [f"{path}.{name}".lstrip(".") for name in pattern.norms]
            if not norms or any(isinstance(norm, FusedGroupNorm) for norm in norms):
                continue
            if reason := _unfusable_reason(owner, pattern, norms, uses):
                skipped |= {path: reason for path in paths if path in skipped}
            else:
                _apply(owner, pattern, norms)
                fused += paths
    return FuseReport(fused, {path: reason for path, reason in skipped.items() if path not in fused})


def unfuse(model: nn.Module) -> int:
    """Undo `fuse`: restore the class of every module and every SiLU.

    Returns:
        The number of pairs that were fused until now.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: the forward of a fused module was replaced, as offloading does, or hooks were added to the
            replacement of a SiLU; undo that first.
    """
    _check_is_module(model, "unfuse")
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if reason := _reason_to_stay(module):
            raise ValueError(f"cannot unfuse {path}: {reason} after fuse; undo that first")
    count = sum(len(module.fused_norms()) for module in modules.values() if isinstance(module, Fused))
    for module in modules.values():
        _restore_activations(module)
        if isinstance(module, Fused):
            _change_class(module, unfused_class(type(module)))
    return count


def _unfusable_reason(
    owner: nn.Module, pattern: FusionPattern, norms: Sequence[nn.Module], uses: Counter[int]
) -> str | None:
    activation = owner._modules.get(pattern.activation)
    if not isinstance(activation, nn.SiLU):
        return f"followed by {type(activation).__name__}, not SiLU"
    if len(norms) < len(pattern.norms):
        return f"not every norm in its {type(owner).__name__} is a torch.nn.GroupNorm"
    if pattern.replacement is not None and any(uses[id(norm)] > 1 for norm in norms):
        return "shared by several modules"
    children_run = runs_forward_of(activation, nn.SiLU) and all(runs_forward_of(norm, nn.GroupNorm) for norm in norms)
    if has_own_forward(owner) or not children_run:
        return "its forward, its SiLU's or its parent's is hooked or replaced"
    return None


def _apply(owner: nn.Module, pattern: FusionPattern, norms: Sequence[nn.Module]) -> None:
    if pattern.replacement is None:
        if not isinstance(owner, Fused):  # by another of its pairs
            _change_class(owner, fused_class(_fused_parent(owner), type(owner)))
        return
    siblings = NormsOfParent(owner, pattern.norms, pattern.activation)
    for norm in norms:
        _change_class(norm, fused_class(FusedGroupNorm, type(norm)))
        norm.siblings = siblings
    # The SiLU itself stays as it is: other modules may share it.
    setattr(owner, pattern.activation, pattern.replacement(getattr(owner, pattern.activation), siblings))


def _fused_parent(owner: nn.Module) -> type[Fused]:
    if isinstance(owner, nn.Sequential):
        return FusedSequential
    # Imported on first use, since importing diffusers takes seconds.
    from .resnet import FusedResnetBlock2D

    return FusedResnetBlock2D


def _restore_if_replaced(owner: nn.Module, pattern: FusionPattern) -> None:
    """Unfuse what is left of norms and a SiLU that were fused, of which something was replaced since."""
    children = [owner._modules.get(name) for name in (*pattern.norms, pattern.activation)]
    if any(map(_reason_to_stay, children)) or NormsOfParent(owner, pattern.norms, pattern.activation).are_fused():
        return
    for child in children:
        if isinstance(child, FusedGroupNorm):
            _change_class(child, unfused_class(type(child)))
    _restore_activations(owner)


def _reason_to_stay(module: nn.Module | None) -> str | None:
    """Why a module of a fused model cannot be restored, or None."""
    if isinstance(module, (Fused, FusedAwaySiLU)) and has_own_forward(module):
        return "its forward was replaced"
    return "hooks were added to it" if isinstance(module, FusedAwaySiLU) and has_hooks(module) else None


def _restore_activations(owner: nn.Module) -> None:
    for name, child in owner._modules.items():
        if isinstance(child, FusedAwaySiLU):
            setattr(owner, name, child.original)


def _change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = cls
    vars(module).pop("forward", None)  # a bound forward of the former class; modules with another one are skipped
    vars(module).pop("siblings", None)


def _is_group_norm(module: nn.Module) -> bool:
    # diffusers' AdaGroupNorm is not a torch.nn.GroupNorm.
    return isinstance(module, (nn.GroupNorm, GroupNormSiLU)) or type(module).__name__ == "AdaGroupNorm"


def _default_reason(path: str, modules: Mapping[str, nn.Module]) -> str:
    """Why a norm is skipped that is in no pattern."""
    if isinstance(modules[path], GroupNormSiLU):
        return "already gnunet's operator"
    parent = "nothing" if not path else type(modules[path.rpartition(".")[0]]).__name__
    return f"no SiLU is known to follow it in {parent}"


def _check_is_module(model: object, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{function} takes a torch.nn.Module, such as a pipeline's unet or vae; got {type(model).__name__}"
        )
