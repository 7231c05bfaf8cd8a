"""The schema of `data:` and a first look at the source, before anything heavy is imported.

Knows which kinds of source there are and what can be seen of them from outside. Refuses to open an image.
"""

import difflib
import os
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from shared.config import InputError, choice, number

BUILT_IN = ("digits", "speckle", "jets")
SPLIT_FOLDERS = {"train", "test", "val", "valid", "validation", "dev", "eval"}
SIMULATED = 10_000  # images of a simulated set; any of them is made when it is asked for
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
ARRAY_SUFFIXES = {".npy", ".npz"}


@dataclass
class ValueTransformConfig:
    """How raw values become [-1, 1]; bounds left empty are measured on the training split."""

    kind: str = choice("auto", "auto", "range", "minmax", "log1p", "sqrt")
    low: float | None = number(None)
    high: float | None = number(None)
    scale: float = number(1.0, above=0)  # log1p(x / scale): values below `scale` stay nearly linear

    def contradictions(self):
        if self.kind == "auto" and (self.low is not None or self.high is not None):
            yield "kind", "low and high need a kind: range, minmax, log1p or sqrt"
        if self.kind == "range" and (self.low is None or self.high is None):
            yield "kind", "range needs low and high (minmax measures them)"
        if self.low is not None and self.high is not None and self.low >= self.high:
            yield "low", f"must be less than high ({self.low} >= {self.high})"
        if self.kind in ("log1p", "sqrt") and self.low is not None and self.low < 0:
            yield "low", f"{self.kind} is for values >= 0"


@dataclass
class DataConfig:
    """Where the images come from and what they become: (channels, image_size, image_size)."""

    source: str = "digits"
    split: str = "train"
    label_column: str | None = "auto"
    image_size: int = number(32, low=4, high=4096)
    channels: int = number(1, low=1, high=512)
    resize: str = choice("crop", "crop", "stretch", "pad", "patches")
    value_transform: ValueTransformConfig = field(default_factory=ValueTransformConfig)
    val_fraction: float = number(0.1, above=0, high=0.9)
    limit: int | None = number(None, low=2)
    num_workers: int | None = number(None, low=0, high=256)
    max_bad_fraction: float = number(0.01, low=0, high=1)
    field: str | None = choice(None, "speckle", "jets")  # whose statistics evaluate judges the images by


def array_file(source: Path, split: str) -> Path | None:
    """The .npy or .npz that a source means: the file itself, or <split>.npz / .npy in a folder."""
    if source.suffix in ARRAY_SUFFIXES:
        return source
    return next((f for s in (".npz", ".npy") if (f := source / f"{split}{s}").is_file()), None)


def _has(folder: Path, suffixes) -> bool:
    """Whether any file below has one of the suffixes; stops at the first."""
    return any(Path(name).suffix.lower() in suffixes for _, _, names in os.walk(folder) for name in names)


def source_kind(data: DataConfig) -> str:
    """builtin | arrays | parquet | images | hub. Raises InputError where it can be none of them."""
    path = Path(data.source).expanduser()
    if data.source in BUILT_IN:
        return "builtin"
    if path.is_file():
        if path.suffix in ARRAY_SUFFIXES:
            return "arrays"
        if path.suffix == ".parquet":
            return "parquet"
        raise InputError(f"data.source: {path} is neither .npy, .npz nor .parquet (for images name their folder)")
    if path.is_dir():
        if array_file(path, data.split):
            return "arrays"
        if _has(path, {".parquet"}):
            return "parquet"
        if _has(path, IMAGE_SUFFIXES):
            return "images"
        raise InputError(f"data.source: {path} holds no image, no .parquet and no {data.split}.npy or .npz")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", data.source) and not path.parent.is_dir():
        return "hub"
    near = difflib.get_close_matches(data.source, BUILT_IN, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"built in: {', '.join(BUILT_IN)}; a hub id reads owner/name"
    raise InputError(f"data.source: no such file or folder: {data.source} ({hint})")


def image_root(data: DataConfig) -> Path:
    """Where the images of a split are: in <split>/ if all sub-folders are named like splits, else in the folder itself."""
    place = Path(data.source).expanduser()
    folders = {p.name for p in place.iterdir() if p.is_dir()}
    if folders and folders <= SPLIT_FOLDERS:
        if data.split in folders:
            return place / data.split
        raise InputError(f"data.split: {place} has {', '.join(sorted(folders))}, not {data.split}")
    if data.split == "train":
        return place
    raise InputError(f"data.split: {place} is not divided into splits; there is no {data.split}")


def array_key(file) -> str:
    """The name of the images' array in an open .npz: x, or the only one there is."""
    names = [n.removesuffix(".npy") for n in file.namelist() if n.endswith(".npy")]
    if "x" in names:
        return "x"
    others = [n for n in names if n not in ("label", "labels", "y", "name")]
    if len(others) == 1:
        return others[0]
    raise InputError(f"data.source: {file.filename} holds the arrays {', '.join(names) or '(none)'}; name the images' array x")


def _array_header(path: Path) -> tuple[tuple[int, ...], object]:
    """Shape and dtype of the images' array, from its header alone."""
    from numpy.lib import format as npy

    def header(stream):
        version = npy.read_magic(stream)
        shape, _, dtype = npy.read_array_header_1_0(stream) if version == (1, 0) else npy.read_array_header_2_0(stream)
        return shape, dtype

    try:
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as file, file.open(f"{array_key(file)}.npy") as stream:
                return header(stream)
        with open(path, "rb") as stream:
            return header(stream)
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"data.source: {path} is not a readable array file ({' '.join(str(error).split())})") from None


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
    if data.resize == "patches" and kind != "arrays":
        raise InputError(f"data.resize: patches are cut from arrays (.npy, .npz); {data.source} is none")
    if data.split != "train" and (kind == "builtin" or Path(data.source).expanduser().is_file()):
        raise InputError(f"data.split: {data.source} is not divided into splits; there is no {data.split}")
    if kind == "builtin" and data.channels != (wanted := 3 if data.source == "jets" else 1):
        raise InputError(f"data.channels: the built-in {data.source} have {wanted}, not {data.channels}")
    if kind != "arrays":
        return
    path = array_file(Path(data.source).expanduser(), data.split)
    shape, dtype = _array_header(path)
    if dtype.kind not in "buif":
        raise InputError(f"data.source: {path} holds values of type {dtype}; images are real numbers")
    if channels_last(shape, data.channels) is None:
        raise InputError(f"data.channels: {data.channels}, but the array in {path} has the shape {shape} (N,H,W | N,C,H,W | N,H,W,C)")
    if shape[0] < 2:
        raise InputError(f"data.source: {path} holds {shape[0]} images; at least 2 are needed")
