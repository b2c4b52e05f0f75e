"""Keys with former names: an error for users, read where gnunet wrote them."""

import pytest

from gnunet.config import Config, from_yaml, load_config, to_yaml
from gnunet.config.renamed_keys import RENAMED_KEYS, with_former_names, with_new_names
from gnunet.config.schema import find
from gnunet.config.yaml_io import dump_yaml
from gnunet.errors import ConfigError


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_former_key_is_an_error_that_names_the_new_one(old: str, new: str) -> None:
    assert find(Config, new) and not find(Config, old)
    with pytest.raises(ConfigError, match=f"^{old}: unknown key .* renamed to {new}$"):
        load_config(overrides={old: 1})


def test_stored_configuration_of_the_first_version_is_read() -> None:
    config = Config().model_dump()
    config["train"]["total_images"], config["model"]["norm"]["separate_skip_norm"] = 3, True
    config["sampling"]["num_inference_steps"], config["data"]["label_dropout"] = 7, 0.25
    config["model"]["norm"]["overrides"] = {"decoder": {"kind": "group", "separate_skip_norm": True}}
    config["evaluate"]["extractors"] = {"my.net": "package.module:Class"}
    former = with_former_names(config)
    assert former["model"]["norm"]["overrides"]["decoder"]["split_skip"]
    assert former["train"]["images"] == 3 and former["data"]["on_error"] == "stop" and former["sampling"]["steps"] == 7
    assert with_new_names(former) == config == with_new_names(config)
    config["evaluate"]["extractors"] = former["evaluate"]["extractors"] = {}  # a name with a dot is not valid
    assert from_yaml(dump_yaml(former), "x") == from_yaml(to_yaml(Config.model_validate(config)), "x")
