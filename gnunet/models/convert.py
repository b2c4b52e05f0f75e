"""From and to diffusers' UNet2DModel. Both directions copy the weights under the same names."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DModel
from torch import nn

from gnunet.ops import GroupNormSiLU

if TYPE_CHECKING:
    from .unet import UNet2D

_MID_ATTENTION = "mid_block.attentions"


def from_diffusers(cls: type[UNet2D], model: UNet2DModel) -> UNet2D:
    """A `cls` with a copy of the model's weights, in its dtype, device and mode.

    Raises:
        ValueError: the model has a block type or another setting that UNet2D does not support.
    """
    return _rebuild(cls, model, _settings(model, cls))


def to_diffusers(model: UNet2D) -> UNet2DModel:
    """A UNet2DModel with a copy of the model's weights, in its dtype, device and mode.

    Raises:
        ValueError: norm layers that UNet2DModel does not have: it knows group normalization, by one count of
            groups and one eps for all layers, and another count in the middle block's attention.
    """
    norms = {name: m for name, m in model.named_modules() if hasattr(m, "batch_dependent")}
    kind = (model.config.norm or {}).get("kind", "group")
    other = [name for name, norm in norms.items() if not isinstance(norm, GroupNormSiLU)]
    if other:
        raise ValueError(f"UNet2DModel has no norm of kind {kind!r}, which is in {_some(other)}")
    mid_attention = {norm.num_groups for name, norm in norms.items() if name.startswith(_MID_ATTENTION)}
    groups = {norm.num_groups for name, norm in norms.items() if not name.startswith(_MID_ATTENTION)}
    if len(groups) > 1:
        raise ValueError(
            f"UNet2DModel has one group count for all norms; kind {kind!r} has {sorted(groups)} "
            f"in {_some(list(norms))}"
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


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
