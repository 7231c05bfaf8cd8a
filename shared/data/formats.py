"""Files of science as stacks of 2-D slices: HDF5, zarr, NIfTI, DICOM, TIFF. For shared.convert alone.

Each file is opened by its own library, which is imported where it is needed, and its headers say how large it
is before a value is read. Values stay in the units of the file. Knows nothing of what is written.
Dimension key: n slices, C channels, H W pixels.
"""

import contextlib
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shared.config import InputError

AXES = ("sagittal", "coronal", "axial")  # of a volume, by what its slices are perpendicular to: x, y, z
HDF5 = (".h5", ".hdf5", ".hdf", ".nxs")
NIFTI = (".nii", ".nii.gz")
DICOM = (".dcm", ".dicom", ".ima")
TIFF = (".tif", ".tiff")
AT_ONCE = 64  # slices that are read at once
LABELS = ("label", "labels", "y")  # a data set of one value for each image
# What may unpack a zarr array: codecs that turn bytes into numbers and do nothing else.
CODECS = (
    "blosc", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd", "bytes", "transpose", "crc32", "crc32c", "adler32",
    "fletcher32", "sharding_indexed", "shuffle", "bitround", "delta", "fixedscaleoffset", "quantize",
    "packbits",
)  # fmt: skip


@dataclass
class Part:
    """The slices of one file, or of one series of files, before they are read."""

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


def open_parts(source: Path, dataset: str | None, axis: str) -> list[Part]:
    """All stacks below a file or folder, in the order of their paths.

    Arguments:
        source: a file, a folder of files, or a zarr folder.
        dataset: the array's name in HDF5 and zarr; None: the only one that can be images, or the largest.
        axis: of NIfTI volumes, one of AXES.

    Raises:
        InputError: naming the file that cannot be read, and the library that is missing.
    """
    parts: list[Part] = []
    series: list[Path] = []
    for path in _files(source):
        kind = _kind(path)
        if kind == "dicom":
            series.append(path)
        elif kind:
            opened = {
                "hdf5": lambda path=path: _hdf5(path, dataset),
                "zarr": lambda path=path: _zarr(path, dataset),
                "nifti": lambda path=path: _nifti(path, AXES.index(axis)),
                "tiff": lambda path=path: _tiff(path),
            }[kind]
            parts.append(named(path, opened))
    if series:
        parts += _dicom(series)
    if not parts:
        kinds = " ".join((*HDF5, ".zarr", *NIFTI, *DICOM, *TIFF))
        raise InputError(f"{source}: holds nothing of {kinds}")
    return parts


def _files(source: Path) -> list[Path]:
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    if source.is_file() or _is_zarr(source):
        return [source]
    found = []
    for place, folders, files in os.walk(source):
        inner = [name for name in folders if _is_zarr(Path(place, name))]
        folders[:] = set(folders) - set(inner)
        found += [Path(place, name) for name in [*inner, *files] if not name.startswith(".")]
    return sorted(found)


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
    with open(path, "rb") as file:
        return "dicom" if file.read(132)[128:] == b"DICM" else None


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
        raise error if str(path.parent) in str(error) else InputError(f"{path}: {error}") from None
    except Exception as error:  # each library has errors of its own
        said = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(f"{path}: cannot be read ({said})") from None


def _real(dtype: np.dtype) -> np.dtype:
    """The type that values are kept in: as they are, but no wider than float32. Raises InputError."""
    if dtype.kind not in "buif":
        raise InputError(f"holds values of type {dtype}; images are real numbers")
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    return np.dtype(np.float32) if dtype.kind == "f" else dtype.newbyteorder("=")


# ---------------------------------------------------------------- HDF5 and zarr


def _hdf5(path: Path, wanted: str | None) -> Part:
    h5py = library("h5py")
    with h5py.File(path, "r") as file:
        arrays: dict[str, Any] = {}
        file.visititems(
            lambda name, node: arrays.update({name: node} if isinstance(node, h5py.Dataset) else {})
        )
        name, chosen = _choose(
            {name: node for name, node in arrays.items() if node.shape is not None}, wanted
        )
        if chosen.external:
            raise InputError(f"{name} lies in another file, which is not opened")
        labels = _labels_beside(arrays, name, len(chosen))
        shape, dtype = _stacked(chosen.shape), _real(chosen.dtype)

    def read() -> Iterator[np.ndarray]:
        with h5py.File(path, "r") as file:
            yield from _blocks(file[name], shape)

    return Part(path, shape, dtype, read, labels)


