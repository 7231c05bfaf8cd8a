"""DICOM: series of files of a scanner, in their order along the patient, rescaled to their units.

Nothing of a file but its pixels, its place and its series is taken over. Dimension key: n slices, H W pixels.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shared.config import InputError
from shared.formats.parts import Part, library, named


def dicom(paths: list[Path]) -> list[Part]:
    """A part for each file: series by series, in their order along the patient. Values are rescaled.

    Series are numbered: their slices are nearly the same, and are not to be divided between the splits.
    """
    found = [named(path, partial(_opened, path)) for path in paths]
    ordered = sorted((one for one in found if one), key=lambda one: one[0])
    numbers: dict[tuple, int] = {}  # instead of what names a patient
    for (folder, series, *_), part in ordered:
        number = numbers.setdefault((folder, series), len(numbers))
        part.columns["series"] = [number] * part.shape[0]
    return [part for _, part in ordered]


def _opened(path: Path) -> tuple[tuple, Part] | None:
    """Where a file stands among others, and its part; None of what is no picture, as a report."""
    head = library("pydicom").dcmread(path, stop_before_pixels=True)
    if "Rows" not in head or "Columns" not in head:
        return None
    place = _place(head)
    number = int(head.get("InstanceNumber") or 0)  # of slices at one place, as at several times
    order = (path.parent, str(head.get("SeriesInstanceUID", "")), round(place, 3), number, path)
    return order, _of_file(path, head, place)


def _place(head: Any) -> float:
    """Where a slice lies along the normal of its plane, in mm; else its number in the series."""
    position, orientation = head.get("ImagePositionPatient"), head.get("ImageOrientationPatient")
    if position and orientation:
        row, column = np.asarray(orientation, float).reshape(2, 3)
        return float(np.dot(np.cross(row, column), np.asarray(position, float)))
    return float(head.get("InstanceNumber") or 0)


def _of_file(path: Path, head: Any, place: float) -> Part:
    """The frames of a file. Raises InputError where their places and units stand with each frame."""
    if "SharedFunctionalGroupsSequence" in head or "PerFrameFunctionalGroupsSequence" in head:
        raise InputError("its units stand with each frame (enhanced); save it as a series of single slices")
    if "DoseGridScaling" in head:
        raise InputError("its units are those of a dose grid, which are not read; save it as NIfTI")
    meaning = head.get("PhotometricInterpretation")
    if meaning == "PALETTE COLOR":
        raise InputError("its pixels are places in a palette of colours; save it in grey or RGB")
    colours = int(head.get("SamplesPerPixel", 1))
    frames = int(head.get("NumberOfFrames", 1) or 1)
    sides = (int(head.Rows), int(head.Columns), *([colours] if colours > 1 else []))
    kind = "i" if head.get("PixelRepresentation", 0) else "u"
    dtype = np.dtype(f"{kind}{max(1, int(head.get('BitsAllocated', 16)) // 8)}")
    scale = (float(head.get("RescaleSlope", 1)), float(head.get("RescaleIntercept", 0)))
    units = scale != (1, 0) or "ModalityLUTSequence" in head
    if "RescaleSlope" in head or "ModalityLUTSequence" in head:
        dtype = np.dtype(np.float32)

    def read() -> Iterator[np.ndarray]:
        whole = library("pydicom").dcmread(path)
        if "PixelData" not in whole:
            raise InputError("its pixels are floating-point numbers, which are not read")
        stored = whole.pixel_array
        # The least is white: turned round, as in the files beside it; of physical units it stays.
        if meaning == "MONOCHROME1" and not units:
            stored = (-1 if kind == "i" else 2 ** int(whole.BitsStored) - 1) - stored
        yield library("pydicom.pixels").apply_modality_lut(stored, whole).reshape(-1, *sides)

    return Part(path, (frames, *sides), dtype, read, {"position": [place] * frames})
