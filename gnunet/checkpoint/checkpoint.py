"""Checkpoints: directories of safetensors, JSON and YAML, written atomically.

    checkpoints/IMAGES/model.safetensors      the weights being trained
                       ema.safetensors        their exponential moving average
                       optimizer.safetensors  the optimizer's state, by parameter name
                       ema_0.05.safetensors   and ema_0.10: power-function EMAs, with train.ema_snapshot_every
                       state.json             everything else a resumed run needs
                       config.yaml            the run's configuration
                       manifest.json          size and SHA-256 of each of these, written last
    checkpoints/best          the best of them by evaluate.monitor, if one was evaluated

A sharded run has a file per rank in place of each with tensors (see gnunet.checkpoint.sharded_tensors). The snapshots
in RUN/ema/ are the same without model, ema and optimizer.
Nothing here reads a pickle. A checkpoint that does not match its manifest is named in the log and skipped. Checkpoints
may be untrusted: the headers of the weights must match the model before any tensor is read.
"""

import hashlib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from annotated_types import Len
from pydantic import FiniteFloat, NonNegativeInt, TypeAdapter, ValidationError
from torch import Tensor, nn
from typing_extensions import NotRequired, TypedDict

from gnunet.checkpoint.sharded_tensors import (
    POWER_EMAS,
    TENSOR_FILES,
    UNSHARDED,
    ShardedTensorReader,
    ShardId,
    file_name,
    file_names,
    write_tensors,
)
from gnunet.distributed.accelerator import run_on_all_ranks, run_on_main_rank
from gnunet.errors import CheckpointError, truncate
from gnunet.files import atomic_directory, atomic_rmtree, atomic_write, fsync_path
from gnunet.safe_io import MAX_JSON_BYTES, check_fits_memory, read_json, read_text

logger = logging.getLogger(__name__)

FORMAT = 1
BEST = "best"


def checkpoint_files(num_shards: int, kinds: Sequence[str] = TENSOR_FILES) -> list[str]:
    """The files of a checkpoint written by `num_shards` processes, without the manifest."""
    return [*(name for kind in kinds for name in file_names(kind, num_shards)), "state.json", "config.yaml"]


class Best(TypedDict):
    """The best evaluation by evaluate.monitor."""

    images: NonNegativeInt
    metric: str
    value: FiniteFloat
    settings: NotRequired[dict[str, Any]]  # the settings of its evaluation; metrics under other ones are not comparable


class Change(TypedDict):
    """A key that was changed when the run resumed, and the images seen with its value before."""

    images: NonNegativeInt
    key: str
    before: Any
    after: Any


@dataclass
class TrainState:
    """The state of a run besides weights and optimizer, stored in state.json, which may lack fields that are newer."""

    images: NonNegativeInt  # images seen
    reported: NonNegativeInt = 0
    """Images up to which logs, validation and samples are written; those due since then are written after a resume."""
    loss_sum: FiniteFloat = 0.0  # sum of the step losses since the last line in metrics.jsonl
    grad_norm_sum: FiniteFloat = 0.0  # sum of the gradient norms since the last line in metrics.jsonl
    steps: NonNegativeInt = 0  # finite steps since the last line in metrics.jsonl
    nonfinite: NonNegativeInt = 0  # steps skipped since the run began for a non-finite loss or gradient
    nonfinite_in_a_row: NonNegativeInt = 0  # steps skipped since the last finite one
    nonfinite_examples: list[int] = field(default_factory=list)
    """The first examples since the last line in metrics.jsonl whose loss was not finite."""
    scaler: dict[str, Any] = field(default_factory=dict)  # GradScaler's state (fp16 only)
    data: dict[str, Any] = field(default_factory=dict)
    """The data set: its fingerprint, number of images, class names, and number of training images per class."""
    normalized_by: dict[str, int] = field(default_factory=dict)
    """The run's batch sizes in normalization (Session.batch_norm_scope); empty if no norm depends on the batch."""
    best: Best | Annotated[dict[str, Any], Len(0, 0)] = field(default_factory=dict)  # empty before the first evaluation
    changes: list[Change] = field(default_factory=list)
    """Changes, since the run began, of keys that affect what is computed."""
    init: dict[str, Any] = field(default_factory=dict)  # what train.init_from gave; empty without it