def _zarr(path: Path, wanted: str | None) -> Part:
    zarr = library("zarr")
    root = zarr.open(str(path), mode="r")
    arrays = {path.stem: root} if isinstance(root, zarr.Array) else _zarr_arrays(zarr, root, "")
    for name, array in arrays.items():
        strange = _codecs(array.metadata.to_dict()) - set(CODECS)
        if strange:
            raise InputError(f"{name} is packed by {', '.join(sorted(strange))}, which is not run")
    name, chosen = _choose(arrays, wanted)
    shape = _stacked(chosen.shape)
    labels = _labels_beside(arrays, name, chosen.shape[0])
    return Part(path, shape, _real(chosen.dtype), lambda: _blocks(chosen, shape), labels)


def _zarr_arrays(zarr: Any, group: Any, prefix: str) -> dict[str, Any]:
    found = {}
    for name, member in group.members():
        inside = isinstance(member, zarr.Group)
        found |= _zarr_arrays(zarr, member, f"{prefix}{name}/") if inside else {f"{prefix}{name}": member}
    return found


def _codecs(tree: Any) -> set[str]:
    """The names of all codecs, filters and compressors in the metadata of a zarr array."""
    found: set[str] = set()
    for key in ("codecs", "filters", "compressor", "index_codecs"):
        inside = tree.get(key) or ()
        for codec in inside if isinstance(inside, (list, tuple)) else [inside]:
            codec = codec if isinstance(codec, dict) else codec.to_dict() if hasattr(codec, "to_dict") else {}
            name = str(codec.get("id") or codec.get("name") or type(codec).__name__)
            found |= {name.removeprefix("numcodecs.")} | _codecs(codec.get("configuration") or {})
    return found


def _choose(arrays: dict[str, Any], wanted: str | None) -> tuple[str, Any]:
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


def _labels_beside(arrays: dict[str, Any], name: str, count: int) -> dict[str, list]:
    """The labels of the images, where an array beside theirs is called so and is as long."""
    folder = name.rpartition("/")[0]
    for label in LABELS:
        node = arrays.get(f"{folder}/{label}".strip("/"))
        if node is not None and node.shape == (count,):
            values = np.asarray(node[:]).tolist()
            return {"label": [value.decode() if isinstance(value, bytes) else value for value in values]}
    return {}


