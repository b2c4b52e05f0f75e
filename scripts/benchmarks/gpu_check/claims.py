"""A verdict on everything that the project says of GPUs, from what the parts have written."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gnunet.checkpoint.jsonl import read_jsonl

from .parts import Part

PASSED, FAILED, NOT_REACHED = "passed", "failed", "NOT REACHED"
SEVERITY = (NOT_REACHED, "passed", "skipped", "failed")
"""Of what is reported of a test, the last counts: a test that was skipped or has failed is torn down, which passes."""


@dataclass(frozen=True)
class Claim:
    """A row of the table. Where `is_timing`, the value means nothing on a device that computes nothing."""

    part: str
    what: str
    value: str
    bar: str
    verdict: str
    is_timing: bool = False


def of_packages(lacking: Sequence[str]) -> Claim:
    """Whether the machine has what the project and the wheels require."""
    return Claim("packages", "requirements are met", "; ".join(lacking), "", FAILED if lacking else PASSED)


def claims(folder: Path, parts: Sequence[Part]) -> list[Claim]:
    """The parts' claims. What has left no results was not reached."""
    found = []
    for part in parts:
        if part.records:
            found += [claim for name in part.records for claim in of_record(part.name, name, folder)]
        else:
            found += of_tests(part.name, folder / f"{part.name}.jsonl")
    return found


def of_tests(part: str, path: Path) -> list[Claim]:
    """A claim for each test function: how many of its cases have passed."""
    outcomes: dict[str, dict[str, str]] = defaultdict(dict)  # by function, by case
    for line in read_jsonl(path):
        reported = [(test, NOT_REACHED) for test in line.get("collected", ())]
        if "test" in line:
            reported.append((line["test"], line["outcome"]))
        for test, outcome in reported:
            of_function = outcomes[function_of(test)]
            of_function[test] = max(outcome, of_function.get(test, NOT_REACHED), key=SEVERITY.index)
    found = []
    for function, cases in outcomes.items():
        passed, skipped, failed = (list(cases.values()).count(which) for which in ("passed", "skipped", "failed"))
        value = f"{passed} of {len(cases)}" + (f", {skipped} skipped" if skipped else "")
        verdict = FAILED if failed else PASSED if passed == len(cases) else NOT_REACHED
        found.append(Claim(part, function, value, "all", verdict))
    return found or [Claim(part, "", "", "", NOT_REACHED)]


def function_of(test: str) -> str:
    """tests/a/test_b.py::test_c_d[e] -> c d"""
    return test.rpartition("::test_")[2].partition("[")[0].replace("_", " ")


def of_record(part: str, name: str, folder: Path) -> list[Claim]:
    """A claim for each target of a benchmark."""
    found = []
    for path in sorted(folder.glob(f"*-{name}.json")):
        for target in json.loads(path.read_text())["targets"]:
            what, _, bar = target["target"].rpartition(", >= ")
            value = "" if target["value"] is None else f"{target['value']:g}"
            value += f" over {target['cases']} cases" if target.get("cases") else ""
            value += f", at {target['at']}" if target.get("at") else ""
            verdict = {True: PASSED, False: FAILED, None: NOT_REACHED}[target["met"]]
            found.append(Claim(part, what, value, f">= {bar}", verdict, target.get("is_timing", True)))
    return found or [Claim(part, f"record {name}", "", "", NOT_REACHED)]


def table(claims: Sequence[Claim]) -> str:
    """The claims as a table, in text."""
    rows = Table("part", "claim", "value", "bar", "verdict", box=None, pad_edge=False, header_style="none")
    for claim in claims:
        rows.add_row(claim.part, claim.what, claim.value, claim.bar, claim.verdict)
    console = Console(width=150, highlight=False, markup=False)
    with console.capture() as capture:
        console.print(rows)
    return capture.get().rstrip()
