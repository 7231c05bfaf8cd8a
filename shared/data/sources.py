"""Sources: index -> raw image, and how one is opened from what a recipe names. Nothing is ever decoded as a whole."""

import glob
import hashlib
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from shared.config import InputError, say
from shared.data import simulate
from shared.data.config import SIMULATED, DataConfig, array_file, array_key, channels_last, image_root, source_kind
from shared.data.images import MODES, decode, resize


class ImageSource:
    """Rows of a `datasets` table (hub, parquet or image folder); images are decoded when they are asked for."""

    integer = True
    per_group = 1  # rows in a row that must not be divided between the splits

    def __init__(self, table, data: DataConfig):
        import datasets

        self.data, self.bad = data, torch.zeros(len(table), dtype=torch.bool).share_memory_()  # one list for all loader processes
        self.column = next((n for n, f in table.features.items() if isinstance(f, datasets.Image)), None)
        if self.column is None:
            raise InputError(f"data.source: {data.source} has no image column (it has {', '.join(table.features)})")
        self.labels, self.names = _labels_of_table(table, data)
        self.table = table.select_columns([self.column]).cast_column(self.column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.table)

    def content(self, index: int) -> bytes:
        """The encoded image, for the fingerprint."""
        cell = self.table[index][self.column] or {"bytes": b"", "path": ""}
        return cell["bytes"] or (Path(cell["path"]).read_bytes() if Path(cell["path"] or "").is_file() else b"")

    def read(self, indices: list[int]) -> list[np.ndarray | None]:
        """Images (C,H,W); None in the place of one that cannot be read."""
        cells = self.table[indices][self.column]
        return [self._decode(index, cell) for index, cell in zip(indices, cells, strict=True)]

    def _decode(self, index: int, cell: dict | None) -> np.ndarray | None:
        path = cell["path"] if cell else None
        try:
            return decode(cell["bytes"] or path, self.data)
        except (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError) as error:
            self._note_bad(index, path, error)
        return None

    def _note_bad(self, index: int, path: str | None, error: Exception) -> None:
        if self.bad[index]:
            return
        self.bad[index] = True
        say(f"warning: {path or f'row {index}'} is not a readable image ({error}); taking the next one instead")
        if (count := int(self.bad.sum())) > self.data.max_bad_fraction * len(self):
            raise InputError(
                f"data.source: {count} of {len(self)} images cannot be read, the last is {path or f'row {index}'}; "
                f"data.max_bad_fraction allows {self.data.max_bad_fraction}"
            )


class ArraySource:
    """An array (N,H,W), (N,C,H,W) or (N,H,W,C), memory-mapped where it is a file; values stay in its own units."""

    per_group = 1

    def __init__(self, x: np.ndarray, labels: np.ndarray | None, names: list[str], data: DataConfig, integer: bool):
        self.x, self.labels, self.names, self.data, self.integer = x, labels, names, data, integer
        self.last = channels_last(x.shape, data.channels)

    def __getstate__(self) -> dict:
        """For loader processes that are spawned: a memory-mapped array travels as its path, not as its values."""
        mapped = isinstance(self.x, np.memmap) and self.x.filename
        return self.__dict__ | {"x": Path(self.x.filename) if mapped else self.x}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state
        self.x = _load(self.x) if isinstance(self.x, Path) else self.x

    def __len__(self) -> int:
        return len(self.x)

    def content(self, index: int) -> bytes:
        return np.ascontiguousarray(self.x[index]).tobytes()

    def read(self, indices: list[int]) -> list[np.ndarray]:
        return [self._one(np.asarray(self.x[i])) for i in indices]

    def _one(self, image: np.ndarray) -> np.ndarray:
        if image.ndim == 2:
            image = image[None]
        elif self.last:
            image = image.transpose(2, 0, 1)
        if image.dtype != np.uint8:
            image = image.astype(np.float32)
        size = self.data.image_size
        if image.shape[1:] == (size, size):
            return image
        return np.stack([np.asarray(resize(Image.fromarray(plane), self.data)) for plane in image])


class PatchSource(ArraySource):
    """Every image of an array cut into overlapping patches of image_size; patches of one image stay in one split."""

    def __init__(self, x: np.ndarray, labels: np.ndarray | None, names: list[str], data: DataConfig, integer: bool):
        super().__init__(x, None, names, data, integer)
        height, width = x.shape[1:3] if self.last else x.shape[2:4]
        size, stride = data.image_size, max(1, data.image_size // 4)
        if min(height, width) < size:
            raise InputError(f"data.image_size: patches of {size} px cannot be cut from images of {height}x{width}")
        self.corners = [(a, b) for a in range(0, height - size + 1, stride) for b in range(0, width - size + 1, stride)]
        self.labels = None if labels is None else np.repeat(labels, len(self.corners))
        self.per_group = len(self.corners)

    def __len__(self) -> int:
        return len(self.x) * self.per_group

    def _cut(self, index: int) -> np.ndarray:
        image, corner = divmod(index, self.per_group)
        top, left = self.corners[corner]
        rows, columns = slice(top, top + self.data.image_size), slice(left, left + self.data.image_size)
        return np.asarray(self.x[image][rows, columns] if self.last else self.x[image][:, rows, columns])

    def content(self, index: int) -> bytes:
        return np.ascontiguousarray(self._cut(index)).tobytes()

    def read(self, indices: list[int]) -> list[np.ndarray]:
        return [self._one(self._cut(i)) for i in indices]

Source = ImageSource | ArraySource


def open_source(data: DataConfig) -> Source:
    """The source that a recipe names. Raises InputError where it cannot be opened or has fewer than two images."""
    kind = source_kind(data)
    if kind == "builtin":
        return _digits(data) if data.source == "digits" else _simulated(data)
    if kind == "arrays":
        return _arrays(data)
    if data.channels not in MODES:
        raise InputError(f"data.channels: images have 1 to 4 channels, not {data.channels}")
    source = ImageSource(_table(data, kind), data)
    if len(source) < 2:
        raise InputError(f"data.source: {data.source} holds {len(source)} images; at least 2 are needed")
    return source


def _table(data: DataConfig, kind: str):
    import datasets

    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it tells a server of every folder of images that it opens
    place = data.source if kind == "hub" else str(Path(data.source).expanduser())
    if kind == "images":  # by pattern: left to itself the library takes a class `train` or a file `test.png` for a split
        where = {"path": "imagefolder", "data_files": {data.split: f"{glob.escape(str(image_root(data)))}/**"}}
    elif Path(place).is_file():
        where = {"path": "parquet", "data_files": place}
    else:
        where = {"path": place}
    try:
        return datasets.load_dataset(**where, split=data.split)
    except Exception as error:  # the library raises a dozen kinds, from HTTP errors to ValueError
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"data.source: {data.source}, split {data.split}, cannot be loaded ({type(error).__name__}: {reason})") from None


