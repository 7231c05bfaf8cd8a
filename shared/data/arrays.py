"""Arrays as sources: .npy and .npz, memory-mapped.

Values stay in the user's units. Does not depend on what is trained on them.
Dimension key: N images, C channels, H W pixels.
"""

import csv
import re
import shutil
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from shared.cache import cached
from shared.config import InputError, say
from shared.data.config import LABELS, DataConfig, array_file, array_key, channels_last, patch_steps
from shared.data.images import resize, resize_values
from shared.disk import path_of

NUMBERED = 16  # images, of which labels that hardly ever come twice are numbers of the images, and no classes


class ArraySource:
    """An array (N,H,W), (N,C,H,W) or (N,H,W,C), memory-mapped if it is a file; values keep their units."""

    per_group = 1
    files: np.ndarray | None = None
    resized = False  # whether values are, by more than zeros around them

    def __init__(
        self, x: np.ndarray, labels: np.ndarray | None, names: list[str], data: DataConfig, integer: bool
    ):
        self.x = x
        self.labels = labels
        self.names = names
        self.data = data
        self.integer = integer
        self.channel_names = [str(channel) for channel in range(data.channels)]
        self.last = channels_last(x.shape, data.channels)

    def __getstate__(self) -> dict:
        """For spawned loader processes: a memory-mapped array travels as its path, not as its values."""
        mapped = isinstance(self.x, np.memmap) and self.x.filename
        x = Path(str(getattr(self.x, "filename", ""))) if mapped else self.x
        return self.__dict__ | {"x": x}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state
        if isinstance(self.x, Path):
            self.x = load(self.x)

    def __len__(self) -> int:
        return len(self.x)

    def content(self, index: int) -> bytes:
        """The raw values, for the fingerprint."""
        return np.ascontiguousarray(self.x[index]).tobytes()

    def read(self, indices: list[int]) -> list[np.ndarray]:
        """Images (C,H,W), uint8 or float32."""
        return [self._planes(np.asarray(self.x[index])) for index in indices]

    def _planes(self, image: np.ndarray) -> np.ndarray:
        if image.ndim == 2:
            image = image[None]
        elif self.last:
            image = image.transpose(2, 0, 1)
        if image.dtype != np.uint8:
            image = image.astype(np.float32)
        if image.shape[1:] == self.data.size:
            return image
        if not self.integer:
            return resize_values(image, self.data)
        return np.stack([np.asarray(resize(Image.fromarray(plane), self.data)) for plane in image])


class PatchSource(ArraySource):
    """Patches of image_size, cut from every image of an array; one image stays in one split."""

    def __init__(
        self, x: np.ndarray, labels: np.ndarray | None, names: list[str], data: DataConfig, integer: bool
    ):
        super().__init__(x, None, names, data, integer)
        height, width = x.shape[1:3] if self.last else x.shape[2:4]
        if height < data.height or width < data.width:
            wanted = f"{data.height}x{data.width}"
            raise InputError(
                f"data.image_size: patches of {wanted} px cannot be cut from images of {height}x{width}"
            )
        down, across = patch_steps(len(x), (height, width), data.size)
        tops = range(0, height - data.height + 1, down)
        lefts = range(0, width - data.width + 1, across)
        self.corners = [(top, left) for top in tops for left in lefts]
        self.labels = None if labels is None else np.repeat(labels, len(self.corners))
        self.per_group = len(self.corners)

    def __len__(self) -> int:
        return len(self.x) * self.per_group

    def _cut(self, index: int) -> np.ndarray:
        image, corner = divmod(index, self.per_group)
        top, left = self.corners[corner]
        rows = slice(top, top + self.data.height)
        columns = slice(left, left + self.data.width)
        return np.asarray(self.x[image][rows, columns] if self.last else self.x[image][:, rows, columns])

    def content(self, index: int) -> bytes:
        return np.ascontiguousarray(self._cut(index)).tobytes()

    def read(self, indices: list[int]) -> list[np.ndarray]:
        return [self._planes(self._cut(index)) for index in indices]


