"""TIFF: stacks of pages with any axes, of which Y and X are the slice and S or C its channels."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shared.config import InputError
from shared.formats.parts import Part, library, real


def tiff(path: Path) -> Part:
    """The pages of a file's first series. Raises InputError."""
    package = library("tifffile")
    with _strictly("tifffile"), package.TiffFile(path) as file:
        series = file.series[0]
        axes, shape, dtype = series.axes, series.shape, real(series.dtype)
    colours = [axis for axis in axes if axis in "SC"]
    if len(colours) > 1 or not {"Y", "X"} <= set(axes):
        raise InputError(f"an image of the axes {axes}; slices are of Y and X, and of S or C")
    slices, image = [axis for axis in axes if axis not in "SCYX"], [*colours, "Y", "X"]
    order = [axes.index(axis) for axis in (*slices, *image)]
    tail = tuple(shape[axes.index(axis)] for axis in image)
    count = int(np.prod(shape, dtype=np.int64)) // int(np.prod(tail, dtype=np.int64))

    def read() -> Iterator[np.ndarray]:
        with _strictly("tifffile"):
            values = package.imread(path, series=0)
        yield values.transpose(order).reshape(count, *tail)

    return Part(path, (count, *tail), dtype, read)


@contextlib.contextmanager
def _strictly(name: str) -> Iterator[None]:
    """Of a damaged file some libraries only log what is wrong: that is raised."""
    said: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    before, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
    if said:
        raise InputError(f"cannot be read ({' '.join(said[0].split())[:160]})")
