"""The network and the process of the model that a run starts from (train.init_from), as keys of the configuration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gnunet.config.merge import ABSENT, ConfigSource, lookup
from gnunet.config.renamed_keys import with_new_names
from gnunet.config.sections import Config, ModelConfig
from gnunet.config.yaml_io import load_yaml
from gnunet.errors import ConfigError, GnunetError, expand
from gnunet.safe_io import MAX_YAML_BYTES, check_yaml, read_json, read_text

VALID = "a run, a checkpoint, a diffusers folder, or OWNER/NAME of a model on the Hugging Face hub"
KEY = ("train", "init_from")


def with_initial_model(sources: list[ConfigSource]) -> list[ConfigSource]:
    """The sources and, before the one that gives train.init_from, the keys of that model in place of earlier ones.

    ConfigError if there is no such model, or no keys for it. A run that has begun has them in its config.yaml.
    """
    position = max((i for i, source in enumerate(sources) if lookup(source.values, KEY) is not ABSENT), default=0)
    name = lookup(sources[position].values, KEY) if sources else None
    if not isinstance(name, str):
        return sources
    own = lookup(sources[position].values, ["model"])
    if isinstance(own, Mapping) and own.keys() >= ModelConfig.model_fields.keys():  # resolved before
        return sources
    from gnunet.models.pretrained import find_model  # imports diffusers, which takes seconds

    run_dirs = [lookup(source.values, ["run_dir"]) for source in sources]
    run_dir = next((each for each in reversed(run_dirs) if each is not ABSENT), Config().run_dir)
    try:
        begun = expand(str(run_dir)) / "config.yaml"
        values = _read_yaml(begun) if begun.is_file() else {}
        if lookup(values, KEY) != name:
            values = read_model_keys(find_model(name))
    except GnunetError as error:
        raise ConfigError(f"train.init_from: given {name}: {error}") from None
    keys = {key: values[key] for key in ("model", "diffusion") if key in values}
    if (resolution := lookup(values, ["data", "resolution"])) is not ABSENT:
        keys["data"] = {"resolution": resolution}
    earlier = [ConfigSource(each.name, {**each.values, "model": {}, "diffusion": {}}) for each in sources[:position]]
    return [*earlier, ConfigSource(name, keys), *sources[position:]]


def read_model_keys(path: Path) -> dict[str, Any]:
    """The configuration of a run or a checkpoint, or that of a diffusers folder's network and scheduler."""
    run = path.parent.parent if path.name == "best" and path.is_file() else path
    if (run / "config.yaml").is_file():
        return _read_yaml(run / "config.yaml")
    from gnunet.diffusion.factory import load_process, process_settings  # these take seconds
    from gnunet.models import UNet2D
    from gnunet.norms.signature import options_of

    file = path / ("unet/config.json" if (path / "unet").is_dir() else "config.json")
    if not file.is_file():
        raise ConfigError(f"{path}: holds no model; valid: {VALID}")
    config = {**{key: option.default for key, option in options_of(UNet2D).items()}, **read_json(file)}
    if config["center_input_sample"]:
        raise ConfigError(f"{file}: center_input_sample true given; valid: false")
    norm = {"kind": "group", **(config["norm"] if isinstance(config["norm"], Mapping) else {})}
    norm.pop("sample_levels", None)  # derived from the process
    if norm["kind"] == "group":
        norm = {"groups": config["norm_num_groups"], "eps": config["norm_eps"], **norm}
    model = {key: config[key] for key in ModelConfig.model_fields if key in config}
    model |= {"in_channels": config["out_channels"], "norm": norm}
    of_latents = (path / "vae").is_dir()
    data = {} if of_latents or config["sample_size"] is None else {"resolution": config["sample_size"]}
    return {"model": model, "diffusion": process_settings(load_process(path)), "data": data}


def _read_yaml(file: Path) -> dict[str, Any]:
    check_yaml(text := read_text(file, MAX_YAML_BYTES), str(file))
    return with_new_names(load_yaml(text, str(file)))
