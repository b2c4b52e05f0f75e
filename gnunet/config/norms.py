"""The sections of `model.norm`: one for each kind in gnunet.norms.NORMS, whose keys are the options that it reads.

A new kind needs nothing here.
"""

import inspect
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, create_model, model_validator

from gnunet.config.schema import Section, ValidValues
from gnunet.norms import NORMS, NormLayer, Option

DERIVED = ("noise_edges", "input_std")
"""Options that are no keys: the first comes from noise_bins, the second from the plan of the network."""


class NormConfig(Section):
    """A kind of normalization; its keys are made by `_section`."""

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
    return {str(key) if isinstance(key, int) else key: partial for key, partial in value.items()}


Overrides = Annotated[
    dict[str, dict[str, Any]],
    BeforeValidator(_heights_as_text),
    ValidValues("a mapping from regions to keys of model.norm, such as {decoder: {kind: none}}"),
]
MAX_NOISE_BINS = 1000
NOISE_BINS = (
    Annotated[int, Field(ge=1, le=MAX_NOISE_BINS)],
    Field(
        1,
        description="Sets of running statistics, for as many ranges of the noise level, equally frequent in "
        "training; training itself does not change.",
    ),
)
COMMON_FIELDS: dict[str, Any] = {
    "overrides": (
        Overrides,
        Field(
            {},
            description="Other norms in parts of the network, {REGION: {kind: KIND, ...}}. Regions are encoder, "
            "middle, decoder, attention, out, and the heights of feature maps; attention wins over the other words, "
            "a word over a height.",
        ),
    ),
    "separate_skip_norm": (
        bool,
        Field(False, description="Normalize a skip connection apart from what it is concatenated with."),
    ),
}


def _section(kind: str, norm: type[NormLayer]) -> type[NormConfig]:
    options = {**norm.options, **norm.block_options}
    keys: dict[str, Any] = {"kind": (Literal[kind], Field(kind, description="Which normalization the layers compute."))}
    keys |= {name: _key(option) for name, option in options.items() if name not in DERIVED}
    if "noise_edges" in options:
        keys["noise_bins"] = NOISE_BINS
    summary = (inspect.getdoc(norm) or kind).split("\n\n")[0]
    name, summary = f"{norm.__name__}Config", " ".join(summary.split())
    return create_model(name, __base__=NormConfig, __doc__=summary, __module__=__name__, **keys, **COMMON_FIELDS)


def _key(option: Option) -> tuple[Any, Any]:
    """The annotation and the default of an option's key."""

    def check(value: Any) -> Any:
        if not option.is_valid(value):
            raise ValueError(option.words)
        return value

    annotation = Annotated[option.type, AfterValidator(check), ValidValues(option.words)]
    return annotation, Field(option.default, description=option.help)


SECTIONS = {kind: _section(kind, norm) for kind, norm in NORMS.items()}
globals().update({section.__name__: section for section in SECTIONS.values()})  # where pickle looks for them
AnyNormConfig = Annotated[Union[tuple(SECTIONS.values())], Field(discriminator="kind")]  # noqa: UP007
"""The type of `model.norm`."""
KEYS = tuple(dict.fromkeys(key for section in SECTIONS.values() for key in section.model_fields))
"""The keys of all kinds."""