def _labels_of_table(table, data: DataConfig) -> tuple[np.ndarray | None, list[str]]:
    """Class numbers (N,) and class names of the label column."""
    column = "label" if data.label_column == "auto" else data.label_column
    if column is None or (data.label_column == "auto" and column not in table.features):
        return None, []
    if column not in table.features:
        raise InputError(f"data.label_column: {data.source} has no column {column!r} (it has {', '.join(table.features)}; null for none)")
    values, names = list(table[column]), getattr(table.features[column], "names", None)
    if any(value is None or value == -1 for value in values):
        raise InputError(f"data.label_column: {data.source}, split {data.split}, has images without a {column} (null for no classes)")
    return (np.asarray(values, np.int64), names) if names else _classes(np.asarray(values))


def _classes(values: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Any labels as class numbers 0..K-1, in sorted order, and their names."""
    if values.ndim != 1 or values.dtype.kind not in "biufUS":
        raise InputError(f"data.label_column: labels are one number or word for each image, not {values.dtype} of shape {values.shape}")
    names, numbers = np.unique(values, return_inverse=True)
    return numbers.astype(np.int64), [str(name) for name in names]


def _digits(data: DataConfig) -> ArraySource:
    """scikit-learn's 1,797 handwritten digits (8x8, 0..16), as grey levels at image_size."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = (bunch.images * (255 / 16)).astype(np.uint8)
    size = (data.image_size, data.image_size)
    x = np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in small])
    return ArraySource(x, *_array_labels(bunch.target, data), data, integer=True)


def _simulated(data: DataConfig) -> ArraySource:
    """The built-in speckle or jets: made once, kept in the user's cache folder, memory-mapped."""
    make = {"speckle": simulate.speckle, "jets": simulate.jet}[data.source]
    size = data.image_size

    def write(path: Path) -> None:
        x = np.lib.format.open_memmap(path, "w+", np.float32, (SIMULATED, data.channels, size, size))
        for index in tqdm(range(SIMULATED), unit="img", desc=f"simulating {data.source}"):
            x[index] = make(index, size)
        x.flush()

    version = hashlib.sha256(Path(simulate.__file__).read_bytes()).hexdigest()
    x = _load(_cached(f"{data.source} {size} {version}", write))
    labels = np.array(("gluon", "quark"))[np.arange(SIMULATED) % 2] if data.source == "jets" else None
    return ArraySource(x, *_array_labels(labels, data), data, integer=False)


def _array_labels(labels: np.ndarray | None, data: DataConfig) -> tuple[np.ndarray | None, list[str]]:
    return (None, []) if labels is None or data.label_column is None else _classes(labels)


def _arrays(data: DataConfig) -> ArraySource:
    path = array_file(Path(data.source).expanduser(), data.split)
    labels = None
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as file:
            column = "label" if data.label_column == "auto" else data.label_column
            if column and f"{column}.npy" in file.namelist():
                labels = _load(_unpacked(path, file, column))
            elif column and data.label_column != "auto":
                raise InputError(f"data.label_column: {path} has no array {column!r}")
            path = _unpacked(path, file, array_key(file))
    x = _load(path)
    if labels is not None and len(labels) != len(x):
        raise InputError(f"data.label_column: {len(x)} images, but {len(labels)} labels")
    kind = PatchSource if data.resize == "patches" else ArraySource
    return kind(x, *_array_labels(labels, data), data, integer=x.dtype == np.uint8)


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"data.source: {path} is not a readable array file ({error})") from None


def _unpacked(path: Path, file: zipfile.ZipFile, name: str) -> Path:
    """An array of an .npz as a file of its own, which can be memory-mapped."""

    def write(target: Path) -> None:
        with file.open(f"{name}.npy") as packed, open(target, "wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 24)

    return _cached(f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns} {name}", write)


def _cached(key: str, write) -> Path:
    """A file in the user's cache folder, made by `write(path)` where it is not there yet; whole or not at all."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "latent-stack"
    target = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npy"
    if not target.is_file():
        temporary = folder / f".tmp-{os.getpid()}-{target.name}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write(temporary)
            temporary.replace(target)
        except (OSError, zipfile.BadZipFile) as error:
            temporary.unlink(missing_ok=True)
            raise InputError(f"{target}: cannot be written ({error}); XDG_CACHE_HOME chooses another place") from None
    return target
