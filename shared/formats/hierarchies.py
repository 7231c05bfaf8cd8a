"""HDF5 and zarr: arrays by name in one file or folder, read some slices at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from shared.config import InputError
from shared.formats.parts import Part, choose, columns_of, labels_beside, library, portions, real

# What may unpack a zarr array: codecs that turn bytes into numbers and do nothing else.
CODECS = (
    "blosc", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd", "bytes", "transpose", "crc32", "crc32c", "adler32",
    "fletcher32", "sharding_indexed", "shuffle", "bitround", "delta", "fixedscaleoffset", "quantize",
    "packbits", "vlen-utf8",
)  # fmt: skip


def hdf5(path: Path, wanted: str | None) -> Part:
    """The array of an HDF5 file that is wanted by name, or the largest. Raises InputError."""
    h5py = library("h5py")
    with h5py.File(path, "r") as file:
        arrays: dict[str, Any] = {}

        def collect(name: str, node: Any) -> None:
            if isinstance(node, h5py.Dataset) and node.shape is not None:
                arrays[name] = node

        file.visititems(collect)
        name, chosen = choose(arrays, wanted)
        shape, dtype = _stacked(chosen.shape), real(chosen.dtype)
        labels = labels_beside(arrays, name, shape[0])
        for array in (chosen, *labels.values()):  # what is read
            if array.external or array.is_virtual:
                raise InputError(f"{array.name.strip('/')} lies in another file, which is not opened")
        _refuse_packed(name, chosen)
        columns = columns_of(labels)

    def read() -> Iterator[np.ndarray]:
        with h5py.File(path, "r") as file:
            yield from portions(file[name], shape)

    return Part(path, shape, dtype, read, columns)


def zarr(path: Path, wanted: str | None) -> Part:
    """The array of a zarr folder or zip that is wanted by name, or the largest. Raises InputError."""
    package = library("zarr")
    store = package.storage.ZipStore(path, mode="r") if path.is_file() else path
    root = package.open(store, mode="r")
    arrays = {path.stem: root} if isinstance(root, package.Array) else _zarr_arrays(package, root, "")
    name, chosen = choose(arrays, wanted)
    shape = _stacked(chosen.shape)
    _refuse_packed(name, chosen)
    labels = labels_beside(arrays, name, shape[0])
    for array in (chosen, *labels.values()):  # what is read
        strange = _codecs(array.metadata.to_dict()) - set(CODECS)
        if strange:
            packed = f"is packed by {', '.join(sorted(strange))}, which is not run"
            raise InputError(f"{array.name.strip('/') or name} {packed}")
    return Part(path, shape, real(chosen.dtype), lambda: portions(chosen, shape), columns_of(labels))


def _refuse_packed(name: str, array: Any) -> None:
    """Raises InputError where the values are counts that attributes of NetCDF turn into units."""
    packed = {"scale_factor", "add_offset"} & set(array.attrs)
    if packed:
        raise InputError(f"{name} is to be changed by its {packed.pop()} first; save it in its units")


def _zarr_arrays(package: Any, group: Any, prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, member in group.members():
        inside = isinstance(member, package.Group)
        found |= _zarr_arrays(package, member, f"{prefix}{name}/") if inside else {f"{prefix}{name}": member}
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


def _stacked(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of an array of slices; a single image is a stack of one. Raises InputError."""
    if len(shape) not in (2, 3, 4) or 0 in shape:
        raise InputError(f"an array of shape {shape}; images are N,H,W or N,C,H,W or N,H,W,C")
    return (1, *shape) if len(shape) == 2 else tuple(shape)
