"""NumPy's .npy and .npz: an image, or some images, in each file."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shared.config import InputError, say
from shared.data.config import LABELS, npy_header
from shared.formats.parts import Part, choose, columns_of, in_blocks, labels_beside, named, real

MOST_CHANNELS = 16  # of an image


def npy(paths: list[Path], wanted: str | None) -> list[Part]:
    """A part for each file: images (H,W), or n of them behind each other. Raises InputError.

    Arrays of three axes are images of some channels where all files are alike and an end is short, else
    stacks. Of an .npz they are the array that is wanted by name, or the largest, and a label may stand beside
    it. A file of one axis holds no image: it is left.
    """
    found = {path: named(path, partial(_chosen, path, wanted)) for path in paths}
    shapes = {chosen.shape for _, chosen in found.values() if chosen.ndim == 3}
    ends = [end for shape in shapes for end in (shape[0], shape[-1])]
    alone = len(found) > 1 and len(shapes) == 1 and min(ends) <= MOST_CHANNELS
    if alone:
        say(f"note: each of {len(found):,} files is taken for an image of {min(ends)} channels")
    return [
        named(path, partial(_of_file, path, name, chosen, alone))
        for path, (name, chosen) in found.items()
        if chosen.ndim > 1
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
    return choose(heads, wanted)


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
        yield from in_blocks(file if path.suffix == ".npy" else file[name], shape)

    return Part(path, shape, real(chosen.dtype), read, columns)
