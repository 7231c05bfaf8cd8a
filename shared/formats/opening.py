"""Which files below a folder are opened by which library.

Each is imported where it is needed, and headers say how large a file is before a value is read.
"""

import os
import re
from functools import partial
from pathlib import Path

from shared.config import InputError
from shared.data.config import ARRAY_SUFFIXES, CONVERTED, DICOM, HDF5, NIFTI, TIFF
from shared.folders import HIDDEN, linked_folders
from shared.formats.dicom import dicom
from shared.formats.hierarchies import hdf5, zarr
from shared.formats.nifti import AXES, nifti
from shared.formats.npy import npy
from shared.formats.parts import Part, named
from shared.formats.tiff import tiff


def open_parts(source: Path, dataset: str | None, axis: str, out: Path) -> list[Part]:
    """All stacks below a file or folder, in the order of their paths; of NumPy's where nothing else is there.

    Arguments:
        source: a file, a folder of files, or a zarr folder.
        dataset: the array's name in HDF5, zarr and .npz; None: the only one of images, or the largest.
        axis: of NIfTI volumes, one of AXES.
        out: what is to be written, and not read if it is there already.

    Raises:
        InputError: naming the file that cannot be read, and the library that is missing.
    """
    parts: list[Part] = []
    together: dict[str, list[Path]] = {"dicom": [], "npy": []}  # what a file is, only all of them tell
    for path in _files(source):
        written = path.name == out.name and path.resolve() == out.resolve()
        kind = None if written else _kind(path)
        if kind in together:
            together[kind].append(path)
        elif kind:
            opened = {
                "hdf5": partial(hdf5, path, dataset),
                "zarr": partial(zarr, path, dataset),
                "nifti": partial(nifti, path, AXES.index(axis)),
                "tiff": partial(tiff, path),
            }[kind]
            parts.append(named(path, opened))
    parts += dicom(together["dicom"])
    parts = parts or npy(together["npy"], dataset)
    if not parts:
        known = " ".join((*CONVERTED, ".zarr", *ARRAY_SUFFIXES))
        raise InputError(f"{source}: holds nothing of {known}")
    return parts


def _files(source: Path) -> list[Path]:
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    if source.is_file() or _is_zarr(source):
        return [source]
    found = []
    links = (link for link in linked_folders(source) if not _is_zarr(link))  # one such is found where it lies
    for root in (source, *links):
        for place, folders, files in os.walk(root, onerror=_refuse):
            shown = [name for name in folders if not name.startswith(HIDDEN)]
            inner = [name for name in shown if _is_zarr(Path(place, name))]
            folders[:] = set(shown) - set(inner)
            found += [Path(place, name) for name in [*inner, *files] if not name.startswith(".")]
    return sorted(found, key=_by_number)


def _refuse(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be looked into ({error.strerror})")


def _by_number(path: Path) -> list:
    """For sorting: slice2 before slice10."""
    return [
        [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]
        for name in path.parts
    ]


def _is_zarr(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup"))


def _kind(path: Path) -> str | None:
    """The library that a path asks for. DICOM files often have no suffix: their first bytes tell."""
    name = path.name.lower()
    if path.is_dir() or name.endswith(".zarr.zip"):
        return "zarr"
    for kind, endings in (("hdf5", HDF5), ("nifti", NIFTI), ("dicom", DICOM), ("tiff", TIFF)):
        if name.endswith(endings):
            return kind
    if path.suffix in ARRAY_SUFFIXES:
        return "npy"
    if not path.is_file():  # a link to nowhere, a pipe
        return None
    with open(path, "rb") as file:
        return "dicom" if file.read(132)[128:] == b"DICM" else None
