"""Append-only logs of JSON objects, one per line, keyed by images seen."""

import json
from pathlib import Path
from typing import Any

from gnunet.errors import CheckpointError
from gnunet.files import atomic_write, fsync_path


class JsonlLogger:
    """An append-only file of JSON objects that each have an `images` key."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def truncate_after(self, images: int) -> None:
        """Drop a partially written last line and all lines after `images`, which a resumed run writes again."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        kept = []
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            if not line.endswith(b"\n") and line.strip(b"\0")[:1] in (b"", b"{"):
                break
            try:
                if json.loads(line)["images"] > images:
                    break
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise CheckpointError(f"{self.path}, line {number}: not a log line ({error})") from None
            kept.append(line)
        if (remaining := b"".join(kept)) != content:
            atomic_write(self.path, remaining)

    def write(self, values: dict[str, Any]) -> None:
        """Append one line, which a crash of this process cannot lose."""
        with self.path.open("a") as file:
            file.write(json.dumps(nan_to_null(values), allow_nan=False) + "\n")

    def sync(self) -> None:
        """Flush the lines to disk, so that a crash of the machine cannot lose them."""
        if self.path.exists():
            fsync_path(self.path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, without a line that is still being written; none if there is no file."""
    content = path.read_bytes() if path.is_file() else b""
    return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith(b"\n")]


def nan_to_null(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by None in nested dicts and lists."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)
