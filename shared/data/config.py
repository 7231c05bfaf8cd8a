"""The schema of `data:` and a first look at the source, before anything heavy is imported.

Says which kinds of source there are and what can be seen of them from outside. Opens no image. No torch.
"""

import difflib
import math
import re
import zipfile
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from shared import disk
from shared.config import Contradictions, InputError, choice, number, section, text
from shared.folders import folders_of, names_below, without_ending

BUILT_IN = ("digits", "speckle", "jets")
METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}
LABELS = ("label", "labels", "y")  # what an .npz may call its classes
SPLIT_FOLDERS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}
TIFF = (".tif", ".tiff")
JPEG = (".jpg", ".jpeg", ".jpe", ".jfif", ".jp2")
IMAGE_SUFFIXES = (".png", *JPEG, *TIFF, ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".tga")
OTHER_IMAGES = (".heic", ".heif", ".avif", ".jxl")  # which the `datasets` library passes over
ARRAY_SUFFIXES = (".npy", ".npz")
MOST_PATCHES = 50_000  # of a set, beyond which they overlap less
SAVED = ("state.json", "dataset_dict.json")  # one of them is in each folder of Dataset.save_to_disk
PACKED = (".zip", ".tar", ".tgz", ".gz", ".7z", ".rar")
HDF5 = (".h5", ".hdf5", ".hdf", ".nxs")
NIFTI = (".nii", ".nii.gz")
DICOM = (".dcm", ".dicom", ".ima")
CONVERTED = (*HDF5, *NIFTI, *DICOM, *TIFF)  # by shared.convert


@dataclass
class ValueTransformConfig:
    """How raw values become [-1, 1]; bounds left empty are measured on the training split."""

    kind: Any = choice(
        "auto", "auto", "range", "minmax", "log1p", "asinh", "sqrt",
        help="auto: 0..255 for images and uint8 arrays, minmax for other arrays; range needs low and high; "
        "asinh: heavy tails of both signs; a list: one for each channel",
    )  # fmt: skip
    low: Any = number(
        None,
        help="in your units; null: measured on the training split, by channel unless of uint8; or a list",
    )
    high: Any = number(None, help="likewise")
    scale: Any = number(
        1.0, above=0, help="log1p(x / scale), asinh(x / scale): values below it stay nearly linear; or a list"
    )

    def contradictions(self) -> Contradictions:
        if isinstance(self.kind, list) and "auto" in self.kind:
            yield "kind", "auto chooses for all channels; in a list: range, minmax, log1p, asinh or sqrt"
        for kind, low, high in by_channel(self.kind, self.low, self.high):
            if kind == "auto" and (low is not None or high is not None):
                yield "kind", "low and high need a kind: range, minmax, log1p, asinh or sqrt"
            if kind == "range" and (low is None or high is None):
                yield "kind", "range needs low and high (minmax measures them)"
            if low is not None and high is not None and low >= high:
                yield "low", f"must be less than high ({low} >= {high})"
            if kind in ("log1p", "sqrt") and low is not None and low < 0:
                yield "low", f"{kind} is for values >= 0"


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def by_channel(*values: Any) -> list[tuple]:
    """A row for each channel of values that are lists, one for each channel, or one for all of them."""
    columns = [_listed(value) for value in values]
    count = max(map(len, columns))
    return list(zip(*(column * count if len(column) == 1 else column for column in columns), strict=False))


@dataclass
class AugmentConfig:
    """What may be done to a training image without changing what it shows. Never to held-out images."""

    flip: str = choice(
        "none", "none", "horizontal", "vertical", "both", "dihedral",
        help="dihedral: flips and quarter turns, for fields without an up",
    )  # fmt: skip
    shift: int = number(0, low=0, high=256, help="pixels, up to this far either way; the edge is repeated")
    copies: int = number(
        1, low=1, high=64, help="of each image in the saved latents: as it is, then augmented, for stage 2"
    )

    @property
    def active(self) -> bool:
        return self.flip != "none" or self.shift > 0

    def contradictions(self) -> Contradictions:
        if self.copies > 1 and not self.active:
            yield "copies", f"nothing makes {self.copies} copies differ: set flip or shift"


