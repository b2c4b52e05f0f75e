"""A folder of samples: its samples.json says what decided the images, so that no two sets of samples mix."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from accelerate import Accelerator
from pydantic import Field, TypeAdapter, ValidationError

from gnunet import __version__
from gnunet.checkpoint.run_dir import RunLock
from gnunet.checkpoint.trained_model import TrainedModel
from gnunet.commands.options import LIMITS, make_output_dir, numbered
from gnunet.distributed.accelerator import run_on_main_rank
from gnunet.errors import CheckpointError, ConfigError, DataError, first_few, truncate
from gnunet.evaluation.image_files import OVERVIEWS, image_files, read_sample
from gnunet.evaluation.report import write_json
from gnunet.safe_io import MAX_JSON_BYTES, read_text
from gnunet.scaling import PICTURES, Scaling, as_resolution, as_size

RECORD = "samples.json"


@dataclass(frozen=True)
class SampleSettings:
    """What an image depends on, besides its index."""

    checkpoint: str  # `TrainedModel.digest`
    resolution: int | list[int]  # as `data.resolution`
    channels: int
    sampler: str
    steps: int
    guidance: float
    batch_size: int
    seed: int
    precision: str
    classes: list[str] | None  # names, assigned to the images in turn; None draws them as often as in training
    conditions: str | None = None  # `SampleConditions.fingerprint`; None for a model without a condition
    inpaint: str | None = None  # the same of --inpaint
    labels: list[float] | list[list[float]] | None = None  # numbers or vectors, as classes
    jump_length: int | None = None
    resample: int | None = None
    guidance_interval: list[float] | None = None
    guide: str | None = None  # `TrainedModel.digest` of --guide
    scaling: Scaling = PICTURES  # with the format of the files


@dataclass(frozen=True)
class SamplesRecord:
    """The content of samples.json."""

    gnunet: str
    source: str
    name: str
    num_images: Annotated[int, Field(ge=1, le=2_000_000)]  # bounds the memory that an untrusted record costs
    settings: SampleSettings
    class_names: list[str] | None
    labels: list[int] | list[float] | None  # each image's class, as an index of class_names, or number; not vectors
    start: Annotated[int, Field(ge=0, le=LIMITS["start"][1])] = 0  # the first image

    @classmethod
    def of(cls, model: TrainedModel, source: Path, indices: range) -> "SamplesRecord":
        names, labels = model.class_names, model.labels(indices)
        values = None if model.given_labels is None else model.given_labels.tolist()
        settings = SampleSettings(
            checkpoint=model.digest(), resolution=as_resolution(model.size), channels=model.channels,
            **model.sampling_metadata(), precision=model.mixed_precision,
            classes=None if values is None or names is None else [names[label] for label in values],
            labels=None if names else values, scaling=model.scaling,
        )  # fmt: skip
        in_turn = None if labels is None or labels.ndim > 1 else labels.tolist()
        return cls(__version__, str(source), model.name, len(indices), settings, names, in_turn, indices.start)

    def files(self, folder: Path) -> dict[int, Path]:
        """Each image's file, by its index."""
        indices = range(self.start, self.start + self.num_images)
        return {index: folder / f"{index:06d}{self.settings.scaling.suffix}" for index in indices}


def read_record(folder: Path) -> SamplesRecord | None:
    """The record of a folder, which may be untrusted; None if it has none. Raises CheckpointError for anything else."""
    file = folder / RECORD
    if not file.exists():
        return None
    try:
        return TypeAdapter(SamplesRecord).validate_json(read_text(file, MAX_JSON_BYTES), strict=True)
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        where = truncate(".".join(map(str, problem["loc"])))
        raise CheckpointError(f"{file}: not a record of gnunet sample ({where}: {problem['msg']})") from None