# ---------------------------------------------------------------- opening


def open_array(data: DataConfig) -> ArraySource:
    """The array that a recipe names, whole or in patches. Raises InputError."""
    path = array_file(path_of(data.source), data.split)
    assert path is not None  # it made this source one of arrays
    labels = channel_names = None
    files: list[str] = []
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as file:
            if data.label_column == "auto":
                labels = _labels_within(path, file, data.split)
            elif data.label_column and f"{data.label_column}.npy" in file.namelist():
                labels = load(_unpacked(path, file, data.label_column))
            elif data.label_column:
                raise InputError(f"data.label_column: {path} has no array {data.label_column!r}")
            if "channel_names.npy" in file.namelist():
                channel_names = load(_unpacked(path, file, "channel_names"))
            path = _unpacked(path, file, array_key(file, data))
    else:
        table = _table_beside(path, data.label_column is not None)
        labels = _labels_beside(path, table, data.label_column)
        if labels is None and data.label_column == "auto":
            labels = _array_beside(path)
        files = [row.get("series") or row["file"] for row in table if row.get("file")]
    x = load(path)
    if labels is not None and labels.shape[:1] != x.shape[:1]:
        raise InputError(f"data.label_column: {len(x)} images, but {labels.size} labels")
    kind = PatchSource if data.resize == "patches" else ArraySource
    source = kind(x, *array_labels(labels, data), data, integer=x.dtype == np.uint8)
    if len(files) == len(x):
        source.files = np.unique(np.array(files), return_inverse=True)[1]
    if channel_names is not None:
        source.channel_names = _names_of(channel_names, data)
    height, width = x.shape[1:3] if source.last else x.shape[2:4]
    if kind is ArraySource and (height, width) != data.size:
        wanted = f"{data.height}x{data.width}"
        fits = height <= data.height and width <= data.width
        source.resized = not source.integer and not (data.resize == "pad" and fits)
        say(f"note: images of {height}x{width} become {wanted} (data.resize: {data.resize}, data.image_size)")
    return source


def _labels_within(path: Path, file: zipfile.ZipFile, split: str) -> np.ndarray | None:
    """The classes in an .npz: `label`, or words or whole numbers, one for each image, of another name."""
    for name in (f"{split}_labels", f"y_{split}", *LABELS):
        if f"{name}.npy" in file.namelist():
            found = load(_unpacked(path, file, name))
            if name == "label" or _are_classes(found):
                return found
            say(f"note: {path.name}: {name} is not a word or a whole number for each image: no classes")
    return None


def _are_classes(found: np.ndarray) -> bool:
    """Whether an array holds a word or a whole number for each image."""
    single = found.ndim == 1 or found.shape[1:] == (1,)
    return single and (found.dtype.kind in "biuUS" or (found.dtype.kind == "f" and not (found % 1).any()))


def _array_beside(path: Path) -> np.ndarray | None:
    """The classes beside an .npy of images: y.npy, as y_train.npy beside X_train.npy, or labels.npy."""
    own = [re.sub("images", "labels", path.stem), re.sub("^[Xx](?=_|$)", "y", path.stem)]
    for name in (*own, *LABELS):
        place = path.with_name(f"{name}.npy")
        if name == path.stem or not place.is_file():
            continue
        try:
            found = load(place)
        except InputError:  # such as objects: what is not asked for stops nobody
            continue
        if found.shape[:1] == load(path).shape[:1] and _are_classes(found):
            say(f"note: the classes of {path.name} are those of {place.name} (data.label_column=null: none)")
            return found
    return None


def _table_beside(path: Path, needed: bool) -> list[dict[str, str]]:
    """The rows of the .csv beside an .npy, one for each image, if there. Raises InputError if needed."""
    table = path.with_suffix(".csv")
    if not table.is_file():
        return []
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        if not needed:
            return []
        raise InputError(f"{table}: cannot be read ({error})") from None


