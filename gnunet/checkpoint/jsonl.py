"""Append-only logs of JSON objects, one a line, keyed by images seen."""

import json
import math
import os
from pathlib import Path
from typing import Any

from gnunet.errors import CheckpointError
from gnunet.files import atomic_write


class JsonlLogger:
    """An append-only file of JSON objects that each have an `images` key."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def truncate_after(self, images: int) -> None:
        """Drop a torn last line and every line after `images`: a resumed run writes those again."""
        if not self.path.exists():
            return
        text = self.path.read_text()
        kept = []
        for number, line in enumerate(text.splitlines(keepends=True), start=1):
            if not line.endswith("\n"):
                break
            try:
                if json.loads(line)["images"] > images:
                    break
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise CheckpointError(f"{self.path}, line {number}: is no line of a log ({error})") from None
            kept.append(line)
        if (rewound := "".join(kept)) != text:
            atomic_write(self.path, rewound)

    def write(self, values: dict[str, Any]) -> None:
        """Append one line; a crash of this process cannot lose it."""
        with self.path.open("a") as file:
            file.write(json.dumps(nan_to_null(values), allow_nan=False) + "\n")

    def sync(self) -> None:
        """Flush the lines to disk, so that a crash of the machine cannot lose them."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())


def nan_to_null(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: nan_to_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [nan_to_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
