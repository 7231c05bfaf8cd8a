"""NIfTI: volumes of medicine, as upright slices across one axis of the body, and back.

A volume of one time is read at once. Dimension key: n slices, H W pixels; X Y Z voxels to the right, to the
front and up.
"""

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shared import disk
from shared.config import InputError
from shared.formats.parts import Part, library, named, real

AXES = ("sagittal", "coronal", "axial")  # what slices are called that are perpendicular to X, Y, Z
MOST = 2**15 - 1  # voxels along an axis, which a head of NIfTI has 16 bits for


def nifti(path: Path, axis: int) -> Part:
    """The slices of a volume across one of AXES, for each time one after the other. Raises InputError."""
    nibabel = library("nibabel")
    image = nibabel.load(path)
    if len(image.shape) not in (3, 4):
        raise InputError(f"a volume of shape {image.shape}; slices are taken of x,y,z or x,y,z,t")
    orientation = nibabel.io_orientation(image.affine)  # which axes of the file go right, to the front and up
    sides = [image.shape[list(orientation[:, 0]).index(side)] for side in range(3)]
    scaled = (image.dataobj.slope, image.dataobj.inter) != (1.0, 0.0)
    dtype = np.dtype(np.float32) if scaled else real(image.get_data_dtype())
    depth = sides.pop(axis)
    times = image.shape[3] if len(image.shape) == 4 else 1

    def read() -> Iterator[np.ndarray]:
        proxy = nibabel.load(path, keep_file_open=True).dataobj  # a packed file is unpacked once
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


# ---------------------------------------------------------------- and back


def to_volume(source: Path, out: Path, axis: str, like: Path | None) -> tuple[int, ...]:
    """Write slices (N,H,W), (N,1,H,W) or (N,H,W,1) as NIfTI, and return its shape. Raises InputError.

    source: an .npy, or an .npz whose slices are x, as samples.npz.
    """
    nibabel = library("nibabel")
    slices = named(source, lambda: _slices(source))
    if slices.ndim == 4 and 1 in (slices.shape[1], slices.shape[3]):
        slices = slices[:, 0] if slices.shape[1] == 1 else slices[..., 0]
    if slices.ndim != 3:
        raise InputError(f"{source}: an array of shape {slices.shape}; a volume is made of N,H,W or N,1,H,W")
    volume = as_volume(slices, AXES.index(axis))
    if max(volume.shape) > MOST:
        raise InputError(f"{source}: {max(volume.shape):,} along an axis; NIfTI holds {MOST:,}")
    affine, code = np.eye(4), 2
    if like:
        if out.exists() and like.exists() and out.samefile(like):
            raise InputError(f"--out: {out} is the volume of --like; name another file")
        image = named(like, lambda: nibabel.as_closest_canonical(nibabel.load(like)))
        if image.shape[:3] != volume.shape:
            raise InputError(f"--like: {like} is of {image.shape[:3]}, the stack makes {volume.shape}")
        affine, code = image.affine, int(image.header["sform_code"]) or code
    made = nibabel.Nifti1Image(np.ascontiguousarray(volume), affine)
    made.header.set_xyzt_units("mm")
    made.set_sform(affine, code)
    content = made.to_bytes()
    packed = gzip.compress(content, mtime=0) if out.suffix == ".gz" else content
    disk.write_file(out, lambda temporary: temporary.write_bytes(packed))
    return volume.shape


def _slices(source: Path) -> np.ndarray:
    """An array of a type that NIfTI knows: float32, and whole numbers of at most 32 bits where they fit."""
    found = np.load(source, mmap_mode="r", allow_pickle=False)
    slices = found["x"] if isinstance(found, np.lib.npyio.NpzFile) else found
    dtype = real(slices.dtype)
    if dtype.kind in "iu" and dtype.itemsize == 8:
        low, high = slices.min(initial=0), slices.max(initial=0)
        fits = np.iinfo(np.int32).min <= low and high <= np.iinfo(np.int32).max
        dtype = np.dtype(np.int32 if fits else np.float32)
    return slices.astype(dtype, copy=False)
