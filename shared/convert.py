"""Volumes and stacks of science as an array to train on, and a drawn stack as a volume.

`python -m shared.convert SOURCE --out FILE.npy [--dataset NAME] [--axis axial]` writes the 2-D slices of
HDF5, zarr, NIfTI, DICOM or TIFF in the units of the file, and FILE.csv: a row for each slice with its file,
place and label. `python -m shared.convert STACK.npy --out FILE.nii.gz [--like VOLUME.nii]` goes back.
"""

import argparse
import csv
import gzip
import io
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from shared import config, disk
from shared.config import InputError
from shared.formats import nifti
from shared.formats.opening import NIFTI, open_parts
from shared.formats.parts import Part, library, named


def parse() -> argparse.Namespace:
    parser = config.Parser(
        prog="python -m shared.convert", description="Volumes and stacks to arrays, and back."
    )
    parser.add_argument(
        "source", help="a file or a folder of HDF5, zarr, NIfTI, DICOM, TIFF; or an .npy, to go back"
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="FILE.npy; to go back FILE.nii or FILE.nii.gz"
    )
    parser.add_argument(
        "--dataset", metavar="NAME", help="the array's name in HDF5 and zarr (default: the largest)"
    )
    parser.add_argument("--axis", choices=nifti.AXES, default="axial", help="of volumes: how they are sliced")
    parser.add_argument(
        "--like", metavar="VOLUME", help="to go back: a volume that lies in space as this one shall"
    )
    return parser.parse_args()


# ---------------------------------------------------------------- to an array


def to_array(source: Path, out: Path, dataset: str | None, axis: str) -> tuple[int, ...]:
    """Write all slices below a file or folder, and their table, and return the shape. Raises InputError."""
    parts = open_parts(source, dataset, axis)
    shape = (sum(part.shape[0] for part in parts), *_one_shape(parts))
    dtype = np.result_type(*(part.dtype for part in parts))
    _refuse_if_too_large(out, shape, dtype)

    def write(temporary: Path) -> None:
        array = np.lib.format.open_memmap(temporary, "w+", dtype, shape)
        first = 0
        with tqdm(total=len(array), unit="slice", desc="converting") as bar:
            for part in parts:
                before = first
                for block in part.blocks():
                    if block.shape[1:] != shape[1:] or first + len(block) > len(array):
                        raise InputError(f"{part.path}: holds other slices than its head says")
                    array[first : first + len(block)] = block
                    first += len(block)
                    bar.update(len(block))
                if first - before != part.shape[0]:
                    held = first - before
                    raise InputError(f"{part.path}: holds {held} slices, its head says {part.shape[0]}")
        array.flush()

    try:
        disk.write_file(out, write)
    except InputError:
        (out.parent / f"{disk.TEMPORARY}{out.name}").unlink(missing_ok=True)
        raise
    disk.write_text(out.with_suffix(".csv"), _table(source, parts))
    return shape


def _one_shape(parts: list[Part]) -> tuple[int, ...]:
    """The shape of a slice, which all have. Raises InputError."""
    shape = parts[0].shape[1:]
    for part in parts:
        if part.shape[1:] != shape:
            one, other = ("x".join(map(str, sides)) for sides in (shape, part.shape[1:]))
            cure = "convert them into arrays of their own"
            raise InputError(f"{part.path}: slices of {other}, but of {one} in {parts[0].path}; {cure}")
    return shape


def _refuse_if_too_large(out: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    needed = int(np.prod(shape, dtype=np.float64)) * dtype.itemsize
    place = next(folder for folder in out.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        sides = " x ".join(f"{side:,}" for side in shape)
        raise InputError(f"{out}: {sides} values need {needed >> 20:,} MiB; {free >> 20:,} are free there")


def _table(source: Path, parts: list[Part]) -> str:
    """A row for each slice: its file, its number there and what the file knows of it.

    Its label is what the file says, else the sub-folder, where there are several.
    """
    files = [part.path.relative_to(source) if part.path != source else Path(source.name) for part in parts]
    folders = [file.parts[0] if len(file.parts) > 1 else "." for file in files]
    names = sorted({name for part in parts for name in part.columns} - {"label"})
    if len(set(folders)) > 1 or any("label" in part.columns for part in parts):
        names.append("label")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["file", "slice", *names])
    for part, file, folder in zip(parts, files, folders, strict=True):
        count = part.shape[0]
        columns = {name: [""] * count for name in names} | {"label": [folder] * count} | part.columns
        rows = zip(range(count), *(columns[name] for name in names), strict=True)
        table.writerows([file.as_posix(), *row] for row in rows)
    return text.getvalue()


# ---------------------------------------------------------------- and back


def to_volume(source: Path, out: Path, axis: str, like: Path | None) -> tuple[int, ...]:
    """Write slices (N,H,W), (N,1,H,W) or (N,H,W,1) as NIfTI, and return its shape. Raises InputError."""
    nibabel = library("nibabel")
    try:
        slices = np.load(source, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{source}: cannot be read ({' '.join(str(error).split())})") from None
    if slices.ndim == 4 and 1 in (slices.shape[1], slices.shape[3]):
        slices = slices[:, 0] if slices.shape[1] == 1 else slices[..., 0]
    if slices.ndim != 3:
        raise InputError(f"{source}: an array of shape {slices.shape}; a volume is made of N,H,W or N,1,H,W")
    volume = nifti.as_volume(slices, nifti.AXES.index(axis))
    affine = np.eye(4)
    if like:
        image = named(like, lambda: nibabel.as_closest_canonical(nibabel.load(like)))
        if image.shape[:3] != volume.shape:
            raise InputError(f"--like: {like} is of {image.shape[:3]}, the stack makes {volume.shape}")
        affine = image.affine
    if volume.dtype.kind == "f":
        volume = volume.astype(np.float32)
    image = nibabel.Nifti1Image(np.ascontiguousarray(volume), affine)

    content = image.to_bytes()
    packed = gzip.compress(content, mtime=0) if out.suffix == ".gz" else content
    disk.write_file(out, lambda temporary: temporary.write_bytes(packed))
    return volume.shape


def main() -> None:
    options = parse()
    source, out = Path(options.source).expanduser(), Path(options.out).expanduser()
    if out.suffix == ".npy":
        shape = to_array(source, out, options.dataset, options.axis)
        sides = "x".join(map(str, shape[1:]))
        config.say(f"{out}: {shape[0]:,} slices of {sides}; {out.with_suffix('.csv')}: a row for each")
    elif out.name.endswith(NIFTI):
        shape = to_volume(source, out, options.axis, Path(options.like) if options.like else None)
        config.say(f"{out}: a volume of {'x'.join(map(str, shape))}")
    else:
        raise InputError(f"--out: {out} is neither FILE.npy nor, to go back, FILE.nii or FILE.nii.gz")


if __name__ == "__main__":
    config.run(main)