def _labels_beside(path: Path, rows: list[dict[str, str]], column: str | None) -> np.ndarray | None:
    """The labels of an .npy: a column of the .csv beside it. Raises InputError."""
    table = path.with_suffix(".csv")
    if column is None or not table.is_file():
        if column not in (None, "auto"):
            raise InputError(f"data.label_column: there is no {table} with a column {column!r}")
        return None
    name = "label" if column == "auto" else column
    if not rows or name not in rows[0]:
        if column == "auto":
            return None
        found = ", ".join(rows[0]) if rows else "nothing"
        raise InputError(f"data.label_column: {table} has no column {column!r}, only {found}")
    values = [row[name] or "" for row in rows]
    if not all(values):
        where = f"{table}: row {values.index('') + 1}"
        raise InputError(f"data.label_column: {where} has no {name} (null for no classes)")
    for number, form in ((int, r"-?\d+"), (float, r"-?\d*\.?\d+(e-?\d+)?")):
        if all(re.fullmatch(form, value) for value in values):
            return np.array([number(value) for value in values])
    return np.array(values)


def _names_of(found: np.ndarray, data: DataConfig) -> list[str]:
    """The names of the channels, as an .npz gives them. Raises InputError."""
    names = [str(name) for name in found] if found.ndim == 1 else []
    if len(set(names)) != data.channels:
        raise InputError(
            f"data.source: channel_names of {data.source} must be {data.channels} different names, "
            f"one for each channel, not {found.tolist()}"
        )
    return names


def array_labels(labels: np.ndarray | None, data: DataConfig) -> tuple[np.ndarray | None, list[str]]:
    """Class numbers (N,) of the labels that stand beside an array, and their names; none where there are
    none."""
    if labels is None or data.label_column is None:
        return None, []
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if data.label_column == "auto" and labels.dtype.kind == "f" and (labels % 1).any():
        note_measured(data, "label")
        return None, []
    return numbered(labels, data)


def numbered(labels: np.ndarray, data: DataConfig) -> tuple[np.ndarray | None, list[str]]:
    """As classes_of; none, with a note, where nearly each image has a label of its own, unless asked for."""
    found = classes_of(labels)
    if data.label_column == "auto" and len(labels) >= NUMBERED and len(found[1]) > len(labels) / 2:
        reason = f"{len(found[1]):,} different labels of {len(labels):,} images are no classes"
        say(f"note: {data.source}: {reason} (data.label_column=NAME makes them some)")
        return None, []
    return found


def note_measured(data: DataConfig, column: str) -> None:
    """Say that numbers are not taken for classes unasked."""
    cure = f"data.label_column={column} makes a class of each of its values"
    say(f"note: {data.source}: the column {column} holds measured numbers, no classes ({cure})")


def classes_of(values: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Any labels as class numbers 0..K-1, in sorted order, and their names."""
    if values.ndim != 1 or values.dtype.kind not in "biufUS":
        found = f"{values.dtype} of shape {values.shape}"
        raise InputError(f"data.label_column: labels are one number or word for each image, not {found}")
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8")
    names, numbers = np.unique(values, return_inverse=True)
    end = ".0" if values.dtype.kind == "f" else ""
    return numbers.astype(np.int64), [str(name).removesuffix(end) for name in names]


def load(path: Path) -> np.ndarray:
    """The array of an .npy, mapped into memory; bytes become words. Raises InputError."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        return np.char.decode(found, "utf-8") if found.dtype.kind == "S" else found
    except (OSError, ValueError) as error:
        raise InputError(f"data.source: {path} is not a readable array file ({error})") from None


def _unpacked(path: Path, file: zipfile.ZipFile, name: str) -> Path:
    """An array of an .npz as a file of its own, which can be memory-mapped."""

    def write(target: Path) -> None:
        try:
            with file.open(f"{name}.npy") as packed, open(target, "wb") as plain:
                shutil.copyfileobj(packed, plain, 1 << 24)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise InputError(f"data.source: {path} is damaged ({error}); restore it from a copy") from None

    state = path.stat()
    return cached(f"{path.resolve()} {state.st_size} {state.st_mtime_ns} {name}", write)
