"""DICOM: series of files of a scanner, in their order along the patient, rescaled to their units.

Nothing of a file but its pixels, its place and its series is taken over. Dimension key: n slices, H W pixels.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shared.formats.parts import Part, library, named


def dicom(paths: list[Path]) -> list[Part]:
    """One part for each series, its slices in their order along the patient. Values are rescaled."""
    pydicom = library("pydicom")
    series: dict[tuple, list[tuple[float, Path, Any]]] = {}
    for path in paths:
        head = named(path, partial(pydicom.dcmread, path, stop_before_pixels=True))
        if "Rows" not in head or "Columns" not in head:
            continue  # a report or a directory: no picture
        colours = int(head.get("SamplesPerPixel", 1))
        sides = (int(head.Rows), int(head.Columns), *([colours] if colours > 1 else []))
        key = (path.parent, str(head.get("SeriesInstanceUID", "")), sides)
        series.setdefault(key, []).append((_place(head), path, head))
    return [_of_series(pydicom, key[2], sorted(found, key=_order)) for key, found in series.items()]


def _order(found: tuple[float, Path, Any]) -> tuple[float, Path]:
    return found[:2]


def _place(head: Any) -> float:
    """Where a slice lies along the normal of its plane, in mm; else its number in the series."""
    position, orientation = head.get("ImagePositionPatient"), head.get("ImageOrientationPatient")
    if position and orientation:
        row, column = np.asarray(orientation, float).reshape(2, 3)
        return float(np.dot(np.cross(row, column), np.asarray(position, float)))
    return float(head.get("InstanceNumber") or 0)


def _of_series(pydicom: Any, sides: tuple[int, ...], found: list[tuple[float, Path, Any]]) -> Part:
    frames = [int(head.get("NumberOfFrames", 1) or 1) for _, _, head in found]
    scaled = any("RescaleSlope" in head or "ModalityLUTSequence" in head for _, _, head in found)
    signed = any(head.get("PixelRepresentation", 0) for _, _, head in found)
    bits = max(int(head.get("BitsAllocated", 16)) for _, _, head in found)
    dtype = np.dtype(np.float32 if scaled else f"{'i' if signed else 'u'}{bits // 8}")

    def read() -> Iterator[np.ndarray]:
        for _, path, _ in found:
            values = named(path, partial(_pixels, pydicom, path))
            yield values.reshape(-1, *sides)

    shape = (sum(frames), *sides)
    places = [place for (place, _, _), count in zip(found, frames, strict=True) for _ in range(count)]
    return Part(found[0][1], shape, dtype, read, {"position": places})


def _pixels(pydicom: Any, path: Path) -> np.ndarray:
    """The values of a file in their units."""
    whole = pydicom.dcmread(path)
    return library("pydicom.pixels").apply_modality_lut(whole.pixel_array, whole)
