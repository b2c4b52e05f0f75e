"""The keys of `data`."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt

from gnunet.config.schema import Section, ValidValues
from gnunet.scaling import as_resolution, as_size

Text = Annotated[str, Field(min_length=1)]
Subset = Annotated[
    dict[str, str | int | bool | list[str | int | bool]],
    ValidValues("a mapping from columns to a value or a list of values, such as {column: [value, value]}"),
]


Side = Annotated[PositiveInt, Field(le=8192)]
Resolution = Annotated[
    Side | Annotated[list[Side], Field(min_length=2, max_length=2)],
    # [64, 64] is 64, so that they are no different runs.
    BeforeValidator(lambda value: as_resolution(value) if isinstance(value, list) and len(value) == 2 else value),
    ValidValues("an integer, above 0 and at most 8192, or two of them, [HEIGHT, WIDTH]"),
]


class LowResolutionConfig(Section):
    """Super-resolution: the image, of which factor x factor pixels are averaged to one, enlarged again (bicubic)."""

    kind: Literal["low_resolution"] = "low_resolution"
    """What the network sees besides the noisy image."""
    factor: int = Field(2, ge=2, le=8192)
    """Pixels of height and width that become one."""


class MaskConfig(Section):
    """Inpainting: a mask of rectangles or strokes, drawn for each example, and the image, 0 where it is masked."""

    kind: Literal["mask"] = "mask"


class GreyConfig(Section):
    """Colorization: the image in grey (ITU-R 601-2 luma)."""

    kind: Literal["grey"] = "grey"


class PairedConfig(Section):
    """A second image for each image, flipped with it: a picture, or a class for each pixel."""

    kind: Literal["paired"] = "paired"
    folder: Text | None = None
    """Folder in which each image of data.source has its partner, with the same relative name but for the suffix."""
    column: Text | None = None
    """Column of data.source with the partners."""
    channels: Literal[1, 3] | None = None
    """Channels of the partners; null is model.in_channels."""
    num_classes: int | None = Field(None, ge=2, le=256)
    """Partners are maps of the classes 0 to num_classes - 1, grey values or indices of a palette; the network sees a
    channel for each class. null is pictures."""


class DataConfig(Section):
    """Where the images come from and how they are prepared."""

    source: Text = "noto_emoji"
    """`noto_emoji` (embedded), a folder or .zip of images (class subfolders give labels, metadata.csv or EDM's
    dataset.json columns) or of .npy or .npz arrays, one such array of all, a folder of idx files (MNIST's format), a
    local .parquet or .arrow file or folder of them, or a Hugging Face hub name."""
    split: Text = "train"
    """Split to use if the source has several, by the names of folders or files. With all, no folder of images counts as
    a split."""
    image_column: Text | None = None
    """Column with the images; null looks for a usual name (`image`, `img`, ...)."""
    label_column: Text | None = None
    """Column with the labels; null looks for a usual name (`label`, `labels`, `fine_label`, ...)."""
    subset: Subset = {}
    """Use only the rows in which each of these columns has one of the given values."""
    resolution: Resolution = 32
    """Height and width in pixels: one number for squares, or [HEIGHT, WIDTH]."""
    resize: Literal["crop", "pad", "none"] = "crop"
    """How images of other sizes get it: crop resizes them, with antialiasing, to cover it and crops the centre; pad
    resizes them to fit inside, on white; none makes them an error, as data.on_error says."""
    normalization: Literal["pixels", "range", "mean_std"] = "pixels"
    """How values are scaled for the network: pixels are those of 8-bit pictures, 0..255 as -1..1. Other numbers, in
    arrays or images of any depth, are scaled by each channel's statistics over the data set: range makes its minimum -1
    and its maximum 1, mean_std its mean 0 and its standard deviation 0.5."""
    flip: bool = True
    """Mirror each example left to right with probability 1/2."""
    augment: float = Field(0.0, ge=0, le=1)
    """Probability of each of five transforms of an example: upside down, scaled, turned, stretched and shifted. With
    any, left and right are exchanged in half of the examples, in place of data.flip. The network is told of all, so
    that samples show none (Karras et al., 2022, who use 0.12 to 0.15)."""
    autoencoder: Text | None = None
    """Train on the latents of an autoencoder of diffusers (AutoencoderKL, AutoencoderTiny, VQModel): a folder, or a
    Hugging Face hub name. Images are encoded once; samples are decoded."""
    class_conditional: bool = False
    """Train on the labels: classes, or numbers and vectors with model.class_embed_type."""
    label_dropout: float = Field(0.1, ge=0, lt=1)
    """Probability of replacing a label by the null label, as classifier-free guidance needs, if class_conditional."""
    condition: LowResolutionConfig | MaskConfig | GreyConfig | PairedConfig | None = Field(None, discriminator="kind")
    """What the network sees besides the noisy image, concatenated to its input; null is nothing."""
    condition_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of replacing the condition by zeros, as guidance needs. One draw decides for label and condition: at
    equal probabilities they are dropped together."""
    validation_images: NonNegativeInt = 0
    """Images held out for the validation loss; 0 validates on training images. One of each class always trains."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with images that cannot be decoded: raise an error with their names before training, or skip them."""
    num_workers: NonNegativeInt = Field(2, le=1024)
    """Data loader workers per process; 0 loads in the training process."""
    cache_dir: Text | None = None
    """Folder for the decoded images; null is $GNUNET_CACHE, or gnunet in the user's cache folder."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return as_size(self.resolution)
