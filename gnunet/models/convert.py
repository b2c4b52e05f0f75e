"""From and to diffusers' UNet2DModel. Both directions copy the weights under the same names."""

from __future__ import annotations

import inspect
from types import NoneType
from typing import Any, TypeVar

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import nn

from gnunet.errors import first_few, truncate
from gnunet.fusion import fuse
from gnunet.norms import ConcatNorm, kind_of
from gnunet.ops.hooks import has_hooks

Network = TypeVar("Network", bound=nn.Module)  # UNet2D, which imports this file
_MID_ATTENTION = "mid_block.attentions"
_KINDS = ("group", "layer", "instance")  # group normalization with some number of groups
_NO_EFFECT = ("training", "inplace", "gradient_checkpointing", "recompute", "backend", "forward")  # on results
_PLAIN = (bool, int, float, str, tuple, list, NoneType)
_PROCESSORS = (AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)  # alike in results


def from_diffusers(cls: type[Network], model: UNet2DModel) -> Network:
    if not isinstance(model, UNet2DModel):
        raise ValueError(f"from_diffusers takes a UNet2DModel; got {type(model).__name__}")
    _check_modules(model, UNet2DModel)
    return _rebuild(cls, model, _settings(model, cls))


def to_diffusers(cls: type[Network], model: Network) -> UNet2DModel:
    _check_modules(model, cls)
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


def _on_meta(target: type[nn.Module], settings: dict[str, Any]) -> Any:
    """The model, without memory and without drawing random numbers."""
    with torch.device("meta"):
        return target(**settings)


def _rebuild(target: type[nn.Module], model: nn.Module, settings: dict[str, Any]) -> Any:
    new = _on_meta(target, settings)
    weights = model.state_dict()
    copies = {
        name: weight.detach().clone(memory_format=torch.contiguous_format)
        for name, weight in weights.items()
        if target is not UNet2DModel or name.partition(".")[0] not in model.training_only.values()
    }
    new.load_state_dict(copies, assign=True)
    if target is not UNet2DModel:
        new.to(memory_format=torch.channels_last)
    for name, parameter in model.named_parameters():
        if name in copies:
            new.get_parameter(name).requires_grad_(parameter.requires_grad)
    modes = {path: module.training for path, module in model.named_modules()}
    for path, module in new.named_modules():
        module.training = modes.get(path, model.training)
    return new


def _check_modules(model: nn.Module, cls: type[nn.Module]) -> None:
    """Raise ValueError, naming the module, if the model is not what its config builds: a conversion loses the rest."""
    built = _on_meta(cls, _settings(model, cls))
    if difference := _difference(model, built):
        fuse(built)  # which does not change results
        if _difference(model, built):
            raise ValueError(f"only a model that is as its config says can be converted; {difference}")


def _difference(model: nn.Module, built: nn.Module) -> str | None:
    """The first module of `model` that differs from the one in `built`, and how, as text."""
    found, expected = (dict(m.named_modules(remove_duplicate=False)) for m in (model, built))
    for path in dict.fromkeys([*expected, *found]):
        actual, wanted = (_describe(modules.get(path), is_model=not path) for modules in (found, expected))
        for key, value in wanted.items():
            if actual.get(key) != value:
                name = f"{path}.{key}".lstrip(".")
                return f"{name} is {truncate(actual.get(key))}, where the config has {truncate(value)}"
    return None


def _describe(module: nn.Module | None, *, is_model: bool) -> dict[str, Any]:
    """What a module is and computes, comparable with another's."""
    if module is None:
        return {"class": None}
    forward = vars(module).get("forward", type(module).forward)
    if is_model:  # whose class may be a subclass, and whose forward accelerate may have wrapped for mixed precision
        forward = inspect.unwrap(forward)
    settings = {key: value for key, value in vars(module).items() if key[0] != "_" and key not in _NO_EFFECT}
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {
        "class": None if is_model else type(module),
        "forward": getattr(forward, "__func__", forward),
        "hooks": has_hooks(module),
        "tensors": {name: tuple(tensor.shape) for name, tensor in tensors},
        **{key: value if isinstance(value, _PLAIN) else _kind(value) for key, value in settings.items()},
    }


def _kind(value: object) -> object:
    return "attention processor" if type(value) in _PROCESSORS else type(value)