@dataclass
class DataConfig:
    """Where the images come from and what they become: (channels, height, width)."""

    source: str = text(
        "your_images",
        help="a folder of images (class sub-folders or a metadata file give labels), a folder or file of "
        ".parquet, what Dataset.save_to_disk wrote, an .npy or .npz (image array x, classes label), a hub id "
        "(owner/name), or built in: digits, speckle, jets",
    )
    split: str = text(
        "train", help="of a hub id, saved sets, an .npz; of a folder its .parquet, <split>/ or <split>.npz"
    )
    revision: str | None = text(None, help="of a hub id: a branch, a tag or a commit; null: its newest")
    label_column: str | None = text(
        "auto", help="auto: `label` (of arrays also y, y.npy) if there; a column's name; null: no classes"
    )
    image_size: Any = number(
        64, low=4, high=4096,
        help="of a square, or [height, width]; divisible by 2 to the power of the number of "
        "stage1.model.channels",
    )  # fmt: skip
    channels: int = number(3, low=1, high=512, help="1 grey, 3 RGB, 4 RGBA; arrays: as many as they have")
    resize: str = choice(
        "crop", "crop", "stretch", "pad", "patches",
        help="crop: the short side fits, the centre is kept; pad: never enlarged, zeros around; "
        "patches: of arrays. Arrays beyond uint8 are shrunk to means, by pad in whole blocks",
    )  # fmt: skip
    value_transform: ValueTransformConfig = section(
        ValueTransformConfig, help="how raw values become [-1, 1]"
    )
    augment: AugmentConfig = section(AugmentConfig, help="of training images, another way at each step")
    val_fraction: float = number(
        0.05, above=0, high=0.9, help="held out: the loss, PSNR and pictures you watch are of these"
    )
    limit: int | None = number(None, low=2, help="take no more than this number of images")
    num_workers: int | None = number(
        None, low=0, high=256,
        help="loader processes; null: without a GPU none, with one "
        "the cores shared out over the processes, at most 8 each",
    )  # fmt: skip
    max_bad_fraction: float = number(
        0.01, low=0, high=1,
        help="unreadable images are named and replaced up to this share, then the run stops",
    )  # fmt: skip
    field: str | None = choice(
        None, None, "generic", "speckle", "jets",
        help="evaluate judges samples by this field's own statistics, too; generic: of any array",
    )  # fmt: skip

    def contradictions(self) -> Contradictions:
        for key in ("kind", "low", "high", "scale"):
            value = getattr(self.value_transform, key)
            if isinstance(value, list) and len(value) != self.channels:
                but = f"{len(value)} of them, but the images have {self.channels} channels"
                yield f"value_transform.{key}", but
        size = self.image_size if isinstance(self.image_size, list) else [self.image_size] * 2
        if len(size) != 2 or not all(isinstance(side, int) for side in size):
            yield "image_size", f"must be one whole number, or [height, width], not {self.image_size}"
        if 2 * self.augment.shift >= min(self.size):
            yield "augment.shift", f"{self.augment.shift} px is half of an image of {min(self.size)} or more"
        if self.augment.flip == "dihedral" and self.height != self.width:
            yield "augment.flip", "dihedral turns images by quarters: they must be square"
        if self.field in ("speckle", "jets") and self.height != self.width:
            yield "field", f"the statistics of {self.field} are of square images"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        sides = _listed(self.image_size)
        return sides[0], sides[-1]

    @property
    def height(self) -> int:
        return self.size[0]

    @property
    def width(self) -> int:
        return self.size[1]


