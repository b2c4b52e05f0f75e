"""What may be attached to a module from outside."""

from __future__ import annotations

from torch import nn

_KINDS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has forward or backward hooks."""
    return any(getattr(module, kind) for kind in _KINDS)
