"""What may be attached to a module from outside."""

from __future__ import annotations

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs forward or backward hooks."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or nn.modules.module._has_any_global_hook()
    )


def runs_forward_of(module: nn.Module | None, cls: type[nn.Module]) -> bool:
    """Whether a call of the module is cls.forward and nothing else."""
    if module is None or getattr(type(module), "forward", None) is not cls.forward:
        return False
    return not has_hooks(module) and not has_own_forward(module)


def has_own_forward(module: nn.Module) -> bool:
    """Whether the module's forward is not its class's. (Removing accelerate's hooks leaves the class's, bound.)"""
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward
