"""Samples as files: PNGs, a grid, an array in the user's units, a GIF. Does not depend on models or runs."""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from shared.disk import TEMPORARY
from shared.show import grids

MOST_TILES = 400  # of the grid
MOST_COLUMNS = 16  # classes that have a column each


def write_samples(
    out: Path,
    values: torch.Tensor,
    pixels: torch.Tensor,
    labels: torch.Tensor | None,
    classes: Sequence[str],
    seed: int,
    in_columns: int,
) -> None:
    """The samples' files, put where older ones are once all of them are written.

    Arguments:
        values, pixels: (N,C,H,W) in the user's units and in [-1, 1].
        labels: classes (N,).
        classes: their names.
        seed: which the samples are of.
        in_columns: how many classes come in turn, a column of the grid each; 0 where they do not.
    """
    out.mkdir(parents=True, exist_ok=True)
    arrays = {"x": values.numpy(), "seed": np.int64(seed)}
    if labels is not None:
        arrays |= {"label": labels.numpy(), "classes": np.array(list(classes))}
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=out) as folder:
        new = Path(folder)
        for index, image in enumerate(pixels):
            grids.single(image).save(new / f"{index:05d}.png")
        _grid(pixels[:MOST_TILES], in_columns).save(new / "grid.png")
        np.savez_compressed(new / "samples.npz", **arrays)  # type: ignore[arg-type]
        if (out / "samples.npz").is_file():  # of an earlier, perhaps longer row of samples
            for old in out.glob("*.png"):
                if re.fullmatch(r"\d{5}\.png", old.name):
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