def check_complete(record: SamplesRecord, folder: Path) -> None:
    """Raise DataError unless the pictures in a folder, all but its grid, are those of its record."""
    expected, files = set(record.files(folder).values()), image_files(folder, record.settings.scaling)
    if missing := len(expected.difference(files)):
        given = f"{missing} of the {record.num_images} images that its {RECORD} lists"
        raise DataError(f"{folder} lacks {given}; the gnunet sample command that began it finishes it")
    if strangers := [file.relative_to(folder) for file in files if file not in expected]:
        given = f"{first_few(strangers)} besides the {record.num_images} images that its {RECORD} lists"
        raise DataError(f"{folder} holds {given}; valid: these alone, or no {RECORD} to measure all pictures")


@contextmanager
def open_sample_folder(
    given: Path | None, record: SamplesRecord, accelerator: Accelerator
) -> Iterator[tuple[Path, list[int]]]:
    """The folder of `record`, new or continued, and the indices of the images that it lacks, on every rank.

    It is locked, and has the record. A folder that holds anything else is left as it is. Without one given, it is
    samples/NAME, or the next of samples/NAME-2, samples/NAME-3, ... that is new or holds these samples.

    Raises:
        ConfigError: the given folder holds other pictures, is used by another process or cannot be written.
    """
    with ExitStack() as stack:
        yield run_on_main_rank(accelerator, lambda: _open(given, record, stack))


def _open(given: Path | None, record: SamplesRecord, stack: ExitStack) -> tuple[Path, list[int]]:
    for folder in [given] if given else numbered(Path("samples") / record.name):
        make_output_dir(folder)
        lock = RunLock(folder, "--out")
        lock.acquire()
        if (obstacle := _obstacle(folder, record)) is None:
            stack.callback(lock.release)
            with writing_to(folder):
                write_json(folder / RECORD, asdict(record))
            files = record.files(folder).items()
            return folder, [index for index, file in files if not _is_written(file, record.settings)]
        lock.release()
        if given:
            raise ConfigError(f"--out: {folder} {obstacle}; valid: a new or empty folder, or one of the same settings")
    raise AssertionError("there are infinitely many numbers")


def _obstacle(folder: Path, record: SamplesRecord) -> str | None:
    """Why the samples of `record` may not be written to a folder; None if they may."""
    if all(path.name.startswith(".") for path in folder.iterdir()):
        return None
    pictures, overviews = image_files(folder, record.settings.scaling), [*map(folder.joinpath, OVERVIEWS)]
    try:
        found = read_record(folder)
    except CheckpointError as error:
        return f"holds another {RECORD} ({error})"
    if found is None or not any(file.exists() for file in found.files(folder).values()):  # as after an error
        pictures += [file for file in overviews if file.exists()]
        return f"holds pictures of no {RECORD}, such as {pictures[0].relative_to(folder)}" if pictures else None
    ours, theirs = asdict(record.settings), asdict(found.settings)
    if differ := [
        f"{key} {truncate(theirs[key])} -> {truncate(ours[key])}" for key in ours if ours[key] != theirs[key]
    ]:
        return f"holds samples of other settings ({', '.join(differ)})"
    expected, first, last = record.files(folder), found.start, found.start + found.num_images - 1
    if not {first, last} <= expected.keys():
        return f"holds images {first} to {last} of these settings, more than --start and --num_images say"
    strangers = [file.relative_to(folder) for file in set(pictures).difference(expected.values())]
    return f"holds other pictures: {first_few(sorted(strangers))}" if strangers else None


def _is_written(file: Path, settings: SampleSettings) -> bool:
    """Whether an image is there, and whole: a machine that lost power may have left a part of it."""
    try:
        values = read_sample(file, settings.scaling, settings.channels)
    except (OSError, SyntaxError, ValueError):  # PIL's of a broken file
        return False
    shape = (*as_size(settings.resolution), settings.channels)
    return (values.shape, values.dtype) == (shape, settings.scaling.file_dtype)


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn the error of a full or lost disk into a ConfigError."""
    try:
        yield
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error})"
        raise ConfigError(f"--out: {folder} {reason}; once there is room, the same command goes on") from None
