"""Images and arrays -> batches of raw pixels (B,C,H,W), labels and rows; nothing is ever decoded as a whole.

Knows sources, colour modes, resizing, the split and the order of batches. Refuses to know what is trained on them.
Raw values leave this file as they are in the user's units (grey levels 0..255 for images); the value transform turns
them into [-1, 1] on the device.
Dimension key: N images, B batch, C channels, H = W = image_size.
"""

import atexit
import functools
import glob
import hashlib
import io
import multiprocessing
import os
import shutil
import signal
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from shared import simulate
from shared.config import InputError, say
from shared.data_config import SIMULATED, DataConfig, array_file, array_key, channels_last, image_root, source_kind
from shared.train_config import TrainConfig
from shared.transforms import ValueTransform

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


# ---------------------------------------------------------------- one image


def decode(content: bytes | str, data: DataConfig) -> np.ndarray:
    """An encoded image (bytes or a path) as grey levels 0..255, (C,H,W): uint8, or float32 from a 16-bit file.

    Turned upright by its EXIF tag; transparency is laid on white unless the recipe keeps an alpha channel.
    """
    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as file:
        image = ImageOps.exif_transpose(file)
        deep = image.mode.startswith("I") or image.mode == "F"
        planes = _deep(image, data.channels) if deep else _to_mode(image, data.channels).split()
    return np.stack([np.asarray(resize(plane, data)) for plane in planes])  # (C,H,W)


def _deep(image: Image.Image, channels: int) -> list[Image.Image]:
    """The planes of a 16-bit grey image as floats on the scale of 8 bits: 65535 becomes 255; alpha is opaque."""
    values = np.asarray(image).astype(np.float32)
    grey = Image.fromarray(values / np.float32(257 if image.mode != "F" else 1))
    alpha = [Image.new("F", image.size, 255)] if channels in (2, 4) else []
    return [grey] * (channels - len(alpha)) + alpha


def _to_mode(image: Image.Image, channels: int) -> Image.Image:
    if "transparency" in image.info or image.mode in ("LA", "PA", "La"):
        image = image.convert("RGBA")
    if image.mode == "RGBA" and channels in (1, 3):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(MODES[channels])


def resize(image: Image.Image, data: DataConfig) -> Image.Image:
    """To image_size x image_size: crop (short side fits, centre kept), stretch, or pad (never enlarged, zeros around)."""
    size = (data.image_size, data.image_size)
    if image.size == size:
        return image
    if data.resize == "stretch":
        return image.resize(size, Image.Resampling.BICUBIC)
    if data.resize == "crop":
        return ImageOps.fit(image, size, Image.Resampling.BICUBIC)
    if max(image.size) > data.image_size:
        image = ImageOps.contain(image, size, Image.Resampling.BICUBIC)
    framed = Image.new(image.mode, size)
    framed.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return framed


# ---------------------------------------------------------------- sources: index -> raw image


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


# ---------------------------------------------------------------- opening a source


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


# ---------------------------------------------------------------- splits and batches


class Pixels(Dataset):
    """One split of a source: raw images and labels by position."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices, self.num_workers = source, indices, source.data.num_workers

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, positions: list[int]) -> dict[str, torch.Tensor]:
        """Raw pixels (B,C,H,W), uint8 or float32, and class numbers (B,) where the source has them."""
        indices = self.indices[positions]
        images = self.source.read(indices.tolist())
        for row in [row for row, image in enumerate(images) if image is None]:
            indices[row], images[row] = self._next_readable(positions[row])
        batch = {"raw": torch.from_numpy(np.stack(images))}
        if self.source.labels is not None:
            batch["label"] = torch.from_numpy(self.source.labels[indices])
        return batch

    def _next_readable(self, position: int) -> tuple[int, np.ndarray]:
        """In the place of an image that cannot be read, the next of the same split that can, under its own label."""
        for offset in range(1, len(self)):
            index = int(self.indices[(position + offset) % len(self)])
            if (image := self.source.read([index])[0]) is not None:
                return index, image
        raise InputError(f"data.source: {self.source.data.source} has no readable image")


def split(source: Source, data: DataConfig) -> tuple[Pixels, Pixels]:
    """Train and validation parts, disjoint, the same in every run whatever its seed; patches of an image stay together."""
    group = source.per_group
    order = np.random.default_rng(0).permutation(len(source) // group)[: data.limit]
    held_out = min(max(1, round(len(order) * data.val_fraction)), len(order) - 1)
    parts = (np.sort(order[held_out:]), np.sort(order[:held_out]))
    train, val = ((part[:, None] * group + np.arange(group)).ravel() for part in parts)
    return Pixels(source, train), Pixels(source, val)


def evenly(length: int, count: int) -> list[int]:
    """At most `count` positions, evenly spaced over a split: sources are often sorted by class."""
    return np.linspace(0, length - 1, min(count, length)).astype(int).tolist()


def whole(source: Source) -> Pixels:
    """All images of a source in their order."""
    return Pixels(source, np.arange(len(source)))


def identity(pixels: Pixels, data: DataConfig) -> dict:
    """What makes these data these data: how they are read, how many, and a hash of 64 of them."""
    digest = hashlib.sha256(np.ascontiguousarray(pixels.indices).tobytes())
    if pixels.source.labels is not None:
        digest.update(np.ascontiguousarray(pixels.source.labels[pixels.indices]).tobytes())
    for position in np.linspace(0, len(pixels) - 1, 64).astype(int):
        digest.update(pixels.source.content(int(pixels.indices[position])))
    return {
        "image_size": data.image_size, "channels": data.channels, "resize": data.resize,
        "images": len(pixels), "content": digest.hexdigest()[:32],
    }  # fmt: skip


def fit_transform(pixels: Pixels, data: DataConfig) -> ValueTransform:
    """The value transform of a recipe; bounds that it leaves open are measured on this split (the training split)."""
    wanted = data.value_transform
    if wanted.kind == "auto":
        wanted = replace(wanted, kind="range", low=0.0, high=255.0) if pixels.source.integer else replace(wanted, kind="minmax")
    low, high = wanted.low, wanted.high
    if low is None or high is None:
        seen_low, seen_high = _bounds(pixels)
        low, high = seen_low if low is None else low, seen_high if high is None else high
    if wanted.kind in ("log1p", "sqrt") and low < 0:
        raise InputError(f"data.value_transform.kind: {wanted.kind} is for values >= 0, the data go down to {low:g}")
    if not low < high:
        raise InputError(f"data.value_transform: all values are {low:g}; nothing to learn from")
    return ValueTransform(wanted.kind, low, high, wanted.scale, pixels.source.integer)


def _bounds(pixels: Pixels) -> tuple[float, float]:
    low, high = np.inf, -np.inf
    for start in range(0, len(pixels), 256):
        raw = pixels.__getitems__(list(range(start, min(start + 256, len(pixels)))))["raw"]
        if not raw.isfinite().all():
            name = pixels.source.data.source
            raise InputError(f"data.source: {name} holds NaN or infinite values (images {start} to {start + len(raw) - 1} of its split)")
        low, high = min(low, raw.min().item()), max(high, raw.max().item())
    return float(low), float(high)


@dataclass
class BatchOrder:
    """Which images each step sees: positions of an endless row of permutations, a new one for each epoch.

    A pure function of (seed, step): a resume needs nothing stored, and every image is seen equally often, also where
    there are fewer images than a batch has.
    """

    count: int
    batch_size: int
    seed: int

    def __post_init__(self):
        self._permutation = functools.lru_cache(2)(lambda epoch: np.random.default_rng([self.seed, epoch]).permutation(self.count))

    def __call__(self, step: int) -> np.ndarray:
        """Positions (batch_size,) of the global batch of a step."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, within = places // self.count, places % self.count
        return np.concatenate([self._permutation(int(e))[within[epochs == e]] for e in np.unique(epochs)])


