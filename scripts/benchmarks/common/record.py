"""What all benchmark records share: their origin, the form of their numbers, and the file they are written to."""

import datetime
import json
import platform
from pathlib import Path
from typing import Any

import torch

from gnunet import environment

ROOT = Path(__file__).parents[3]
FAKE = "fake"
"""What the name of a device begins with that computes nothing."""


def device_name(device: torch.device) -> str:
    """The device as a person names it, of a CPU with the threads that are used."""
    name = environment.device_name(device)
    if device.type == "cpu":
        return f"{name}, {torch.get_num_threads()} threads"
    # gpu_check/fake_cuda.c has an identifier of zeros, and no GPU has.
    identifier = str(torch.cuda.get_device_properties(device).uuid)
    return name if identifier.strip("0-") else f"{FAKE} {name}"


def origin(device: torch.device, *packages: str) -> dict[str, Any]:
    """Date, device, commit and the versions of Python, torch, CUDA and `packages`."""
    return {
        "date": datetime.date.today().isoformat(), "device": device_name(device), "commit": environment.commit(),
        "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
        **{package: environment.version(package) for package in packages},
    }  # fmt: skip


def rounded(value: float) -> float:
    """Four significant digits, more than any time here is good for."""
    return float(f"{value:.4g}")


def failure(error: Exception) -> str:
    """An error in one line."""
    return f"failed: {type(error).__name__}: {error}".partition("\n")[0][:200]


def target(what: str, value: float | None, least: float) -> dict[str, Any]:
    """Something aimed at, the value that decides, and whether it is met; None where that is not yet known."""
    return {"target": f"{what}, >= {least:g}", "value": value, "met": None if value is None else value >= least}


def verdict(target: dict[str, Any]) -> str:
    """A target as one line of text."""
    word = {True: "met", False: "MISSED", None: "not measured"}[target["met"]]
    return f"{word}: {target['target']}" + ("" if target["value"] is None else f": {target['value']:g}")


def record_path(folder: Path, device: torch.device, what: str) -> Path:
    """FOLDER/DATE-DEVICE-WHAT.json."""
    name = device.type if device.type == "cpu" else device_name(device).lower().replace(" ", "-")
    return folder / f"{datetime.date.today().isoformat()}-{name}-{what}.json"


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record atomically: a line for each key, and one for each item of a list of objects."""

    def text(value: Any) -> str:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        return json.dumps(value)

    lines = [f" {json.dumps(key)}: {text(value)}" for key, value in record.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    part.replace(path)
