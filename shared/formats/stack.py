"""All slices below a file or folder as one array on disk, and a table of where each comes from."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from shared import disk
from shared.config import InputError
from shared.data.config import SPLIT_FOLDERS
from shared.formats.opening import open_parts
from shared.formats.parts import HEAD, Part, was_converted

SEVERAL = 16  # slices, among which classes come twice


def to_array(source: Path, out: Path, dataset: str | None, axis: str) -> tuple[int, ...]:
    """Write all slices below a file or folder, and their table, and return the shape. Raises InputError."""
    parts = open_parts(source, dataset, axis, out)
    shape = (sum(part.shape[0] for part in parts), *_one_shape(parts))
    dtype = np.result_type(*(part.dtype for part in parts))
    _refuse_if_too_large(out, shape, dtype)
    _refuse_another(out)

    def write(temporary: Path) -> None:
        disk.write_npy(temporary, dtype, shape, _blocks(parts, shape))
        disk.write_text(out.with_suffix(".csv"), table)  # first: by its table an array is known as converted

    _name_classes(parts)
    table = _table(source, parts)
    disk.write_file(out, write)
    return shape


def _blocks(parts: list[Part], shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """All slices, some at a time. Raises InputError where a file holds others than its head says."""
    with tqdm(total=shape[0], unit="slice", desc="converting") as bar:
        for part in parts:
            held = 0
            for block in part.blocks():
                if block.shape[1:] != shape[1:]:
                    raise InputError(f"{part.path}: holds other slices than its head says")
                held += len(block)
                yield block
                bar.update(len(block))
            if held != part.shape[0]:
                raise InputError(f"{part.path}: holds {held} slices, its head says {part.shape[0]}")


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
    free = disk.free(out)
    if needed > free:
        sides = " x ".join(f"{side:,}" for side in shape)
        raise InputError(f"{out}: {sides} values need {needed >> 20:,} MiB; {free >> 20:,} are free there")


def _refuse_another(out: Path) -> None:
    """An array that is there already is replaced only if it was converted: its table says so."""
    if was_converted(out):
        return
    for path in (out, out.with_suffix(".csv")):
        if path.exists():
            raise InputError(f"{path} is there already, and was not converted from slices: --out ANOTHER.npy")


def _name_classes(parts: list[Part]) -> None:
    """Let a y be the label, where it is whole numbers that come twice: else it may be a coordinate."""
    found = [part.columns.get("y", []) for part in parts]
    values = [value for ys in found for value in ys]
    whole = len(values) == sum(part.shape[0] for part in parts) and all(value % 1 == 0 for value in values)
    many = [ys for ys in found if len(ys) >= SEVERAL]  # each file may hold the same coordinate
    if whole and all(len(set(ys)) <= len(ys) / 2 for ys in [values, *many]):
        for part in parts:
            part.columns["label"] = [int(value) for value in part.columns.pop("y")]


def _table(source: Path, parts: list[Part]) -> str:
    """A row for each slice: its file, its number there and what the file knows of it. Raises InputError.

    Its label is what the file says, else the sub-folder, where there are several; these are no splits.
    """
    files = [part.path.relative_to(source) if part.path != source else Path(source.name) for part in parts]
    folders = [file.parts[0] if len(file.parts) > 1 else "." for file in files]
    if len(set(folders)) > 1 and {folder.lower() for folder in folders} <= SPLIT_FOLDERS:
        several = " and ".join(sorted(set(folders)))
        raise InputError(f"{source}: holds the splits {several}: name one, such as {source / folders[-1]}")
    names = sorted({name for part in parts for name in part.columns} - {"label"})
    if len(set(folders)) > 1 or any("label" in part.columns for part in parts):
        names.append("label")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*HEAD.split(","), *names])
    for part, file, folder in zip(parts, files, folders, strict=True):
        count = part.shape[0]
        columns = {name: [""] * count for name in names} | {"label": [folder] * count} | part.columns
        rows = zip(range(count), *(columns[name] for name in names), strict=True)
        table.writerows([file.as_posix(), *row] for row in rows)
    return text.getvalue()
