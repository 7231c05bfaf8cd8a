"""TIFF: stacks of pages with any axes, of which Y and X are the slice and S or C its channels."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shared.config import InputError
from shared.formats.parts import Part, library, real


def tiff(path: Path) -> Part:
    """The pages of a file; of several series all, which must be alike. Raises InputError."""
    package = library("tifffile")
    with _strictly("tifffile"), package.TiffFile(path, _multifile=False) as file:
        series = file.series[0]
        axes, shape, dtype, many = series.axes, series.shape, real(series.dtype), len(file.series)
        if any((one.axes, one.shape, one.dtype) != (axes, shape, series.dtype) for one in file.series):
            raise InputError(f"{many} series of pages that differ in size or type; save each as a file")
        photometric = None if file.is_imagej else series.keyframe.photometric.name
    if photometric == "PALETTE":
        raise InputError("its pixels are places in a palette of colours; save it in grey or RGB")
    if photometric == "MINISWHITE" and dtype.kind != "u":
        raise InputError("its least value is white; save it with black as the least")
    colours = [axis for axis in axes if axis in "SC"]
    if len(colours) > 1 or not {"Y", "X"} <= set(axes):
        raise InputError(f"an image of the axes {axes}; slices are of Y and X, and of S or C")
    slices, image = [axis for axis in axes if axis not in "SCYX"], [*colours, "Y", "X"]
    order = [axes.index(axis) for axis in (*slices, *image)]
    tail = tuple(shape[axes.index(axis)] for axis in image)
    count = int(np.prod(shape, dtype=np.int64)) // int(np.prod(tail, dtype=np.int64))

    def read() -> Iterator[np.ndarray]:
        with _strictly("tifffile"), package.TiffFile(path, _multifile=False) as file:
            for number in range(many):
                values = file.series[number].asarray()
                if photometric == "MINISWHITE":  # turned round, as DICOM's are
                    values = ~values
                yield values.transpose(order).reshape(count, *tail)

    return Part(path, (many * count, *tail), dtype, read)


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