class _Shares:
    """The micro-batches of one process, as lists (start, stop, positions) for a DataLoader."""

    def __init__(self, order: BatchOrder, config: TrainConfig, start: int, stop: int, rank: int, processes: int):
        self.order, self.steps, self.rank, self.processes = order, range(start, stop), rank, processes
        self.parts = config.grad_accumulation
        self.rows, rest = divmod(config.batch_size, self.parts * processes)
        if rest:
            raise InputError(
                f"batch_size: {config.batch_size} cannot be shared out over {processes} processes x "
                f"{self.parts} micro-batches; take a multiple of {self.parts * processes}"
            )

    def __iter__(self):
        for step in self.steps:
            positions = self.order(step)
            for part in range(self.parts):
                first = (part * self.processes + self.rank) * self.rows
                yield [(first, first + self.rows, positions[first : first + self.rows])]

    def __len__(self) -> int:
        return len(self.steps) * self.parts


class _Fetch(Dataset):
    """Turns a share (start, stop, positions) into a batch that knows its rows of the global batch."""

    def __init__(self, data: Dataset):
        self.data, self.num_workers = data, data.num_workers

    def __getitems__(self, shares: list) -> dict:
        start, stop, positions = shares[0]
        return self.data.__getitems__(positions) | {"rows": slice(start, stop)}


def _workers(data: Dataset, accelerator) -> int:
    """Loader processes: as the data say; left open, one per core on a GPU machine and none on a CPU, where the
    trainer itself needs every core."""
    if data.num_workers is not None:
        return data.num_workers
    return min(8, (os.cpu_count() or 1) // accelerator.num_processes) if accelerator.device.type == "cuda" else 0


def _loader(data: Dataset, batch_sampler, accelerator) -> DataLoader:
    workers, pin = _workers(data, accelerator), accelerator.device.type == "cuda"
    if workers:
        _end_loaders_at_exit()
    return DataLoader(
        data, batch_sampler=batch_sampler, collate_fn=_as_it_is, num_workers=workers, pin_memory=pin, worker_init_fn=_leave_signals
    )


def _as_it_is(batch: dict) -> dict:
    return batch


def _leave_signals(worker: int) -> None:
    """A loader process leaves signals to the trainer, which still needs batches until it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@functools.cache
def _end_loaders_at_exit() -> None:
    """Otherwise a program that ends in an error waits for ever: Python's own farewell to them is the SIGTERM they leave to it."""

    def end() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch takes the death of a loader for an accident
        for child in multiprocessing.active_children():
            child.kill()

    atexit.register(end)


def batches(data: Dataset, config: TrainConfig, seed: int, start: int, stop: int, accelerator):
    """An iterator over this process's micro-batches of the steps start..stop-1."""
    order = BatchOrder(len(data), config.batch_size, seed)
    shares = _Shares(order, config, start, stop, accelerator.process_index, accelerator.num_processes)
    return iter(_loader(_Fetch(data), shares, accelerator))


def in_order(data: Dataset, rows: Sequence[int], batch_size: int, accelerator) -> DataLoader:
    """Some rows of a data set once, in their order, `batch_size` at a time."""
    shares = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    return _loader(data, [list(share) for share in shares], accelerator)
