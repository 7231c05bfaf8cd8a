"""NumPy's .npy and .npz: an image, or some images, in each file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from shared.config import InputError
from shared.formats.parts import Part, choose, columns_of, in_blocks, labels_beside, real

MOST_CHANNELS = 16  # of an image of three axes; of more at both ends it is a stack of slices


def npy(path: Path, wanted: str | None) -> Part:
    """The images of a file: one (H,W), (C,H,W) or (H,W,C), or n of them. Raises InputError.

    Of an .npz they are the array that is wanted by name, or the largest; labels may stand beside it.
    """
    arrays = _arrays(path)
    name, chosen = choose(arrays, wanted if path.suffix == ".npz" else None)
    shape = _stacked(chosen.shape)
    labels = {other: np.atleast_1d(array) for other, array in arrays.items() if other != name}
    columns = columns_of(labels_beside(labels, name, shape[0]))

    def read() -> Iterator[np.ndarray]:
        yield from in_blocks(_arrays(path)[name], shape)

    return Part(path, shape, real(chosen.dtype), read, columns)


def _arrays(path: Path) -> dict[str, Any]:
    """By name; that of an .npy is mapped, not read."""
    file = np.load(path, mmap_mode="r", allow_pickle=False)
    return {path.stem: file} if isinstance(file, np.ndarray) else dict(file)


def _stacked(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(n,...) of an array of one image or of several. Raises InputError."""
    if len(shape) not in (2, 3, 4) or 0 in shape:
        raise InputError(f"an array of shape {shape}; an image is H,W or C,H,W or H,W,C")
    alone = len(shape) == 2 or (len(shape) == 3 and min(shape[0], shape[-1]) <= MOST_CHANNELS)
    return (1, *shape) if alone else shape
