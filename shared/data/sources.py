"""Sources: index -> raw image, and how to open what a recipe names. Nothing is ever decoded as a whole.

Raw values leave this file as they are in the user's units (grey levels 0..255 for images). Does not depend on
what is trained on them. Dimension key: N images, C channels, H W pixels.
"""

import contextlib
import functools
import glob
import os
import re
import struct
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from shared import disk
from shared.cache import cached
from shared.config import DISK_ERRORS, InputError, say
from shared.data import arrays, simulate
from shared.data.config import (
    IMAGE_SUFFIXES,
    LABELS,
    METADATA,
    OTHER_IMAGES,
    SPLIT_FOLDERS,
    DataConfig,
    image_root,
    inspect_source,
    source_kind,
)
from shared.data.images import Decoder
from shared.folders import folders_of, linked_folders, names_below, uppermost, without_ending
from shared.sampling.transforms import MODES

SAID = (*LABELS, "class", "target")  # names of columns in which whole floating-point numbers are classes
LISTS, FEW_LISTS = (".csv", ".tsv", ".json", ".jsonl"), 3  # files that may say what images show
SIMULATED = 10_000  # images of a simulated set; any of them is made when it is asked for
# What Pillow raises of damaged files, their EXIF data among them.
UNREADABLE = (
    OSError, ValueError, SyntaxError, TypeError, LookupError, ArithmeticError, EOFError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip


class ImageSource:
    """Rows of a `datasets` table (hub, parquet, saved or image folder); images are decoded when asked for."""

    integer = True
    resized = False
    per_group = 1  # neighbouring rows that must not be divided between the splits
    files: np.ndarray | None = None  # of which file an image is a slice; of one file all or none are held out

    def __init__(self, table: Any, data: DataConfig):
        import datasets

        self.data = data
        self.decode = Decoder(data, len(table))
        self.channel_names = [str(channel) for channel in range(data.channels)]
        self.bad = torch.zeros(len(table), dtype=torch.bool)
        with contextlib.suppress(RuntimeError):  # where nothing can be shared there are no loaders
            self.bad.share_memory_()  # one list for all loader processes
        self.column = _image_column(table, data)
        self.labels, self.names = _labels_of_table(table, data)
        self.table = table.select_columns([self.column]).cast_column(
            self.column, datasets.Image(decode=False)
        )

    def __len__(self) -> int:
        return len(self.table)

    def content(self, index: int) -> bytes:
        """The encoded image, for the fingerprint; empty where there is none."""
        cell = self.table[index][self.column] or {"bytes": b"", "path": ""}
        if cell["bytes"]:
            return cell["bytes"]
        path = Path(cell["path"] or "")
        return path.read_bytes() if path.is_file() else b""

    def read(self, indices: list[int]) -> list[np.ndarray | None]:
        """Images (C,H,W); None for one that cannot be read."""
        cells = self.table[indices][self.column]
        return [self._decode(index, cell) for index, cell in zip(indices, cells, strict=True)]

    def _decode(self, index: int, cell: dict | None) -> np.ndarray | None:
        cell = cell or {"bytes": None, "path": None}
        try:
            return self.decode(index, cell["bytes"] or cell["path"] or b"")
        except UNREADABLE as error:
            self._note_bad(index, cell["path"] or f"row {index}", error)
        return None

    def _note_bad(self, index: int, name: str, error: Exception) -> None:
        if self.bad[index]:
            return
        self.bad[index] = True
        say(f"warning: {name} is not a readable image ({error}); taking the next one instead")
        count = int(self.bad.sum())
        if count > self.data.max_bad_fraction * len(self):
            raise InputError(
                f"data.source: {count} of {len(self)} images cannot be read, the last is {name}; "
                f"data.max_bad_fraction allows {self.data.max_bad_fraction}"
            )


Source = ImageSource | arrays.ArraySource


# ---------------------------------------------------------------- opening a source


def _image_column(table: Any, data: DataConfig) -> str:
    import datasets

    columns = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    columns += [name for name, kind in table.features.items() if _holds_files(kind)]
    if not columns:
        found = ", ".join(table.features)
        cure = "images are encoded files; save arrays as an .npz of x (N,C,H,W) and label"
        raise InputError(f"data.source: {data.source} has no image column (it has {found}): {cure}")
    return columns[0]


def _holds_files(kind: Any) -> bool:
    """Whether a column holds encoded files, as tables hold them that other libraries wrote."""
    if isinstance(kind, dict):
        return kind.keys() == {"bytes", "path"}
    return getattr(kind, "dtype", "") in ("binary", "large_binary")


def open_source(data: DataConfig) -> Source:
    """The source a recipe names. Raises InputError if it cannot be opened or has fewer than two images."""
    inspect_source(data)
    kind = source_kind(data)
    if kind == "builtin":
        return builtin(data)
    if kind == "arrays":
        return arrays.open_array(data)
    if data.channels not in MODES:
        raise InputError(f"data.channels: images have 1 to 4 channels, not {data.channels}")
    source = ImageSource(open_table(data, kind), data)
    if len(source) < 2:
        raise InputError(f"data.source: {data.source} holds {len(source)} images; at least 2 are needed")
    return source


# ---------------------------------------------------------------- built in


def builtin(data: DataConfig) -> arrays.ArraySource:
    """The set of this name that is built in."""
    return _digits(data) if data.source == "digits" else _simulated(data)


def _digits(data: DataConfig) -> arrays.ArraySource:
    """scikit-learn's 1,797 handwritten digits (8x8, 0..16), as grey levels at image_size."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = (bunch.images * (255 / 16)).astype(np.uint8)
    size = (data.width, data.height)
    x = np.stack(
        [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in small]
    )
    return arrays.ArraySource(x, *arrays.array_labels(bunch.target, data), data, integer=True)


def _simulated(data: DataConfig) -> arrays.ArraySource:
    """The built-in speckle or jets: made once, kept in the user's cache folder, memory-mapped."""
    make = {"speckle": simulate.speckle, "jets": simulate.jet}[data.source]
    size = data.height

    def write(path: Path) -> None:
        bar = tqdm(range(SIMULATED), unit="img", desc=f"simulating {data.source}")
        shape = (SIMULATED, data.channels, size, size)
        disk.write_npy(path, np.dtype("<f4"), shape, (make(index, size) for index in bar))

    version = disk.sha256(Path(simulate.__file__))
    x = arrays.load(cached(f"{data.source} {size} {version}", write))
    labels = np.array(("gluon", "quark"))[np.arange(SIMULATED) % 2] if data.source == "jets" else None
    return arrays.ArraySource(x, *arrays.array_labels(labels, data), data, integer=False)


# ---------------------------------------------------------------- images


def open_table(data: DataConfig, kind: str) -> Any:
    """The `datasets` table of a hub id, a folder of images, a saved one or parquet. Raises InputError."""
    import datasets

    datasets.disable_progress_bars()
    # Counting downloads would tell a server of every folder of images that is opened.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    place = data.source if kind == "hub" else str(disk.path_of(data.source))
    count = 0
    where: dict[str, Any] = {"path": place} | ({"revision": data.revision} if data.revision else {})
    if (
        kind == "images"
    ):  # by pattern: left to itself the library takes a class `train` or a file `test.png` for a split
        root = image_root(data)
        folders = [glob.escape(str(folder)) for folder in (root, *linked_folders(root))]
        patterns, count = _patterns(data)
        files = [f"{folder}/{pattern}" for folder in folders for pattern in patterns]
        where = {"path": "imagefolder", "data_files": {data.split: files}}
    elif Path(place).is_file():
        where = {"path": "parquet", "data_files": glob.escape(place)}
    try:
        if kind == "saved":
            table = datasets.load_from_disk(place)
        else:
            table = datasets.load_dataset(**where, split=data.split)
    except Exception as error:  # the library raises a dozen kinds, from HTTP errors to ValueError
        cause = error.__cause__ or error  # of a failure on the way it says only that there was one
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
        if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
            reason += "; HF_HOME=FOLDER chooses where the library keeps its tables"
        raise InputError(
            f"data.source: {data.source}, split {data.split}, cannot be loaded ({reason})"
        ) from None
    if kind == "saved":
        return _split_of(table, data)
    if kind == "images" and len(table) < count:
        missing = f"{count - len(table):,} of {count:,} images are in no row of its metadata: left out"
        _say_once(f"note: {data.source}: {missing}")
    if kind == "images" and not count and data.label_column in ("auto", "label"):
        return _with_classes(table, data)
    return table


def _split_of(saved: Any, data: DataConfig) -> Any:
    """A split of what Dataset.save_to_disk or DatasetDict.save_to_disk wrote."""
    tables = saved if isinstance(saved, dict) else {"train": saved}
    if data.split not in tables:
        raise InputError(f"data.split: {data.source} has {', '.join(tables)}, not {data.split}")
    return tables[data.split].with_format(None)


@functools.cache
def _say_once(line: str) -> None:
    """A plan opens its source several times."""
    say(line)


def _patterns(data: DataConfig) -> tuple[list[str], int]:
    """What the library is to look for below a folder, and how many images its metadata should list; 0: none.

    All files, but only images and metadata where there are others that the library would take for images: a
    `photo.jpg.json` beside a photo, what a .zip holds.
    """
    names = list(names_below(image_root(data)))
    images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    other = sum(name.lower().endswith(OTHER_IMAGES) for name in names)
    if other:
        _say_once(f"note: {data.source}: left out are {other:,} HEIC, AVIF or JPEG XL: save them as JPEG")
    nameless = without_ending(names)
    if 20 * len(nameless) > len(images):
        cure = f"rename them if they are images, as {nameless[0]} to {nameless[0]}.jpg"
        _say_once(f"note: {data.source}: left out are {len(nameless):,} files of no known ending: {cure}")
    tables = METADATA & set(names)
    lists = [name for name in names if name.lower().endswith(LISTS)]
    if lists and not tables and len(lists) <= FEW_LISTS:
        cure = "what is known of images is read from metadata.csv, beside them, with a column file_name"
        _say_once(f"note: {data.source}: {lists[0]} is not read: {cure}")
    listed = len(images) if tables else 0
    others = set(names) - set(images)
    ends = {suffix for name in others for suffix in Path(name.lower()).suffixes[-2:]}
    if not ends & {*IMAGE_SUFFIXES, ".zip"}:
        return ["**"], listed
    wanted = sorted({f"*{Path(name).suffix}" for name in images} | tables)
    return [f"**/{name}" for name in wanted], listed


def _with_classes(table: Any, data: DataConfig) -> Any:
    """The library takes sub-folders for classes where all images lie equally deep: the innermost ones.

    Where they do not, or these are splits (cats/train), classes are the folders directly below, as of
    torchvision's ImageFolder, if all images lie in one of several.
    """
    labels = getattr(table.features.get("label"), "names", [])
    given = table.features.keys() - {"image"}
    if given and not (given == {"label"} and labels and _are_splits(labels)):
        _note_masks(data, labels)
        return table
    root = Path(os.path.abspath(image_root(data)))
    if not folders_of(root):  # or each of many files would be asked where it lies
        return table
    import datasets

    files = table.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    found = uppermost(files.with_format("arrow")[:]["image"].combine_chunks().field("path").to_pylist(), root)
    if len(set(found)) > 1 and "" not in found and not _are_splits(found):
        why = f"{', '.join(labels)} are splits" if labels else "its images lie at several depths"
        _say_once(f"note: {data.source}: classes by the folders directly in it, for {why}")
        _note_masks(data, set(found))
        return table.select_columns(["image"]).add_column("label", found)
    if labels and data.label_column == "auto":
        which = ", ".join(labels)
        _say_once(f"note: {data.source}: no classes, for {which} are splits; name one to train on it")
    elif "" in found and len(set(found)) > 2:
        cure = "move the others into one, or say the classes in a metadata.csv"
        _say_once(f"note: {data.source}: no classes, for not all images lie in its sub-folders: {cure}")
    return table if data.label_column == "label" else table.select_columns(["image"])


def _are_splits(names: Collection[str]) -> bool:
    return {name.lower().rstrip("0123456789") for name in names} <= SPLIT_FOLDERS


def _note_masks(data: DataConfig, classes: Collection[str]) -> None:
    """Of a set made for segmentation, masks would be drawn as pictures."""
    masks = [
        name for name in classes if re.fullmatch(r"(.*[_-])?(masks?|labels?|annotations?)", name.lower())
    ]
    if masks:
        cure = "if it holds no pictures, name the folder of these"
        _say_once(f"note: {data.source}: {masks[0]} is a class; {cure}")


def are_whole(different: Any) -> bool:
    """Whether the values of an Arrow column, each once, are whole numbers, or missing."""
    return all(value is None or value % 1 == 0 for value in different.to_pylist())


def _labels_of_table(table: Any, data: DataConfig) -> tuple[np.ndarray | None, list[str]]:
    """Class numbers (N,) and class names of the label column."""
    column = "label" if data.label_column == "auto" else data.label_column
    if column is None or (data.label_column == "auto" and column not in table.features):
        return None, []
    if column not in table.features:
        found = ", ".join(table.features)
        cure = f"it has {found}; null for none; of a folder of images a metadata.csv may have others"
        raise InputError(f"data.label_column: {data.source} has no column {column!r} ({cure})")
    kind = str(getattr(table.features[column], "dtype", ""))
    cells = table.select_columns([column]).with_format("arrow")[:][column]  # as a whole: no object per row
    if data.label_column == "auto" and kind.startswith(("float", "double")) and not are_whole(cells.unique()):
        arrays.note_measured(data, column)
        return None, []
    names = getattr(table.features[column], "names", None)
    values = cells.to_numpy(zero_copy_only=False)
    if cells.null_count or (names and (values == -1).any()):  # as the hub's test splits have it
        where = f"{data.source}, split {data.split}"
        raise InputError(f"data.label_column: {where}, has images without a {column} (null for no classes)")
    if values.dtype == object and all(isinstance(value, str) for value in values):
        values = values.astype(str)
    return (values.astype(np.int64), names) if names else arrays.numbered(values, data)
