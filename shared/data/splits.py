"""A source divided into training and held-out images; what is measured on a split.

Dimension key: B batch, C channels, H W pixels.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from shared import disk
from shared.config import InputError, differences
from shared.data.config import DataConfig, by_channel, source_kind
from shared.data.sources import ImageSource, Source
from shared.sampling.transforms import ValueTransform

IDENTITY_IMAGES = 64  # whose content stands for that of a split
AT_ONCE = 256  # images read, of many
GLIMPSE = 32  # files of 16 or 32 bits whose values are looked at
OVERSHOOT = 0.29 * 255  # beside an edge, of bicubic resizing: 1.125 squared, and 2 times 0.125 times 1.125


class Pixels(Dataset):
    """One split of a source: raw images and labels by position."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source = source
        self.indices = indices
        self.num_workers = source.data.num_workers

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def called(self) -> np.ndarray:
        """What each position is called in a message: its image, of patches the one that they are of."""
        return self.indices // self.source.per_group

    def __getitems__(self, positions: Sequence[int]) -> dict[str, torch.Tensor]:
        """Raw pixels (B,C,H,W), uint8 or float32, and class numbers (B,) where the source has them."""
        indices = self.indices[positions]
        images: list[np.ndarray | None] = list(self.source.read(indices.tolist()))
        for row, image in enumerate(images):
            if image is None:
                indices[row], images[row] = self._next_readable(positions[row])
        raw = np.stack(images)  # type: ignore[arg-type]  # none of them is None now
        batch = {"raw": torch.from_numpy(raw)}
        if self.source.labels is not None:
            batch["label"] = torch.from_numpy(self.source.labels[indices])
        return batch

    def labels(self, positions: Sequence[int]) -> torch.Tensor | None:
        """Class numbers (B,), or None where the source has none; no image is read."""
        if self.source.labels is None:
            return None
        return torch.from_numpy(self.source.labels[self.indices[positions]])

    def _next_readable(self, position: int) -> tuple[int, np.ndarray]:
        """For an unreadable image, the next readable one of the same split, under its own label."""
        for offset in range(1, len(self)):
            index = int(self.indices[(position + offset) % len(self)])
            image = self.source.read([index])[0]
            if image is not None:
                return index, image
        raise InputError(f"data.source: {self.source.data.source} has no readable image")


