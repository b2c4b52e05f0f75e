"""Between the values that data has and those that networks see, pictures of either, and their sizes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError
from torch import Tensor

from gnunet.errors import CheckpointError, truncate

_TINY, _MAX = (float(value) for value in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


@dataclass(frozen=True)
class Scaling:
    """For the network a value v of a channel is x = (v - offset) / scale. The default is that of pictures: uint8 of 1,
    3 or 4 channels, whose 0..255 is -1..1."""

    dtype: Literal["uint8", "float32"] = "uint8"  # uint8 for pictures, float32 for arrays
    offset: tuple[FiniteFloat, ...] = ()  # one for each channel of arrays, as scale
    scale: tuple[Annotated[FiniteFloat, Field(ge=_TINY, le=_MAX)], ...] = ()
    suffix: Literal[".png", ".tif", ".npy"] = ".png"  # of files of samples, which are as those of the data
    file_dtype: Annotated[str, Field(pattern="^(u?int(8|16|32|64)|float(16|32|64))$")] = "uint8"
    axes: Literal["HWC", "CHW", "HW"] = "HWC"  # of the array in a .npy file

    @classmethod
    def fit(cls, images: np.ndarray, normalization: str, **file: Any) -> "Scaling":
        """The scaling by `data.normalization` of float32 (n, H, W, C), with statistics in float64. A channel of one
        value becomes 0, and is this value in samples. `file` are suffix, file_dtype and axes."""
        step = max(1, 2**22 // images[0].size)
        parts = [images[start : start + step].reshape(-1, images.shape[-1]) for start in range(0, len(images), step)]
        if normalization == "range":
            low, high = np.float64([part.min(0) for part in parts]), np.float64([part.max(0) for part in parts])
            offset, scale = (high.max(0) + low.min(0)) / 2, (high.max(0) - low.min(0)) / 2
        else:
            count = images.size // images.shape[-1]
            offset = sum(part.sum(0, dtype=np.float64) for part in parts) / count
            scale = 2 * np.sqrt(sum(((part - offset) ** 2).sum(0) for part in parts) / count)
        least = np.maximum(np.abs(offset) * 2.0**-26, _TINY)  # below what float32 tells from offset
        return cls("float32", tuple(offset.tolist()), tuple(np.clip(scale, least, _MAX).tolist()), **file)

    @classmethod
    def from_dict(cls, values: Any, channels: int, where: object) -> "Scaling":
        """The scaling of `as_dict`, which may be untrusted; CheckpointError, with `where`, if it is not one for this
        number of channels."""
        try:
            found = TypeAdapter(cls).validate_python({} if values is None else values)
        except ValidationError as error:
            problem = error.errors(include_input=False, include_url=False)[0]
            key = truncate(".".join(map(str, problem["loc"])))
            raise CheckpointError(f"{where}: scaling {key}: {problem['msg']}") from None
        expected = channels if not found.is_pictures else 0 if channels in (1, 3, 4) else None
        if not len(found.offset) == len(found.scale) == expected:
            raise CheckpointError(f"{where}: scaling of {len(found.scale)} channels, for a model of {channels}")
        return found

    def as_dict(self) -> dict[str, Any] | None:
        """JSON values; None for pictures."""
        return None if self.is_pictures else {**asdict(self), "offset": [*self.offset], "scale": [*self.scale]}

    @property
    def is_pictures(self) -> bool:
        return self.dtype == "uint8"

    def to_network(self, images: Tensor) -> Tensor:
        """Values of the data (N, C, H, W) -> fp32 of the same shape, device and memory format."""
        if self.is_pictures:
            return to_unit_range(images)
        return (images.float() - per_channel(self.offset, images.device)) / per_channel(self.scale, images.device)

    def from_network(self, images: Tensor) -> np.ndarray:
        """Undo `to_network`: fp32 (N, C, H, W) -> file_dtype (N, H, W, C) on the host. Integers are rounded, clipped to
        their dtype, and 0 in place of NaN."""
        if self.is_pictures:
            return to_uint8(images)
        values = images.permute(0, 2, 3, 1).contiguous().cpu().numpy() * np.array(self.scale) + np.array(self.offset)
        if np.dtype(self.file_dtype).kind == "f":
            return np.clip(values, np.finfo(self.file_dtype).min, np.finfo(self.file_dtype).max).astype(self.file_dtype)
        limits = np.iinfo(self.file_dtype)  # of int64, float64 does not hold all values
        values = np.clip(np.rint(np.nan_to_num(values)), max(limits.min, -(2**53)), min(limits.max, 2**53))
        return values.astype(self.file_dtype)

    def to_pictures(self, images: np.ndarray) -> np.ndarray:
        """What is shown of values of the data (N, H, W, C): uint8 (N, H, W, 1 or 3).

        The network's -1..1 becomes 0..255, of channels by `as_colours`; transparent pictures are composed on white.
        """
        channels = images.shape[-1]
        if self.is_pictures and channels == 4:
            alpha = images[..., 3:].astype(np.uint32)
            return ((images[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
        if self.is_pictures:
            return images
        values = torch.from_numpy(np.array(images, np.float32)).permute(0, 3, 1, 2)
        return as_colours(to_uint8(self.to_network(values)))


PICTURES = Scaling()


@lru_cache
def per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """fp32 (C, 1, 1)."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


def as_colours(levels: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, C) -> (N, H, W, 1 or 3): one channel is grey, two are red and green, of more the first three are
    red, green and blue."""
    return np.pad(levels, [(0, 0)] * 3 + [(0, 1)]) if levels.shape[-1] == 2 else levels[..., :3]


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 of any shape -> fp32 in [-1, 1], the same shape, device and memory format."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> np.ndarray:
    """fp32 (N, C, H, W) nominally in [-1, 1] -> uint8 (N, H, W, C) on the host.

    Values are rounded to the nearest level and clamped; NaN becomes mid-grey. Undoes `to_unit_range` exactly.
    """
    levels = ((images.float().nan_to_num(nan=0.0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def as_size(resolution: int | Sequence[int]) -> tuple[int, int]:
    """The height and width that `data.resolution` says."""
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    return height, width


def as_resolution(size: Sequence[int]) -> int | list[int]:
    """`data.resolution` for a height and width: one number for squares."""
    return size[0] if size[0] == size[1] else list(size)
