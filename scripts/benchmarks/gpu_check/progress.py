"""A pytest plugin that writes collected tests and their outcomes line by line, so that a killed run loses nothing.

python -m pytest -p gpu_check.progress --progress FILE
"""

import json
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--progress", type=Path, metavar="FILE", help="JSON lines to write")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--progress")
    if path and not hasattr(config, "workerinput"):  # pytest-xdist's workers report to the process that starts them
        config.pluginmanager.register(Progress(path))


class Progress:
    def __init__(self, path: Path) -> None:
        self.file = path.open("w", buffering=1)

    def write(self, **line: object) -> None:
        self.file.write(json.dumps(line) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.write(collected=[item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.write(collected=ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown" or report.outcome != "passed":
            self.write(test=report.nodeid, outcome=report.outcome)
