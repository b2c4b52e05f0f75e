"""From and to diffusers' UNet2DModel. Both directions copy the weights under the same names."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

import torch
from diffusers import UNet2DModel
from torch import nn

from gnunet.errors import first_few
from gnunet.norms import ConcatNorm, kind_of

Network = TypeVar("Network", bound=nn.Module)  # UNet2D, which imports this file
_MID_ATTENTION = "mid_block.attentions"
_KINDS = ("group", "layer", "instance")  # group normalization with some number of groups


def from_diffusers(cls: type[Network], model: UNet2DModel) -> Network:
    return _rebuild(cls, model, _settings(model, cls))


def to_diffusers(model: nn.Module) -> UNet2DModel:
    norms = model.norm_layers()
    if separate := [path for path, norm in norms.items() if isinstance(norm, ConcatNorm)]:
        raise ValueError(
            f"UNet2DModel has no separate norms for a concatenation, as separate_skip_norm in {first_few(separate)}"
        )
    kinds = {path: kind_of(norm) for path, norm in norms.items()}
    for kind in kinds.values():
        if kind not in _KINDS:
            paths = [path for path in kinds if kinds[path] == kind]
            raise ValueError(f"UNet2DModel has no norm of kind {kind!r}, which is in {first_few(paths)}")
    mid_attention = {norm.num_groups for path, norm in norms.items() if path.startswith(_MID_ATTENTION)}
    groups = {norm.num_groups for path, norm in norms.items() if not path.startswith(_MID_ATTENTION)}
    for values, name in ((groups, "group count"), ({norm.eps for norm in norms.values()}, "eps")):
        if len(values) > 1:
            found = ", ".join(map(repr, sorted(set(kinds.values()))))
            raise ValueError(
                f"UNet2DModel has one {name} for all norms; "
                f"kind {found} has {sorted(values)} in {first_few(list(norms))}"
            )
    settings = _settings(model, UNet2DModel)
    settings["norm_num_groups"] = groups.pop()
    settings["norm_eps"] = model.conv_norm_out.eps
    settings["attn_norm_num_groups"] = mid_attention.pop() if mid_attention else None
    return _rebuild(UNet2DModel, model, settings)


def _settings(model: nn.Module, target: type) -> dict[str, Any]:
    """The model's config as far as the target's constructor takes it."""
    names = inspect.signature(target.__init__).parameters
    return {key: value for key, value in model.config.items() if key in names}


def _rebuild(target: type, model: nn.Module, settings: dict[str, Any]) -> Any:
    # On the meta device: no memory, no random numbers drawn, until the copied weights are put in place.
    with torch.device("meta"):
        new = target(**settings)
    weights = model.state_dict()
    copies = {name: w.detach().clone(memory_format=torch.contiguous_format) for name, w in weights.items()}
    new.load_state_dict(copies, assign=True)
    if target is not UNet2DModel:
        new.to(memory_format=torch.channels_last)
    return new.train(model.training)
