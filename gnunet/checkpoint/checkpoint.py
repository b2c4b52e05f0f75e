"""Checkpoints: a folder of safetensors and JSON that is whole or absent.

    checkpoints/IMAGES/model.safetensors      the weights as they train
                       ema.safetensors        their moving average
                       optimizer.safetensors  AdamW's state, by parameter name
                       state.json             everything else a resumed run needs
                       config.yaml            the run's configuration
                       manifest.json          size and SHA-256 of each of these, written last
    checkpoints/best          names the best of them, by evaluate.monitor; absent where there is none

A split run has a file of each process in the place of each of the first three (see gnunet.checkpoint.sharded_tensors).
Nothing here reads a pickle. A checkpoint whose manifest does not hold is named and passed over. What is read may come
from a stranger: no tensor is read before the header of its file fits the model (see gnunet.safe_io).
"""

import hashlib
import json
import logging
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from gnunet.checkpoint.sharded_tensors import (
    TENSOR_FILES,
    UNSHARDED,
    ShardedTensorReader,
    ShardId,
    file_name,
    file_names,
    write_tensors,
)
from gnunet.distributed.collectives import run_on_all_ranks, run_on_main_rank
from gnunet.errors import CheckpointError
from gnunet.files import atomic_directory, atomic_rmtree, atomic_write, fsync_path
from gnunet.safe_io import read_json

logger = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of AdamW's state, what has a parameter's shape."""
FORMAT = 1
BEST = "best"
MAX_SHARDS = 4096
"""Processes that may have written a checkpoint together; a stranger's cannot name more files to be read."""


def checkpoint_files(parts: int) -> list[str]:
    """The files of a checkpoint, besides the manifest, that so many processes wrote the tensors of."""
    return [*(name for kind in TENSOR_FILES for name in file_names(kind, parts)), "state.json", "config.yaml"]


FILES = checkpoint_files(1)


@dataclass
class TrainState:
    """What a run knows besides weights and optimizer; all of it goes into state.json."""

    images: int = 0
    """Images seen."""
    reported: int = 0
    """Images up to which logs, validation and samples are written; a stopped run may have some to do."""
    loss_sum: float = 0.0
    """Sum of the step losses since the last line in metrics.jsonl."""
    grad_norm_sum: float = 0.0
    """Sum of the gradient norms since then."""
    steps: int = 0
    """Finite steps since then."""
    nonfinite: int = 0
    """Steps skipped so far for a non-finite loss or gradient."""
    nonfinite_in_a_row: int = 0
    """Of these, those since the last finite step."""
    nonfinite_examples: list[int] = field(default_factory=list)
    """The first examples since the last line in metrics.jsonl whose loss was not finite."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """GradScaler's state (fp16 only)."""
    data: dict[str, Any] = field(default_factory=dict)
    """The data set: its fingerprint, class names and how many training images each class has."""
    normalized_by: dict[str, int] = field(default_factory=dict)
    """See Session.batch_norm_scope; empty where no norm depends on the batch."""
    best: dict[str, Any] = field(default_factory=dict)
    """`images`, `metric` and `value` where evaluate.monitor was best so far; empty before it was measured."""


def checkpoint_name(images: int) -> str:
    """Folder name of the checkpoint at `images` images seen."""
    return f"{images:09d}"


