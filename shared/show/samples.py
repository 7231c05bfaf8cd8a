"""Samples as files: PNGs, a grid, an array in the user's units, a GIF. Does not depend on models or runs."""

import contextlib
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image

from shared.disk import TEMPORARY, alone, write_npy
from shared.sampling.config import SAMPLE_FILES
from shared.show import grids

Parts = Iterable[tuple[int, torch.Tensor, torch.Tensor]]

MOST_TILES = 400  # of the grid
MOST_COLUMNS = 16  # classes that have a column each


def write_samples(
    out: Path,
    parts: Parts,
    count: int,
    labels: torch.Tensor | None,
    classes: Sequence[str],
    seed: int,
    in_columns: int,
    state: PartialState | Any,
) -> None:
    """The samples' files, written as they are drawn, and put where older ones are once all are there.

    Every process writes its own batches into that folder, and keeps of them what the grid shows.

    Arguments:
        parts: the first row, values (B,C,H,W) in the user's units and pixels (B,C,H,W) in [-1, 1] of each
            batch of this process.
        count: samples of all processes, N.
        labels: classes (N,).
        classes: their names.
        seed: which the samples are of.
        in_columns: how many classes come in turn, a column of the grid each; 0 where they do not.
        state: the processes.
    """
    new = out / f"{TEMPORARY}samples"
    with _empty(new) if state.is_main_process else contextlib.nullcontext():
        state.wait_for_everyone()
        shown = gather_object([_write_batch(new, *part) for part in parts])  # all have written theirs
        if not state.is_main_process:
            return
        pixels = [batch for _, batch in sorted(shown, key=lambda entry: entry[0])]
        _grid(torch.cat(pixels)[:MOST_TILES], in_columns).save(new / "grid.png")
        arrays: dict[str, Any] = {"x": _values(new, count), "seed": np.int64(seed)}
        if labels is not None:
            arrays |= {"label": labels.numpy(), "classes": np.array(list(classes))}
        np.savez_compressed(new / "samples.npz", **arrays)
        arrays.clear()  # or the mapped file would not be gone
        (new / "x.npy").unlink()
        _put(new, out)


@contextlib.contextmanager
def _empty(folder: Path) -> Iterator[None]:
    """An empty folder that is gone at the end; another process that wants it waits."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder.with_suffix(".lock")):
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        folder.mkdir()
        try:
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _write_batch(
    folder: Path, first: int, values: torch.Tensor, pixels: torch.Tensor
) -> tuple[int, torch.Tensor]:
    """The files of a batch; its first row, and of its pixels those that the grid shows."""
    np.save(folder / f"{first:09d}.npy", values.numpy())
    pixels = grids.pictures(pixels, values.dtype == torch.uint8)
    for row, image in enumerate(pixels, first):
        grids.single(image).save(folder / f"{row:05d}.png")
    return first, pixels[: max(0, MOST_TILES - first)].clone()


def _values(folder: Path, count: int) -> np.ndarray:
    """The values (N,C,H,W) of all batches, on disk."""
    files = sorted(folder.glob("*.npy"))
    one = np.load(files[0], mmap_mode="r")

    def batches() -> Iterator[np.ndarray]:
        for file in files:
            yield np.load(file)
            file.unlink()  # all of them twice may be more than the disk holds

    write_npy(folder / "x.npy", one.dtype, (count, *one.shape[1:]), batches())
    return np.load(folder / "x.npy", mmap_mode="r")


def _put(new: Path, out: Path) -> None:
    """Put new samples where older ones are."""
    if (out / "samples.npz").is_file():  # of an earlier, perhaps longer row of samples
        for old in out.glob("*.png"):
            if re.fullmatch(SAMPLE_FILES, old.name):
                old.unlink()
    (new / "samples.npz").replace(out / "samples.npz")  # first: it says whose the others are
    for file in new.iterdir():
        file.replace(out / file.name)


def write_way(folder: Path, ends: Sequence[str], pixels: torch.Tensor) -> Path:
    """A GIF of samples (N,C,H,W) in [-1, 1] from one seed or file to another, and its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"interpolate_{'_'.join(Path(end).stem for end in ends)}.gif"
    grids.save_gif(grids.frames(pixels), path)
    return path


def _grid(pixels: torch.Tensor, classes: int) -> Image.Image:
    """A nearly square grid with full rows only, in which a column is a class where there are a few."""
    count = len(pixels)
    columns = round(count**0.5)
    if 0 < classes <= MOST_COLUMNS:
        columns = classes * max(1, round(columns / classes))
    full_rows = count // columns * columns or count
    return grids.grid(pixels[:full_rows], columns)
