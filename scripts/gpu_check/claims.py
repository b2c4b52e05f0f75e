"""A table of what the project says of GPUs, from what the parts have written: passed, failed or not reached."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

PASSED, FAILED, NOT_REACHED = "passed", "failed", "NOT REACHED"
RECORDS = {"operator": ["operator"], "training": ["overhead", "training"]}
"""What the records of a part are called."""


@dataclass(frozen=True)
class Claim:
    part: str
    what: str
    value: str
    bar: str
    verdict: str
    is_number: bool = False
    """A speed or the like, which means nothing where the device computes nothing."""

    @classmethod
    def of_packages(cls, lacking: Sequence[str]) -> "Claim":
        """That the machine has what the project and the wheels require, but for these."""
        return cls("packages", "what is required is there", "; ".join(lacking), "", FAILED if lacking else PASSED)


def claims(folder: Path, parts: Sequence[str]) -> list[Claim]:
    """What the parts have found; a part that has written nothing is one that was not reached."""
    found = []
    for part in parts:
        own = [*of_tests(part, folder / f"{part}.jsonl"), *of_records(part, folder)]
        found += own or [Claim(part, "", "", "", NOT_REACHED)]
    return found


def of_tests(part: str, path: Path) -> Iterator[Claim]:
    """One for each test function: how many of its cases have passed."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    outcomes: dict[str, dict[str, str]] = defaultdict(dict)  # of each function, of each case
    for line in lines:
        for test in line.get("collected", ()):
            outcomes[function_of(test)][test] = NOT_REACHED
    for line in lines:
        if "test" in line and outcomes[function_of(line["test"])].get(line["test"]) != "failed":
            outcomes[function_of(line["test"])][line["test"]] = line["outcome"]
    for function, cases in outcomes.items():
        passed, failed = (sum(outcome == wanted for outcome in cases.values()) for wanted in ("passed", "failed"))
        verdict = FAILED if failed else PASSED if passed == len(cases) else NOT_REACHED
        yield Claim(part, function, f"{passed} of {len(cases)}", "all", verdict)


def function_of(test: str) -> str:
    """tests/a/test_b.py::test_c_d[e] -> c d"""
    return test.rpartition("::test_")[2].partition("[")[0].replace("_", " ")


def of_records(part: str, folder: Path) -> Iterator[Claim]:
    """One for each target of the benchmarks."""
    for name in RECORDS.get(part, ()):
        for path in sorted(folder.glob(f"*-{name}.json")):
            for target in json.loads(path.read_text())["targets"]:
                what, _, bar = target["target"].rpartition(", >= ")
                value = "" if target["value"] is None else f"{target['value']:g}"
                value += f" over {target['cases']} cases" if target.get("cases") else ""
                value += f", at {target['at']}" if target.get("at") else ""
                verdict = {True: PASSED, False: FAILED, None: NOT_REACHED}[target["met"]]
                yield Claim(part, what, value, f">= {bar}", verdict, is_number=not re.search("that are right", what))


def table(claims: Sequence[Claim]) -> str:
    """The table as text."""
    rows = Table("part", "claim", "value", "bar", "verdict", box=None, pad_edge=False, header_style="none")
    for claim in claims:
        rows.add_row(claim.part, claim.what, claim.value, claim.bar, claim.verdict)
    console = Console(width=150, highlight=False, markup=False)
    with console.capture() as capture:
        console.print(rows)
    return capture.get().rstrip()