_STATE = TypeAdapter(TrainState)


def checkpoint_name(images: int) -> str:
    """Directory name of the checkpoint at `images` images seen."""
    return f"{images:09d}"


def file_sha256(path: Path) -> dict[str, Any]:
    """A file's entry in manifest.json: its size in bytes and its SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def save_checkpoint(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], *, state: TrainState, config_text: str,
    accelerator: Accelerator, sharded: bool = False,
) -> Path:  # fmt: skip
    """Write the checkpoint of `state.images` under `folder` and return its path; `tensors` are by kind and name.

    Every rank calls this and, if the state is `sharded`, writes a shard; else the main rank writes everything.

    Raises:
        OSError: writing failed, on all ranks; earlier checkpoints are unchanged.
    """
    path = folder / checkpoint_name(state.images)
    shard = ShardId(accelerator.process_index, accelerator.num_processes) if sharded else UNSHARDED

    def write_shard() -> dict[str, dict[str, Any]]:
        written = {}
        for kind in tensors if sharded or accelerator.is_main_process else ():
            file = temporary / file_name(kind, shard)
            write_tensors(file, tensors[kind], shard)
            fsync_path(file)
            written[file.name] = file_sha256(file)
        return written

    def complete() -> None:
        (temporary / "state.json").write_text(json.dumps({"format": FORMAT, **asdict(state)}, indent=1) + "\n")
        (temporary / "config.yaml").write_text(config_text)
        manifest = {name: entry for each in written for name, entry in each.items()}
        manifest |= {name: file_sha256(temporary / name) for name in ("state.json", "config.yaml")}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        stack.close()

    with ExitStack() as stack:
        temporary = run_on_main_rank(accelerator, lambda: stack.enter_context(atomic_directory(path)))
        written = run_on_all_ranks(accelerator, write_shard)
        run_on_main_rank(accelerator, complete)
    return path


def load_checkpoint(path: Path, models: Mapping[str, nn.Module], optimizer: torch.optim.AdamW) -> TrainState:
    """Load the checkpoint at `path` into models, by kind, and optimizer, in place, and return its TrainState.

    If they are sharded, each rank reads the rows it holds, whatever number of ranks wrote them.

    Raises:
        CheckpointError: a file is missing or damaged, or belongs to another model; no weight has been changed.
    """
    state = read_state(path)
    readers = {kind: open_tensors(path, kind) for kind in (*models, "optimizer")}
    new_state = getattr(optimizer, "new_state", new_adamw_state)  # what the file is read into
    moments = {
        index: new_state(parameter)
        for index, (name, parameter) in enumerate(models["model"].named_parameters())
        if f"{name}/step" in readers["optimizer"].specs  # after its first step that was not skipped
    }
    into = {kind: model.state_dict() for kind, model in models.items()}
    into["optimizer"] = optimizer_tensors(moments, models["model"])
    for kind, reader in readers.items():
        reader.check(into[kind])
    for kind, reader in readers.items():
        reader.read(into[kind])
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return state


def new_adamw_state(parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a parameter before its first step, in its memory format, which fused AdamW requires."""
    moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros(()), **moments}


def open_tensors(path: Path, kind: str) -> ShardedTensorReader:
    """A reader of one of TENSOR_FILES or POWER_EMAS in the checkpoint at `path`."""
    num_shards = count_shards(read_json(path / "manifest.json"), kind)
    return ShardedTensorReader([path / name for name in file_names(kind, num_shards)])


def count_shards(manifest: Collection[str], kind: str) -> int:
    return max(1, sum(name.startswith(f"{kind}-") for name in manifest))


def optimizer_tensors(state: Mapping[int, Mapping[str, Tensor]], model: nn.Module) -> dict[str, Tensor]:
    """An optimizer's state, by parameter's index, as PARAMETER/ENTRY."""
    names = [name for name, _ in model.named_parameters()]
    return {f"{names[index]}/{key}": value for index, entries in state.items() for key, value in entries.items()}


