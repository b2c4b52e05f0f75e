"""The sections of `model.norm` and `diffusion`: one for each kind, made from the signature of its constructor."""

import inspect
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union

from pydantic import BeforeValidator, ConfigDict, Field, create_model, model_validator
from typing_extensions import Doc

from gnunet.config.schema import Section, ValidValues, join_or
from gnunet.diffusion import PROCESSES
from gnunet.norms import NORMS
from gnunet.norms.signature import options_of


class KindConfig(Section):
    """A section to which `_section` adds the keys of a kind."""

    # Generated classes have no source; pydantic would spend seconds looking for attribute docstrings.
    model_config = ConfigDict(use_attribute_docstrings=False)


class NormConfig(KindConfig):
    """A kind of normalization."""

    @classmethod
    def drop_overridden(cls, earlier: dict[str, Any], later: Mapping[str, Any]) -> None:
        # groups and channels_per_group replace one another
        for given, dropped in (("groups", "channels_per_group"), ("channels_per_group", "groups")):
            if later.get(given) is not None:
                earlier.pop(dropped, None)

    @model_validator(mode="before")
    @classmethod
    def _groups_xor_channels_per_group(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("channels_per_group") is not None:
            return {"groups": None, **data}
        return data


COMMON_FIELDS: dict[str, Any] = {
    "overrides": (
        Annotated[
            dict[Annotated[str, BeforeValidator(str)], dict[str, Any]],  # YAML reads heights as numbers
            ValidValues("a mapping from regions to keys of model.norm, such as {decoder: {kind: none}}"),
        ],
        Field(
            {},
            description="Other norms in parts of the network, {REGION: {kind: KIND, ...}}. Regions are encoder, "
            "middle, decoder, attention, out, and the heights of feature maps; attention takes precedence over the "
            "other names, and a name over a height.",
        ),
    ),
    "separate_skip_norm": (
        bool,
        Field(False, description="Normalize a skip connection separately from what it is concatenated with."),
    ),
}
RENORM_WARMUP = (
    Annotated[int, Field(ge=0)] | None,
    Field(
        None,
        description="Batches over which the bounds grow from those of batch normalization; null is a tenth of the "
        "run's optimizer steps.",
    ),
)
DATA_STD = (
    Annotated[float, Field(gt=0)] | None,
    Field(
        None,
        description="Root mean square of images or latents, by which the network's input is scaled to unit variance; "
        "null is diffusion.sigma_data, 1 for latents, or else 0.5.",
    ),
)
DERIVED = {
    "renorm_warmup": {"renorm_warmup": RENORM_WARMUP},
    "data_std": {"data_std": DATA_STD},
    "input_std": {},
    "sample_levels": {},
}
"""Options that are derived, with their keys; the network's structure gives input_std, the process sample_levels."""


def _section(
    kind: str, what: str, cls: type, options: Mapping[str, inspect.Parameter], base: type[KindConfig], **more: Any
) -> type[Any]:
    """The section of a class: its documented options are keys."""
    keys: dict[str, Any] = {"kind": (Literal[kind], Field(kind, description=what))}
    for name, option in options.items():
        for item in getattr(option.annotation, "__metadata__", ()):
            if isinstance(item, Doc):
                key = (option.annotation, Field(option.default, description=item.documentation))
                keys |= DERIVED.get(name, {name: key})
    summary = " ".join((inspect.getdoc(cls) or kind).split("\n\n")[0].split())
    section = create_model(f"{cls.__name__}Config", __base__=base, __doc__=summary, __module__=__name__, **keys, **more)
    globals()[section.__name__] = section  # where pickle looks for it
    return section


NORM_SECTIONS = {
    kind: _section(kind, "Which normalization the layers compute.", cls, cls.options(), NormConfig, **COMMON_FIELDS)
    for kind, cls in NORMS.items()
}
DIFFUSION_SECTIONS = {
    kind: _section(kind, f"The process: {join_or(PROCESSES)}.", cls, options_of(cls), KindConfig)
    for kind, cls in PROCESSES.items()
}
AnyNormConfig = Annotated[Union[tuple(NORM_SECTIONS.values())], Field(discriminator="kind")]  # noqa: UP007
"""The type of `model.norm`."""
AnyDiffusionConfig = Annotated[Union[tuple(DIFFUSION_SECTIONS.values())], Field(discriminator="kind")]  # noqa: UP007
"""The type of `diffusion`."""
