"""What formats have in common: stacks of slices before they are read, arrays by name, errors that name files.

Dimension key: n slices, C channels, H W pixels.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shared.config import InputError
from shared.data.config import LABELS

AT_ONCE = 64  # slices that are read at once
HEAD = "file,slice"  # the first columns of a table


@dataclass
class Part:
    """The slices of one file before they are read."""

    path: Path
    shape: tuple[int, ...]  # (n,H,W), (n,C,H,W) or (n,H,W,C)
    dtype: np.dtype  # of the values in their units
    read: Callable[[], Iterator[np.ndarray]]  # the slices in their order, some at a time
    columns: dict[str, list] = field(default_factory=dict)  # what is known of each slice, n values by name

    def blocks(self) -> Iterator[np.ndarray]:
        """The slices in their order, some at a time. Raises InputError."""
        parts = self.read()
        while True:
            block = named(self.path, lambda: next(parts, None))
            if block is None:
                return
            yield block


def library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"{name} is needed to read this: pip install 'latent-stack[formats]'") from None


def named(path: Path, action: Callable[[], Any]) -> Any:
    """What the action returns; whatever a library says of a damaged file is one line that names it."""
    try:
        return action()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # each library has errors of its own
        said = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(f"{path}: cannot be read ({said})") from None


def real(dtype: np.dtype) -> np.dtype:
    """The type that values are kept in: as they are, but no wider than float32. Raises InputError."""
    if dtype.kind not in "buif":
        raise InputError(f"holds values of type {dtype}; images are real numbers")
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    return np.dtype(np.float32) if dtype.kind == "f" else dtype.newbyteorder("=")


def choose(arrays: Mapping[str, Any], wanted: str | None) -> tuple[str, Any]:
    """The array that holds the images. Raises InputError."""
    if wanted is not None:
        wanted = wanted.strip("/")
        if wanted not in arrays:
            raise InputError(f"--dataset: there is no {wanted!r}; there are {', '.join(arrays) or 'none'}")
        return wanted, arrays[wanted]
    found = {name: node for name, node in arrays.items() if node.ndim >= 2 and node.dtype.kind in "buif"}
    if not found:
        raise InputError(f"no array of images; it holds {', '.join(arrays) or 'nothing'}")
    sizes = {name: int(np.prod(node.shape, dtype=np.float64)) for name, node in found.items()}
    largest = max(sizes, key=lambda name: sizes[name])
    if sum(size == sizes[largest] for size in sizes.values()) > 1:
        raise InputError(f"--dataset: say which: {', '.join(found)}")
    return largest, found[largest]


def channels_of(first: int, middle: int, last: int) -> int:
    """Of (C,H,W) or (H,W,C): the one that leaves a square, else the one with fewer channels."""
    if (first == middle) != (middle == last):
        return last if first == middle else first
    return min(first, last)


def was_converted(array: Path) -> bool:
    """Whether an .npy was written by shared.convert: the table beside it says so."""
    table = array.with_suffix(".csv")
    if not table.is_file():
        return False
    with open(table, encoding="utf-8", errors="replace") as file:
        return file.readline().startswith(HEAD)


def portions(array: Any, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """The slices of an array, some at a time; one with an axis less than their shape is a single slice."""
    if len(array.shape) < len(shape):
        yield np.asarray(array[:])[None]
        return
    for first in range(0, shape[0], AT_ONCE):
        yield np.asarray(array[first : first + AT_ONCE])


def labels_beside(arrays: Mapping[str, Any], name: str, count: int) -> dict[str, Any]:
    """The labels of the images, by the column that they make: an array beside theirs, called so and as long.

    A y of floating-point numbers may be a coordinate: it stays y, and stack.py looks at all of them.
    """
    folder = name.rpartition("/")[0]
    for label in LABELS:
        node = arrays.get(f"{folder}/{label}".strip("/"))
        if node is not None and node.shape in ((count,), (count, 1)):
            return {"y" if label == "y" and node.dtype.kind == "f" else "label": node}
    return {}


def columns_of(labels: Mapping[str, Any]) -> dict[str, list]:
    """The columns of a table that arrays (n,) or (n,1) make."""
    columns = {name: np.asarray(values[:]).reshape(-1).tolist() for name, values in labels.items()}
    return {
        name: [value.decode() if isinstance(value, bytes) else value for value in values]
        for name, values in columns.items()
    }