def _stacked(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of an array of slices; a single image is a stack of one. Raises InputError."""
    if len(shape) not in (2, 3, 4) or 0 in shape:
        raise InputError(f"an array of shape {shape}; images are N,H,W or N,C,H,W or N,H,W,C")
    return (1, *shape) if len(shape) == 2 else tuple(shape)


def _blocks(array: Any, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    if len(array.shape) == 2:
        yield np.asarray(array[:])[None]
        return
    for first in range(0, shape[0], AT_ONCE):
        yield np.asarray(array[first : first + AT_ONCE])


# ---------------------------------------------------------------- NIfTI


def _nifti(path: Path, axis: int) -> Part:
    nibabel = library("nibabel")
    image = nibabel.load(path)
    if len(image.shape) not in (3, 4):
        raise InputError(f"a volume of shape {image.shape}; slices are taken of x,y,z or x,y,z,t")
    orientation = nibabel.io_orientation(image.affine)  # which axes of the file go right, to the front and up
    sides = [image.shape[list(orientation[:, 0]).index(side)] for side in range(3)]
    scaled = (image.dataobj.slope, image.dataobj.inter) != (1.0, 0.0)
    dtype = np.dtype(np.float32) if scaled else _real(image.get_data_dtype())
    depth = sides.pop(axis)
    times = image.shape[3] if len(image.shape) == 4 else 1

    def read() -> Iterator[np.ndarray]:
        proxy = nibabel.load(path).dataobj
        for time in range(times):
            volume = np.asarray(proxy[..., time] if len(proxy.shape) == 4 else proxy)
            yield as_slices(nibabel.apply_orientation(volume, orientation), axis)

    columns = {"position": list(range(depth)) * times}
    if times > 1:
        columns["time"] = [time for time in range(times) for _ in range(depth)]
    return Part(path, (depth * times, sides[1], sides[0]), dtype, read, columns)


def as_slices(volume: np.ndarray, axis: int) -> np.ndarray:
    """A volume (X,Y,Z) towards right, front and top, as upright slices (n,H,W)."""
    return np.moveaxis(volume, axis, 0).transpose(0, 2, 1)[:, ::-1]


def as_volume(slices: np.ndarray, axis: int) -> np.ndarray:
    """The inverse of as_slices."""
    return np.moveaxis(slices[:, ::-1].transpose(0, 2, 1), 0, axis)


# ---------------------------------------------------------------- DICOM and TIFF


def _dicom(paths: list[Path]) -> list[Part]:
    """One part for each series, its slices in their order along the patient. Values are rescaled."""
    pydicom = library("pydicom")
    series: dict[tuple, list[tuple[float, Path, Any]]] = {}
    for path in paths:
        head = named(path, lambda path=path: pydicom.dcmread(path, stop_before_pixels=True))
        if "Rows" not in head or "Columns" not in head:
            continue  # a report or a directory: no picture
        shape = (int(head.Rows), int(head.Columns), int(head.get("SamplesPerPixel", 1)))
        key = (path.parent, str(head.get("SeriesInstanceUID", "")), shape)
        series.setdefault(key, []).append((_place(head), path, head))
    return [
        _of_series(pydicom, key[2], sorted(found, key=lambda one: one[:2])) for key, found in series.items()
    ]


def _place(head: Any) -> float:
    """Where a slice lies along the normal of its plane, in mm; else its number in the series."""
    position, orientation = head.get("ImagePositionPatient"), head.get("ImageOrientationPatient")
    if position and orientation:
        row, column = np.asarray(orientation, float).reshape(2, 3)
        return float(np.dot(np.cross(row, column), np.asarray(position, float)))
    return float(head.get("InstanceNumber") or 0)


def _of_series(pydicom: Any, sides: tuple[int, int, int], found: list[tuple[float, Path, Any]]) -> Part:
    height, width, samples = sides
    frames = [int(head.get("NumberOfFrames", 1) or 1) for _, _, head in found]
    scaled = any("RescaleSlope" in head or "ModalityLUTSequence" in head for _, _, head in found)
    signed = any(head.get("PixelRepresentation", 0) for _, _, head in found)
    bits = max(int(head.get("BitsAllocated", 16)) for _, _, head in found)
    dtype = np.dtype(np.float32 if scaled else f"{'i' if signed else 'u'}{bits // 8}")

    def read() -> Iterator[np.ndarray]:
        from pydicom.pixels import apply_modality_lut

        for _, path, _ in found:
            whole = named(path, lambda path=path: pydicom.dcmread(path))
            values = named(path, lambda whole=whole: apply_modality_lut(whole.pixel_array, whole))
            yield (
                values.reshape(-1, height, width, samples)
                if samples > 1
                else values.reshape(-1, height, width)
            )

    shape = (sum(frames), height, width, samples) if samples > 1 else (sum(frames), height, width)
    places = [place for (place, _, _), count in zip(found, frames, strict=True) for _ in range(count)]
    return Part(found[0][1], shape, dtype, read, {"position": places})


def _tiff(path: Path) -> Part:
    tifffile = library("tifffile")
    with _strictly("tifffile"), tifffile.TiffFile(path) as file:
        series = file.series[0]
        axes, shape, dtype = series.axes, series.shape, _real(series.dtype)
    colours = [axis for axis in axes if axis in "SC"]
    if len(colours) > 1 or not {"Y", "X"} <= set(axes):
        raise InputError(f"an image of the axes {axes}; slices are of Y and X, and of S or C")
    order = [axes.index(axis) for axis in axes if axis not in "SCYX"] + [
        axes.index(a) for a in (*colours, "Y", "X")
    ]
    tail = tuple(shape[axes.index(axis)] for axis in (*colours, "Y", "X"))
    count = int(np.prod(shape, dtype=np.int64)) // int(np.prod(tail, dtype=np.int64))

    def read() -> Iterator[np.ndarray]:
        with _strictly("tifffile"):
            values = tifffile.imread(path, series=0)
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