def verify_checkpoint(path: Path, kinds: Sequence[str] = TENSOR_FILES) -> None:
    """Raise CheckpointError, naming the file, unless the checkpoint has these kinds of tensors, and POWER_EMAS or none,
    matches its manifest and has our format.

    A file may be a symbolic link, as in a download cache.
    """
    try:
        manifest = read_json(path / "manifest.json")
        others = [kind for kind in POWER_EMAS if any(name.startswith(kind) for name in manifest)]
        names = checkpoint_files(count_shards(manifest, kinds[0]), [*kinds, *others])
        expected = {name: manifest[name] for name in names}
    except (CheckpointError, KeyError):
        raise CheckpointError(f"{path}: manifest.json is missing or damaged") from None
    for name, entry in expected.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        if name.endswith(".safetensors"):
            check_fits_memory([path / name], copies=2 if name.startswith("optimizer") else 1)
        elif (path / name).stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {name} is larger than the limit of {MAX_JSON_BYTES} bytes")
        has_size = isinstance(entry, dict) and (path / name).stat().st_size == entry.get("bytes")
        if not has_size or file_sha256(path / name) != entry:  # the size is known sooner
            raise CheckpointError(f"{path}: {name} does not match manifest.json (truncated or modified)")
    if (version := read_json(path / "state.json").get("format")) != FORMAT:
        raise CheckpointError(f"{path}: state.json has format {truncate(version)}; this version reads format {FORMAT}")


def read_state(path: Path) -> TrainState:
    """The TrainState of the checkpoint at `path`; CheckpointError if state.json holds anything else."""
    file = path / "state.json"
    try:
        state = _STATE.validate_json(read_text(file, MAX_JSON_BYTES), strict=True)
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        raise CheckpointError(f"{file}: {truncate('.'.join(map(str, problem['loc'])))}: {problem['msg']}") from None
    if state.reported > state.images or (_is_number(path.name) and int(path.name) != state.images):
        raise CheckpointError(
            f"{file}: has images {truncate(state.images)}, reported {truncate(state.reported)}; valid: the number that "
            "the checkpoint's directory is named by, and at most as many reported"
        )
    return state


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint directories under `folder`, oldest first, damaged ones included."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.is_dir() and _is_number(p.name)), key=lambda p: int(p.name))


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest undamaged checkpoint under `folder`; damaged ones are named in the log. None if there are none at all.

    Raises:
        CheckpointError: all are damaged; a run never starts again silently.
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
        lines = ["all checkpoints are damaged:", *(f"  {problem}" for problem in problems)]
        raise CheckpointError("\n".join([*lines, f"Remove {folder} to start again."]))
    return None


def prune_checkpoints(folder: Path, keep: int, state: TrainState) -> None:
    """Make `folder`/best name the checkpoint of `state.best`, or remove it if there is no such checkpoint; then remove
    all but that one and the `keep` newest up to the one of `state`."""
    pointer, best = folder / BEST, state.best
    # Before the previous best is removed: the named one must always exist.
    if best and (folder / (name := checkpoint_name(best["images"]))).is_dir():
        atomic_write(pointer, json.dumps({"checkpoint": name, **best}) + "\n")
    else:
        pointer.unlink(missing_ok=True)
    paths = list_checkpoints(folder)
    # Later ones are damaged, or the run would have resumed from them.
    candidates = [path for path in paths if int(path.name) <= state.images]
    for path in set(paths) - set(candidates[-keep:]):
        if int(path.name) != best.get("images"):
            atomic_rmtree(path)


def best_checkpoint(pointer: Path) -> Path:
    """The checkpoint named by checkpoints/best; CheckpointError unless it names one in the same directory."""
    name = read_json(pointer).get("checkpoint")
    if not isinstance(name, str) or not _is_number(name):
        raise CheckpointError(f"{pointer}: names {truncate(name)}; valid: a checkpoint in the same directory")
    return pointer.parent / name
