"""NumPy's .npy and .npz: an image, or some images, in each file."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shared.config import InputError, say
from shared.data.config import LABELS, npy_header
from shared.formats.parts import (
    Part,
    channels_of,
    choose,
    columns_of,
    labels_beside,
    named,
    portions,
    real,
    was_converted,
)

MOST_CHANNELS = 16  # of an image


def npy(paths: list[Path], wanted: str | None) -> list[Part]:
    """A part for each file: images (H,W), or n of them behind each other. Raises InputError.

    Files of three axes are images of some channels where all are alike and have few, else stacks. Of an .npz
    they are the array that is wanted by name, or the largest, and a label may stand beside it. Files of one
    axis, such as labels, hold no image: they are left, and so is what was converted before.
    """
    heads = {path: named(path, partial(_chosen, path, wanted)) for path in paths if not was_converted(path)}
    found = {path: head for path, head in heads.items() if head[1].ndim > 1}
    shapes = {chosen.shape for _, chosen in found.values()}
    one = next(iter(shapes)) if len(found) > 1 and len(shapes) == 1 else ()
    alone = len(one) == 3 and channels_of(*one) <= MOST_CHANNELS
    if alone:
        say(f"note: each of {len(found):,} files is taken for an image of {channels_of(*one)} channels")
    return [
        named(path, partial(_of_file, path, name, chosen, alone)) for path, (name, chosen) in found.items()
    ]


def _chosen(path: Path, wanted: str | None) -> tuple[str, Any]:
    """The name of a file's array, and one of its shape and type that holds nothing."""
    if path.suffix == ".npy":
        with open(path, "rb") as stream:
            return path.stem, _like(*npy_header(stream))
    heads = {}
    with np.load(path, allow_pickle=False) as file:
        for name in file.files:
            with file.zip.open(f"{name}.npy") as stream:
                heads[name] = _like(*npy_header(stream))
    labels_alone = bool(heads) and all(head.ndim < 2 for head in heads.values())
    return next(iter(heads.items())) if labels_alone and not wanted else choose(heads, wanted)


def _like(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.broadcast_to(np.empty((), dtype), shape)


def _of_file(path: Path, name: str, chosen: np.ndarray, alone: bool) -> Part:
    if chosen.ndim not in (2, 3, 4) or 0 in chosen.shape:
        raise InputError(f"an array of shape {chosen.shape}; an image is H,W or C,H,W or H,W,C")
    one = chosen.ndim == 2 or (chosen.ndim == 3 and alone)
    shape = (1, *chosen.shape) if one else chosen.shape
    columns = {}
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            labels = {label: np.atleast_1d(file[label]) for label in LABELS if label in file.files}
        columns = columns_of(labels_beside(labels, name, shape[0]))

    def read() -> Iterator[np.ndarray]:
        file = np.load(path, mmap_mode="r", allow_pickle=False)
        yield from portions(file if path.suffix == ".npy" else file[name], shape)

    return Part(path, shape, real(chosen.dtype), read, columns)
