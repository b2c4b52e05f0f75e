"""From and to diffusers' UNet2DModel. Both directions copy the weights under the same names."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

import torch
from diffusers import UNet2DModel
from torch import nn

from gnunet.errors import first_few

from .norm_sites import plan_norms

Network = TypeVar("Network", bound=nn.Module)
"""UNet2D, which imports this file."""

_MID_ATTENTION = "mid_block.attentions"
_KINDS = ("group", "layer", "instance")
"""Of norm: those that group normalization of some count of groups is."""


def from_diffusers(cls: type[Network], model: UNet2DModel) -> Network:
    """A `cls` with a copy of the model's weights, in its dtype, device and mode.

    Raises:
        ValueError: the model has a block type or another setting that UNet2D does not support.
    """
    return _rebuild(cls, model, _settings(model, cls))


def to_diffusers(model: nn.Module) -> UNet2DModel:
    """A UNet2DModel with a copy of the model's weights, in its dtype, device and mode.

    Raises:
        ValueError: norm layers that UNet2DModel does not have: it knows group normalization, by one count of
            groups and one eps for all layers, and another count in the middle block's attention.
    """
    sites = [site for site in plan_norms(model.config) if site.parts]
    other = [site for site in sites if site.norm["kind"] not in _KINDS]
    if other:
        kind = other[0].norm["kind"]
        paths = [site.path for site in other if site.norm["kind"] == kind]
        raise ValueError(f"UNet2DModel has no norm of kind {kind!r}, which is in {first_few(paths)}")
    split = [site.path for site in sites if len(site.parts) > 1]
    if split:
        raise ValueError(
            f"UNet2DModel cannot normalize a skip connection apart, as separate_skip_norm does in {first_few(split)}"
        )
    norms = {site.path: model.get_submodule(site.path) for site in sites}
    kinds = ", ".join(sorted({repr(site.norm["kind"]) for site in sites}))
    mid_attention = {norm.num_groups for name, norm in norms.items() if name.startswith(_MID_ATTENTION)}
    groups = {norm.num_groups for name, norm in norms.items() if not name.startswith(_MID_ATTENTION)}
    for values, words in ((groups, "group count"), ({norm.eps for norm in norms.values()}, "eps")):
        if len(values) > 1:
            raise ValueError(
                f"UNet2DModel has one {words} for all norms; "
                f"kind {kinds} has {sorted(values)} in {first_few(list(norms))}"
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
