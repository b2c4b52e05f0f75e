"""The `evaluate` section: what does not go together is refused by name."""

from typing import Any

import pytest

from gnunet.config import Config, from_yaml, load_config, to_yaml
from gnunet.config.merge import Layer
from gnunet.errors import ConfigError


def build(**evaluate: Any) -> Config:
    return load_config([Layer("test.yaml", {"evaluate": evaluate})])


def test_is_off_by_default() -> None:
    assert Config().evaluate.every is None and Config().evaluate.monitor is None


def test_is_read_back_as_written() -> None:
    config = build(
        every=1e5, num_images=500, metrics=["fid", "kid", "recall_mine"], monitor="kid",
        weights={"inception": "w.pth"}, extractors={"mine": "package.module:Class"},
    )  # fmt: skip
    assert config.evaluate.every == 100_000 and from_yaml(to_yaml(config), "x") == config


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"metrics": ["fid", "fdi"]}, ["evaluate.metrics: given fid, fdi (test.yaml)", "did you mean fid?", "valid"]),
        ({"metrics": ["fd_mine"]}, ["evaluate.metrics: given fd_mine", "no metric 'fd_mine'"]),
        ({"metrics": []}, ["evaluate.metrics: given []", "valid: a list of one or more"]),
        ({"metrics": ["fid"], "num_images": 1}, ["evaluate.num_images: given 1", "at least 2, which fid needs"]),
        ({"metrics": ["kid"], "num_images": 2}, ["evaluate.num_images: given 2", "at least 3, which kid needs"]),
        (
            {"metrics": ["recall_dinov2"], "num_images": 3},
            ["evaluate.num_images: given 3", "at least 4, which recall_dinov2 needs"],
        ),
        (
            {"monitor": "fid"},
            ["evaluate.monitor: given fid", "valid: validation_loss, or null", "where evaluate.every is a number"],
        ),
        (
            {"every": 10, "metrics": ["fid", "kid"], "monitor": "kdi"},
            ["evaluate.monitor: given kdi", "valid: validation_loss, fid or kid, or null"],
        ),
        ({"weights": {"incepton": "x"}}, ["evaluate.weights: given incepton", "inception, dinov2 or efficientnet"]),
        ({"extractors": {"inception": "x.pt"}}, ["evaluate.extractors: given inception", "other than inception"]),
        ({"extractors": {"a-b": "x.pt"}}, ["evaluate.extractors: given a-b", "letters, digits and _"]),
        ({"extractors": ["x.pt"]}, ["evaluate.extractors: given [x.pt]", "{inception: FILE}"]),
        ({"evry": 1}, ["evaluate.evry: unknown key", "did you mean evaluate.every?"]),
    ],
)
def test_what_is_refused(given: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build(**given)
    assert all(part in str(caught.value) for part in parts), caught.value