def patch_steps(count: int, whole: Sequence[int], size: Sequence[int]) -> list[int]:
    """How far apart, down and across, patches of a size are cut out of `count` images of another.

    By a quarter of their sides; by a half or by whole sides where that makes more than MOST_PATCHES.
    """
    steps: list[int] = []
    for part in (4, 2, 1):
        steps = [max(1, side // part) for side in size]
        if count * patches_of(whole, size, steps) <= MOST_PATCHES:
            break
    return steps


def patches_of(whole: Sequence[int], size: Sequence[int], steps: Sequence[int]) -> int:
    """How many are cut out of an image."""
    rows = zip(whole, size, steps, strict=True)
    return math.prod((length - side) // step + 1 for length, side, step in rows)


def array_file(source: Path, split: str) -> Path | None:
    """The .npy or .npz that a source means: the file itself, or <split>.npz / .npy in a folder."""
    if source.suffix in ARRAY_SUFFIXES:
        return source
    candidates = (source / f"{split}.npz", source / f"{split}.npy")
    return next((path for path in candidates if path.is_file()), None)


def _cure(path: Path, names: Collection[str]) -> str:
    """What to do with files that are not read as they are."""
    known = {
        CONVERTED: f"python -m shared.convert {path} --out FILE.npy makes an array of its slices",
        IMAGE_SUFFIXES: "name its folder",
        OTHER_IMAGES: "save its photos as JPEG",
        ARRAY_SUFFIXES: f"name one, or make one of all: python -m shared.convert {path} --out FILE.npy",
        PACKED: "unpack it",
        (".arrow",): "name a folder that Dataset.save_to_disk wrote, or save it as .parquet",
        tuple(without_ending(map(str.lower, names))): "give its images an ending, such as .jpg",
    }
    cures = [cure for ends, cure in known.items() if any(name.lower().endswith(ends) for name in names)]
    return cures[0] if cures else "save what it holds as PNG or JPEG, or as an .npz of x (N,C,H,W) and label"


def source_kind(data: DataConfig) -> str:
    """builtin | arrays | saved | parquet | images | hub. Raises InputError where it can be none of them.

    A new source is a kind here, a branch in `sources.open_source`, and a class with the attributes and
    methods of `arrays.ArraySource`.
    """
    path = disk.path_of(data.source)
    if data.source in BUILT_IN:
        return "builtin"
    if path.is_file():
        if path.suffix in ARRAY_SUFFIXES:
            return "arrays"
        if path.suffix == ".parquet":
            return "parquet"
        raise InputError(f"data.source: {path} is no .npy, .npz or .parquet: {_cure(path, [path.name])}")
    if path.is_dir():
        if array_file(path, data.split):
            return "arrays"
        if any((path / name).is_file() for name in SAVED):
            return "saved"
        names = [name.lower() for name in names_below(path) if name not in METADATA]
        images, tables = (sum(n.endswith(ends) for n in names) for ends in (IMAGE_SUFFIXES, ".parquet"))
        if images or tables:
            return "images" if images > 50 * tables else "parquet"  # a few are previews of a table
        found = f"{path} holds no image, no .parquet and no {data.split}.npy or .npz"
        raise InputError(f"data.source: {found}: {_cure(path, names)}")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", data.source) and not path.parent.is_dir():
        return "hub"
    near = difflib.get_close_matches(data.source, BUILT_IN, n=1)
    known = f"built in: {', '.join(BUILT_IN)}; a hub id reads owner/name"
    hint = f"did you mean '{near[0]}'?" if near else known
    raise InputError(f"data.source: no such file or folder: {data.source} ({hint})")


def image_root(data: DataConfig) -> Path:
    """Where the images of a split are: <split>/ if all sub-folders are named like splits, else the folder."""
    place = disk.path_of(data.source)
    folders = {folder.name.lower(): folder for folder in folders_of(place)}
    if folders and folders.keys() <= SPLIT_FOLDERS:
        for name in (data.split.lower(), f"{data.split.lower()}ing"):
            if name in folders:
                return folders[name]
        raise InputError(f"data.split: {place} has {', '.join(sorted(folders))}, not {data.split}")
    if data.split == "train":
        return place
    raise InputError(f"data.split: {place} is not divided into splits; there is no {data.split}")


def array_key(file: zipfile.ZipFile, data: DataConfig) -> str:
    """The name of the images' array in an open .npz: of the split, as MedMNIST has it, x, or the only one."""
    names = [n.removesuffix(".npy") for n in file.namelist() if n.endswith(".npy")]
    for name in (f"{data.split}_images", f"x_{data.split}"):
        if name in names:
            return name
    if data.split != "train" and disk.path_of(data.source).is_file():
        raise InputError(f"data.split: {data.source} holds no {data.split}_images")
    if "x" in names:
        return "x"
    others = [n for n in names if n not in (*LABELS, "name", "channel_names")]
    if len(others) == 1:
        return others[0]
    found = ", ".join(names) or "(none)"
    raise InputError(f"data.source: {file.filename} holds the arrays {found}; name the images' array x")


def npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], Any]:
    """The shape and dtype of an array in the format of .npy."""
    from numpy.lib import format as npy

    read = npy.read_array_header_1_0 if npy.read_magic(stream) == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype


def array_header(data: DataConfig) -> tuple[Path, tuple[int, ...], Any]:
    """The file of the images' array, its shape and dtype, from its header alone. Raises InputError."""
    path = array_file(disk.path_of(data.source), data.split)
    assert path is not None  # it made this source one of arrays
    try:
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as file, file.open(f"{array_key(file, data)}.npy") as stream:
                return path, *npy_header(stream)
        with open(path, "rb") as stream:
            return path, *npy_header(stream)
    except (ValueError, OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"data.source: {path} is not a readable array file ({reason})") from None


def channels_last(shape: tuple[int, ...], channels: int) -> bool | None:
    """Whether an array (N, ...) keeps its channels last; None where no axis has that many channels."""
    if len(shape) == 3:
        return True if channels == 1 else None
    if len(shape) == 4 and channels in (shape[1], shape[3]):
        return shape[1] != channels
    return None


def inspect_source(data: DataConfig) -> None:
    """What is wrong with the source as seen from outside. Raises InputError."""
    kind = source_kind(data)
    if kind == "images":
        image_root(data)
    if data.revision and kind != "hub":
        raise InputError(f"data.revision: is of a hub id; {data.source} is none")
    if data.resize == "patches" and kind != "arrays":
        raise InputError(f"data.resize: patches are cut from arrays (.npy, .npz); {data.source} is none")
    path = disk.path_of(data.source)
    if data.split != "train" and (kind == "builtin" or (path.is_file() and path.suffix != ".npz")):
        raise InputError(f"data.split: {data.source} is not divided into splits; there is no {data.split}")
    wanted = 3 if data.source == "jets" else 1
    if kind == "builtin" and data.channels != wanted:
        raise InputError(f"data.channels: the built-in {data.source} have {wanted}, not {data.channels}")
    if data.source in ("speckle", "jets") and data.height != data.width:
        raise InputError(f"data.image_size: the built-in {data.source} are square, not {data.image_size}")
    if kind != "arrays":
        return
    path, shape, dtype = array_header(data)
    if dtype.kind not in "buif":
        raise InputError(f"data.source: {path} holds values of type {dtype}; images are real numbers")
    if channels_last(shape, data.channels) is None:
        has = f"the array in {path} has the shape {shape} (N,H,W | N,C,H,W | N,H,W,C)"
        raise InputError(f"data.channels: {data.channels}, but {has}")
    if shape[0] < 2:
        raise InputError(f"data.source: {path} holds {shape[0]} images; at least 2 are needed")
