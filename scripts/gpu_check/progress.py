"""A pytest plugin that writes what is collected and how each test ends, line by line, so that a kill loses nothing.

python -m pytest -p gpu_check.progress --progress FILE
"""

import json
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--progress", type=Path, metavar="FILE", help="JSON lines to write")


def pytest_configure(config: pytest.Config) -> None:
    is_worker = hasattr(config, "workerinput")  # of pytest-xdist; its controller hears of everything
    if config.getoption("--progress") and not is_worker:
        config.pluginmanager.register(Progress(config.getoption("--progress")))


class Progress:
    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w", buffering=1)
        self.has_collected = False

    def write(self, **line: object) -> None:
        self.file.write(json.dumps(line) + "\n")

    def collected(self, tests: list[str]) -> None:
        if tests and not self.has_collected:
            self.write(collected=tests)
            self.has_collected = True

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.collected([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.collected(ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test has passed when it is torn down; a setup or teardown that fails counts, too.
        if report.when == "teardown" or report.outcome != "passed":
            self.write(test=report.nodeid, outcome=report.outcome)