def _digest(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def save_checkpoint(
    folder: Path, *, model: nn.Module, ema: nn.Module, optimizer: torch.optim.AdamW, state: TrainState,
    config_text: str, accelerator: Accelerator | None = None,
) -> Path:  # fmt: skip
    """Write the checkpoint of `state.images` under `folder` (checkpoints/) and return its path.

    Args:
        accelerator: of the processes that write together, since some of it is split over them, and all call this; None
            where this process has all of it.

    Raises:
        OSError, SafetensorError: the disk refuses, on every process; earlier checkpoints are as they were.
    """
    path = folder / checkpoint_name(state.images)
    tensors = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": _moments(optimizer, model)}

    def write_part(temporary: Path, part: ShardId) -> dict[str, dict[str, Any]]:
        written = {}
        for kind in TENSOR_FILES:
            file = temporary / file_name(kind, part)
            write_tensors(file, tensors[kind], part)
            fsync_path(file)
            written[file.name] = _digest(file)
        return written

    def complete(temporary: Path, manifest: dict[str, dict[str, Any]]) -> None:
        (temporary / "state.json").write_text(json.dumps({"format": FORMAT, **asdict(state)}, indent=1) + "\n")
        (temporary / "config.yaml").write_text(config_text)
        manifest |= {name: _digest(temporary / name) for name in ("state.json", "config.yaml")}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")

    if accelerator is None:
        with atomic_directory(path) as temporary:
            complete(temporary, write_part(temporary, UNSHARDED))
        return path
    with ExitStack() as stack:
        part = ShardId(accelerator.process_index, accelerator.num_processes)
        temporary = run_on_main_rank(accelerator, lambda: stack.enter_context(atomic_directory(path)))
        written = run_on_all_ranks(accelerator, lambda: write_part(temporary, part))

        def finish() -> None:
            complete(temporary, {name: digest for each in written for name, digest in each.items()})
            stack.close()

        run_on_main_rank(accelerator, finish)
    return path


def _moments(optimizer: torch.optim.AdamW, model: nn.Module) -> dict[str, torch.Tensor]:
    names = [name for name, _ in model.named_parameters()]
    state = optimizer.state_dict()["state"]
    return {f"{names[index]}/{key}": value for index, entries in state.items() for key, value in entries.items()}


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders under `folder`, oldest first, whole or not."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.is_dir() and _is_number(p.name)), key=lambda p: int(p.name))


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def rotate_checkpoints(folder: Path, keep: int, newest: int, best: int | None = None) -> None:
    """Remove all but the `keep` newest checkpoints up to `newest` images, and the one at `best` images.

    Later ones are damaged, or the run would have gone on from them; they must not count among those kept.
    """
    paths = list_checkpoints(folder)
    whole = [path for path in paths if int(path.name) <= newest]
    for path in set(paths) - set(whole[-keep:]):
        if int(path.name) != best:
            atomic_rmtree(path)


def write_best_pointer(folder: Path, best: dict[str, Any]) -> None:
    """Let `folder`/best name the checkpoint of `TrainState.best`; without such a checkpoint it is removed.

    Called after that checkpoint is written and before its predecessor is removed, so that what is named exists.
    """
    pointer = folder / BEST
    if best and (folder / (name := checkpoint_name(best["images"]))).is_dir():
        atomic_write(pointer, json.dumps({"checkpoint": name, **best}) + "\n")
    else:
        pointer.unlink(missing_ok=True)


def best_checkpoint(pointer: Path) -> Path:
    """The checkpoint beside it that checkpoints/best names; CheckpointError where it cannot be read."""
    try:
        name = read_json(pointer).get("checkpoint")
    except CheckpointError as error:
        raise CheckpointError(f"{pointer}: names no checkpoint ({error})") from None
    if not isinstance(name, str) or not _is_number(name):
        raise CheckpointError(f"{pointer}: names {name!r}; valid: a checkpoint beside it, such as {checkpoint_name(0)}")
    return pointer.parent / name


def verify_checkpoint(path: Path) -> None:
    """Raise CheckpointError, naming the file, unless the checkpoint at `path` is whole and of our format.

    A file may be a link, as in a download's cache: what counts is that its content is the manifest's.
    """
    try:
        manifest = read_json(path / "manifest.json")
        expected = {name: manifest[name] for name in checkpoint_files(_parts(manifest))}
    except (CheckpointError, KeyError):
        raise CheckpointError(f"{path}: manifest.json is missing or damaged") from None
    for name, digest in expected.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        size = digest.get("bytes") if isinstance(digest, dict) else None
        # A file of another size is not even read.
        if (path / name).stat().st_size != size or _digest(path / name) != digest:
            raise CheckpointError(f"{path}: {name} does not match manifest.json (torn or altered)")
    found = read_json(path / "state.json").get("format")
    if found != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {found}; this version reads format {FORMAT}")


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint under `folder`; None where there is no checkpoint at all.

    Damaged ones are named in the log and passed over. Raises CheckpointError where all are damaged: a run is
    never silently started afresh.
    """
    problems = []
    for path in reversed(list_checkpoints(folder)):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            logger.warning("%s: using the one before", error)
            problems.append(str(error))
        else:
            return path
    if problems:
        raise CheckpointError(
            "no whole checkpoint is left:\n  " + "\n  ".join(problems) + f"\nRemove {folder} to start again."
        )
    return None


def read_state(path: Path) -> TrainState:
    """The TrainState of the checkpoint at `path`; CheckpointError where state.json holds another."""
    file = path / "state.json"
    # The first checkpoints lack these three.
    stored = {"best": {}, "normalized_by": {}, "nonfinite_examples": [], **read_json(file)}
    for entry in fields(TrainState):
        if entry.name not in stored:
            raise CheckpointError(f"{file}: lacks {entry.name}")
        if valid := _invalid(stored[entry.name], entry):
            raise CheckpointError(f"{file}: {entry.name} is {repr(stored[entry.name])[:100]}; valid: {valid}")
    return TrainState(**{entry.name: stored[entry.name] for entry in fields(TrainState)})


def _invalid(value: Any, entry: Field[Any]) -> str | None:
    """What would be valid in the place of a value, in words; None where it is."""
    if entry.default is MISSING:
        if entry.default_factory is dict:
            return None if isinstance(value, dict) else "an object"
        numbers = isinstance(value, list) and all(type(item) is int for item in value)
        return None if numbers else "a list of whole numbers"
    if isinstance(entry.default, float):
        return None if type(value) in (int, float) else "a number"
    return None if type(value) is int and value >= 0 else "a whole number, at least 0"


def _parts(manifest: Collection[str]) -> int:
    """How many processes wrote the tensors of the checkpoint with these files, if it is whole.

    Raises:
        CheckpointError: more than MAX_SHARDS.
    """
    parts = sum(name.startswith("model-") for name in manifest)
    if parts > MAX_SHARDS:
        raise CheckpointError(f"manifest.json names {parts} parts; valid: at most {MAX_SHARDS}")
    return max(1, parts)


def stored(path: Path, kind: str) -> ShardedTensorReader:
    """What the checkpoint at `path` holds of a kind of tensors, one of TENSOR_FILES.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    return ShardedTensorReader([path / name for name in file_names(kind, _parts(read_json(path / "manifest.json")))])


def load_weights(path: Path, kind: str, module: nn.Module) -> None:
    """Load a checkpoint's weights, model or ema, into `module`, in place; names and shapes must match exactly.

    Raises:
        CheckpointError: a file is missing or damaged, or belongs to another model; nothing has been changed.
    """
    weights, wanted = stored(path, kind), module.state_dict()
    weights.check(wanted)
    weights.read(wanted)


def load_checkpoint(path: Path, *, model: nn.Module, ema: nn.Module, optimizer: torch.optim.AdamW) -> TrainState:
    """Load the checkpoint at `path` into the three, in place, and return its TrainState.

    Where they are split over processes, each process reads its rows, whatever launch has written them.

    Raises:
        CheckpointError: a file is missing or damaged, or belongs to another model; all are as they were.
    """
    state = read_state(path)
    parameters = dict(model.named_parameters())
    moments, wanted = stored(path, "optimizer"), _empty_moments(parameters)
    # Steps that have all been skipped have left moments of no parameter.
    kept = {name.rpartition("/")[0] for name in moments.found}
    wanted = {name: tensor for name, tensor in wanted.items() if name.rpartition("/")[0] in kept}
    stored(path, "model").check(model.state_dict())
    stored(path, "ema").check(ema.state_dict())
    moments.check(wanted)
    load_weights(path, "model", model)
    load_weights(path, "ema", ema)
    moments.read(wanted)
    numbers = {name: number for number, name in enumerate(parameters)}
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in wanted.items():
        name, _, entry = key.rpartition("/")
        entries.setdefault(numbers[name], {})[entry] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": entries, "param_groups": groups})
    return state


def _empty_moments(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Room for AdamW's state, in the parameters' memory formats: fused AdamW walks through both in memory's order."""
    moments = {f"{name}/step": torch.zeros(()) for name in parameters}
    for name, parameter in parameters.items():
        moments |= {f"{name}/{moment}": torch.empty_like(parameter) for moment in MOMENTS}
    return moments