def split(source: Source, data: DataConfig) -> tuple[Pixels, Pixels]:
    """Training and held-out images, disjoint, the same whatever a run's seed.

    Patches of an image stay together, and so do the slices of a file, where files are small enough.
    """
    group = source.per_group
    order = np.random.default_rng(0).permutation(len(source) // group)[: data.limit]
    held_out = min(max(1, round(len(order) * data.val_fraction)), len(order) - 1)
    if source.files is not None:
        order, held_out = _whole_files_first(order, source.files[order], held_out)

    def pixels(groups: np.ndarray) -> Pixels:
        return Pixels(source, (np.sort(groups)[:, None] * group + np.arange(group)).ravel())

    return pixels(order[held_out:]), pixels(order[:held_out])


def _whole_files_first(order: np.ndarray, files: np.ndarray, held_out: int) -> tuple[np.ndarray, int]:
    """Images (N,) with the held-out ones first, all slices of some files (N,), and how many these are.

    About as many as are wanted, at most twice as many; as they are where no file is small enough for that.
    """
    different, counts = np.unique(files, return_counts=True)
    most = min(2 * held_out, len(order) - 1)
    chosen, total = [], 0
    for place in np.random.default_rng(0).permutation(len(different)):
        if total >= held_out:
            break
        if total + counts[place] <= most:
            chosen.append(different[place])
            total += int(counts[place])
    if not chosen or len(different) == len(files):  # files of one slice each hold nothing together
        return order, held_out
    away = np.isin(files, chosen)
    return np.concatenate([order[away], order[~away]]), total


def evenly(length: int, count: int) -> list[int]:
    """At most `count` positions, evenly spaced over a split: sources are often sorted by class."""
    return np.linspace(0, length - 1, min(count, length)).astype(int).tolist()


def whole(source: Source) -> Pixels:
    """All images of a source in their order."""
    return Pixels(source, np.arange(len(source)))


def read(pixels: Pixels, rows: Sequence[int], batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """A few hundred images of a split, in this process, without loaders; for all: `batches.in_order`."""
    for start in range(0, len(rows), batch_size):
        yield pixels.__getitems__(rows[start : start + batch_size])


def refuse_not_finite(raw: torch.Tensor, images: np.ndarray) -> None:
    """Raises InputError where raw pixels (B,C,H,W) are NaN or infinite, naming the first of the images."""
    good = raw.isfinite().flatten(1).all(1)
    if not good.all():
        first = images[int((~good).nonzero()[0])]
        raise InputError(
            f"data.source: image {first} has values that are not finite (NaN or infinite): replace them"
        )


def finite(pixels: Pixels, rows: Sequence[int]) -> Iterator[torch.Tensor]:
    """Raw pixels (B,C,H,W) of some images of a split. Raises InputError where one is not finite."""
    called = pixels.called[rows]
    for number, batch in enumerate(read(pixels, rows, AT_ONCE)):
        refuse_not_finite(batch["raw"], called[number * AT_ONCE :])
        yield batch["raw"]


def identity(pixels: Pixels, data: DataConfig) -> dict[str, Any]:
    """What makes these data these data: how they are read, how many, and a hash of 64 of them."""
    digest = hashlib.sha256(np.ascontiguousarray(pixels.indices).tobytes())
    if pixels.source.labels is not None:
        digest.update(np.ascontiguousarray(pixels.source.labels[pixels.indices]).tobytes())
    for position in np.linspace(0, len(pixels) - 1, IDENTITY_IMAGES).astype(int):
        digest.update(pixels.source.content(int(pixels.indices[position])))
    # Runs of earlier versions were resized otherwise, or kept the colours under what is transparent.
    made = {"resized": "to means, or clipped"} if pixels.source.resized else {}
    see_through = isinstance(pixels.source, ImageSource) and data.channels in (2, 4)
    made |= {"transparent": "of the colours nearby"} if see_through else {}
    return made | {
        "image_size": data.image_size,
        "channels": data.channels,
        "resize": data.resize,
        "images": len(pixels),
        "content": digest.hexdigest()[:32],
    }


def check_images(note: Path, found: dict[str, Any], data: DataConfig) -> None:
    """Raises InputError where these are not the images that a run was trained on.

    What is held out of others may be what was learned. Built-in ones are made anew, on another machine not to
    the last bit.

    Arguments:
        note: where the run keeps the `identity` of its training images.
        found: that of the training images that are there now.
    """
    if source_kind(data) == "builtin":
        return
    known = disk.read_json(note, f"remove {note} if the images are the same")
    changed = differences(known, found) if known else []
    if changed:
        otherwise = changed[0].startswith(("resized", "transparent"))  # of an earlier version
        cure = "train anew" if otherwise else "bring them back, or train anew"
        raise InputError(
            f"data.source: {data.source} no longer holds what was trained on ({changed[0]}); {cure}"
        )


def fit_transform(pixels: Pixels, data: DataConfig) -> ValueTransform:
    """The value transform of a recipe; bounds that it leaves open are measured on this (the training) split.

    Of arrays with several channels they are measured for each channel: a temperature in kelvin beside a
    velocity of a few metres a second would leave the latter two grey levels. Raises InputError where there is
    nothing to map.
    """
    wanted = data.value_transform
    integer = pixels.source.integer
    if wanted.kind == "auto":
        wanted = replace(wanted, kind="range" if integer else "minmax")
        if integer:
            _check_grey_levels(pixels)
            return ValueTransform("range", 0.0, 255.0, wanted.scale, integer)
    # Of a file of 16 bits grey levels are floats: rounded, a narrow range would lose what is between.
    integer = integer and pixels.__getitems__([0])["raw"].dtype == torch.uint8
    low, high = wanted.low, wanted.high
    if _are_open(low, high):
        least, greatest = _bounds(pixels)
        if integer or data.channels == 1:
            least, greatest = min(least), max(greatest)
        low = _filled(low, least)
        high = _filled(high, greatest)
    _check_bounds(wanted.kind, low, high)
    return ValueTransform(wanted.kind, low, high, wanted.scale, integer)


def _are_open(low: Any, high: Any) -> bool:
    """Whether a bound is to be measured."""
    return any(None in row for row in by_channel(low, high))


def look_through(pixels: Pixels, data: DataConfig) -> None:
    """Raises InputError where a value of an array is not finite that nothing has read for its bounds."""
    if not pixels.source.integer and not _are_open(data.value_transform.low, data.value_transform.high):
        for _ in finite(pixels, range(len(pixels))):
            pass


def _check_grey_levels(pixels: Pixels) -> None:
    """Raises InputError where files of more than 8 bits hold other values than grey levels of 0 to 255."""
    if pixels.__getitems__([0])["raw"].dtype == torch.uint8:
        return
    raw = pixels.__getitems__(evenly(len(pixels), GLIMPSE))["raw"]
    low, high = raw.min().item(), raw.max().item()
    if low >= -OVERSHOOT and 1 < high <= 255 + OVERSHOOT:
        return
    name = pixels.source.data.source
    cure = f"data.value_transform.kind=minmax, or python -m shared.convert {name} --out FILE.npy"
    raise InputError(
        f"data.source: {name} has values from {low:g} to {high:g}, no grey levels of 0 to 255: {cure}"
    )


def _filled(given: Any, measured: Any) -> Any:
    """Bounds that were given, and those that were measured where they were left open."""
    if given is None:
        return measured
    if isinstance(given, list):
        return [one if one is not None else other for one, other in by_channel(given, measured)]
    return given


def _check_bounds(kind: Any, low: Any, high: Any) -> None:
    """Raises InputError, naming the channel where there are several, for bounds that nothing can be mapped
    to."""
    rows = by_channel(kind, low, high)
    for channel, (one, least, greatest) in enumerate(rows):
        where = f" (channel {channel})" if len(rows) > 1 else ""
        if one in ("log1p", "sqrt") and least < 0:
            reason = f"{one} is for values >= 0, the data go down to {least:g}{where}"
            raise InputError(f"data.value_transform.kind: {reason}")
        if not least < greatest:
            cure = "leave it out, or say low and high" if where else "nothing to learn from"
            raise InputError(f"data.value_transform: all values are {least:g}{where}; {cure}")


def _bounds(pixels: Pixels) -> tuple[Any, Any]:
    """The least and the greatest raw value of each channel of a split, two lists of C.

    Raises InputError where there are NaN or infinite ones.
    """
    lows, highs = [], []
    for raw in finite(pixels, range(len(pixels))):
        lows.append(raw.amin((0, 2, 3)))
        highs.append(raw.amax((0, 2, 3)))
    return torch.stack(lows).amin(0).tolist(), torch.stack(highs).amax(0).tolist()
