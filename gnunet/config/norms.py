"""The sections of `model.norm`: one for each kind in gnunet.norms.NORMS, made from its constructor's signature."""

import inspect
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union

from pydantic import BeforeValidator, ConfigDict, Field, create_model, model_validator
from typing_extensions import Doc

from gnunet.config.schema import Section, ValidValues
from gnunet.norms import NORMS, NormLayer

MAX_NOISE_BINS = 1000


class NormConfig(Section):
    """A kind of normalization; `_section` adds its keys."""

    # Generated classes have no source; pydantic would spend seconds looking for attribute docstrings.
    model_config = ConfigDict(use_attribute_docstrings=False)

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


def _heights_as_text(value: Any) -> Any:
    """YAML reads the heights among the regions as numbers."""
    if not isinstance(value, Mapping):
        return value
    return {str(key) if isinstance(key, int) else key: keys for key, keys in value.items()}


COMMON_FIELDS: dict[str, Any] = {
    "overrides": (
        Annotated[
            dict[str, dict[str, Any]],
            BeforeValidator(_heights_as_text),
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
NOISE_BINS = (
    Annotated[int, Field(ge=1, le=MAX_NOISE_BINS)],
    Field(
        1,
        description="Sets of running statistics, one for each of as many ranges of the noise level, equally frequent "
        "in training; training itself does not change.",
    ),
)
DERIVED = {"noise_edges": {"noise_bins": NOISE_BINS}, "input_std": {}}
"""Options that are not keys, with the keys that they are derived from; the network's structure gives input_std."""


def _section(kind: str, norm: type[NormLayer]) -> type[NormConfig]:
    keys: dict[str, Any] = {"kind": (Literal[kind], Field(kind, description="Which normalization the layers compute."))}
    for name, option in norm.options().items():
        metadata = getattr(option.annotation, "__metadata__", ())
        description = next((item.documentation for item in metadata if isinstance(item, Doc)), None)
        key = (option.annotation, Field(option.default, description=description))
        keys |= DERIVED.get(name, {name: key})
    summary = " ".join((inspect.getdoc(norm) or kind).split("\n\n")[0].split())
    name = f"{norm.__name__}Config"
    return create_model(name, __base__=NormConfig, __doc__=summary, __module__=__name__, **keys, **COMMON_FIELDS)


SECTIONS = {kind: _section(kind, norm) for kind, norm in NORMS.items()}
globals().update({section.__name__: section for section in SECTIONS.values()})  # where pickle looks for them
AnyNormConfig = Annotated[Union[tuple(SECTIONS.values())], Field(discriminator="kind")]  # noqa: UP007
"""The type of `model.norm`."""
