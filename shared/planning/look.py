"""What a set of images is: looks at some of them, and says what it saw in numbers (facts.Images).

Nothing is read as a whole: of a large set images at even distances are looked at, of files within SECONDS.
"""

import hashlib
import io
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shared.config import InputError, say
from shared.data import arrays, sources, splits
from shared.data.config import DataConfig, array_header, channels_last, inspect_source, source_kind
from shared.formats.parts import channels_of
from shared.planning.facts import Images, Values
from shared.planning.thumbnails import border, mirrored, thumbnail
from shared.sampling.transforms import picture_parts, picture_planes

LOOKED = 1000  # images that are looked at, at most
COMPARED = 400  # thumbnails that are compared with mirrored ones, at most
SECONDS = 6.0  # for all of it
VALUES = 1 << 22  # of an array
LARGE = 512  # pixels, the shorter side of what is looked at of a picture, at least
FEW_VALUES = 8  # grey levels by which the colours of a grey image may differ
MOST_CLASSES = 1000
AWAY, SEVERAL = 0.2, 32  # how far floats may be from grey levels, and the fewest of these
DIVIDING = {"split", "fold", "subset", "set", "partition"}  # names of columns that are no classes
WIDE = ("I", "F")  # modes of Pillow whose values may be anything


def look(source: str, given: Mapping[str, Any]) -> Images:
    """Facts of the images that a source names; no more of them are counted than data.limit leaves.

    Raises InputError where it cannot be opened.

    Arguments:
        source: as data.source of a recipe.
        given: keys of a recipe that the user has set; some of data are read.
    """
    wanted = {
        key.removeprefix("data."): value
        for key, value in given.items()
        if key in ("data.split", "data.revision", "data.label_column", "data.channels")
    }
    images = _facts(DataConfig(source=source, **wanted), given)
    limit = given.get("data.limit") or images.count
    return replace(images, count=min(images.count, limit), there=images.count)


def _facts(data: DataConfig, given: Mapping[str, Any]) -> Images:
    kind = source_kind(data)
    if kind == "builtin":
        data.channels = 3 if data.source == "jets" else 1
        data.image_size = 32 if data.source == "digits" else 64
        return _of_array(sources.builtin(data), data)
    if kind == "arrays":
        return _of_array(_whole_array(data, "data.channels" in given), data)
    return _of_table(data, kind, given)


# ---------------------------------------------------------------- arrays


def _whole_array(data: DataConfig, channels_given: bool) -> arrays.ArraySource:
    """The user's array as it is: its channels and sides are read from its header."""
    _, shape, _ = array_header(data)
    if len(shape) not in (3, 4):
        raise InputError(f"data.source: {data.source} has the shape {shape} (N,H,W | N,C,H,W | N,H,W,C)")
    if not channels_given:
        data.channels = 1 if len(shape) == 3 else channels_of(*shape[1:])
    inspect_source(data)
    data.image_size = list(shape[1:3] if channels_last(shape, data.channels) else shape[2:4])
    return arrays.open_array(data)


def _of_array(source: arrays.ArraySource, data: DataConfig) -> Images:
    height, width = data.size
    values = data.channels * height * width  # of an image
    most = max(2, min(32, 8 * VALUES // values), min(LOOKED, VALUES // values))
    rows = splits.evenly(len(source), most)
    seen = np.stack(source.read(rows))
    wrong = np.flatnonzero(~np.isfinite(seen).reshape(len(seen), -1).all(1))
    if len(wrong):
        raise InputError(
            f"data.source: image {rows[wrong[0]]} of {data.source} has values that are not finite (NaN or "
            f"infinite), as {len(wrong)} of {len(rows)} that were looked at: replace them"
        )
    hashes = [hashlib.sha256(image.tobytes()).digest() for image in seen]
    measured = None if source.integer else _values(seen)
    shown = measured is None or measured.levels is not None
    return Images(
        source=data.source,
        count=len(source),
        height=height,
        width=width,
        alike=1.0,
        uniform=True,
        channels=data.channels,
        integer=source.integer,
        looked=len(rows),
        is_array=True,
        label_column="auto" if source.labels is not None else None,
        classes=_counts(source.labels, source.names),
        duplicates=len(hashes) - len(set(hashes)),
        mirrored=shown and mirrored(np.stack([thumbnail(image) for image in seen[:COMPARED]])),
        framed=float((np.abs(border(seen)) <= (FEW_VALUES if source.integer else 0)).mean()) > 0.95,
        brightest=int(seen.max()) if source.integer else 255,
        values=measured,
    )


def _values(seen: np.ndarray) -> Values:
    """Of images (N,C,H,W). A channel of another unit alone makes no sparse set and no long tail."""
    by_channel = seen.swapaxes(0, 1).reshape(seen.shape[1], -1).astype(np.float64)
    filled = [np.abs(values[values != 0]) for values in by_channel]
    knee = _knee(np.concatenate(filled), 1.0)
    knees = tuple(_knee(values, knee) for values in filled)
    tops = np.quantile(by_channel, 0.999, axis=1)
    return Values(
        low=float(by_channel.min()),
        high=float(by_channel.max()),
        zeros=float((by_channel == 0).mean(1).min()),
        tail=float((tops / np.maximum(by_channel.mean(1), 1e-30)).min()),
        reach=min(float(np.abs(v).max()) / k for v, k in zip(by_channel, knees, strict=True)),
        knee=knee,
        knees=knees,
        levels=_levels(seen) if seen.shape[1] in (1, 3) else None,
    )


def _levels(seen: np.ndarray) -> tuple[float, float] | None:
    """The range of pictures whose 256 grey levels were made floats: 0..1, -1..1 or 0..255; None of others."""
    for low, high in ((0, 1), (-1, 1), (0, 255)):
        steps = (seen.astype(np.float32) - low) * (255 / (high - low))
        levels = np.rint(steps)
        whole = levels.min() >= 0 and levels.max() == 255 and np.abs(steps - levels).max() < AWAY
        if whole and len(np.unique(levels)) >= SEVERAL:
            return low, high
    return None


def _knee(values: np.ndarray, otherwise: float) -> float:
    """The 95th percentile of values, where there are any."""
    return float(np.quantile(values, 0.95)) if len(values) else otherwise


# ---------------------------------------------------------------- images


@dataclass
class _Seen:
    """What was seen of images that were looked at."""

    heads: list[tuple[int, int, str]] = field(default_factory=list)  # height, width, mode
    thumbnails: list[np.ndarray] = field(default_factory=list)
    framed: list[bool] = field(default_factory=list)
    tops: list[float] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    pages: int = 1  # of a TIFF file, at most
    moving: int = 0  # animations


def _of_table(data: DataConfig, kind: str, given: Mapping[str, Any]) -> Images:
    table = sources.open_table(data, kind)
    if "data.label_column" not in given:
        data.label_column = _label_column(table)
    source = sources.ImageSource(table, data)
    seen = _looked_at(source, data, "data.value_transform.kind" in given)
    if not seen.heads:
        found = f"none of {len(seen.hashes)} images can be read, such as {seen.unreadable[0]}"
        more = f"; python -m shared.convert {data.source} --out FILE.npy reads more kinds of TIFF"
        raise InputError(f"data.source: {data.source}: {found}{more if '.tif' in found.lower() else ''}")
    if seen.pages > 1:
        cure = f"python -m shared.convert {data.source} --out FILE.npy takes all"
        say(f"note: {data.source}: TIFF files of up to {seen.pages:,} pages: the first is taken; {cure}")
    if seen.moving:
        moving = f"{seen.moving:,} of {len(seen.hashes):,} are animations"
        say(f"note: {data.source}: {moving}: the first frame is taken")
    sides = np.array([head[:2] for head in seen.heads])
    modes = [head[2] for head in seen.heads]
    height, width = np.median(sides, axis=0).astype(int).tolist()
    aspects = sides[:, 1] / sides[:, 0]
    small = np.stack(seen.thumbnails)
    return Images(
        source=data.source,
        count=len(source),
        height=height,
        width=width,
        alike=float((np.abs(np.log(aspects / np.median(aspects))) < 0.12).mean()),
        uniform=bool((sides == sides[0]).all()),
        channels=_channels(small, given),
        integer=True,
        looked=len(seen.hashes),
        label_column=data.label_column if source.labels is not None else None,
        classes=_counts(source.labels, source.names),
        deep=any(mode.startswith("I") or mode == "F" for mode in modes),
        unreadable=tuple(seen.unreadable),
        duplicates=len(seen.hashes) - len(set(seen.hashes)),
        mirrored=mirrored(small[:COMPARED]),
        framed=float(np.mean(seen.framed)) > 0.9,
        brightest=math.ceil(max(seen.tops)),
    )


def _looked_at(source: sources.ImageSource, data: DataConfig, any_range: bool) -> _Seen:
    """Some images, within SECONDS. Raises InputError for values that are no grey levels, unless any_range."""
    seen = _Seen()
    begun = time.perf_counter()
    rows = splits.evenly(len(source), LOOKED)
    order = np.random.default_rng(0).permutation(rows)  # wherever the time ends, they are of the whole set
    for number, row in enumerate(order):
        spent = time.perf_counter() - begun
        if spent > SECONDS and (number >= 64 or (number >= 16 and spent > 3 * SECONDS)):
            break
        content = source.content(int(row))
        seen.hashes.append(hashlib.sha256(content).digest())
        try:
            if not content:
                raise FileNotFoundError("there is no such file")
            with Image.open(io.BytesIO(content)) as file:
                head, pixels = _head(file), _pixels(file)
                pages = getattr(file, "n_frames", 1) if file.format == "TIFF" else 1
                seen.moving += file.format in ("GIF", "WEBP", "PNG") and getattr(file, "is_animated", False)
        except sources.UNREADABLE as error:
            reason = "" if seen.unreadable else f" ({' '.join(str(error).split())[:200]})"  # said once
            seen.unreadable.append(_name_of(source, int(row)) + reason)
            continue
        if head[2] in WIDE and not any_range:
            _refuse_wide(data, _name_of(source, int(row)), pixels[:3])
        seen.heads.append(head)
        seen.thumbnails.append(thumbnail(pixels))
        shown = pixels[:3] * (pixels[3:] / 255)  # transparent or black
        seen.framed.append(float((border(shown[None]) <= FEW_VALUES).mean()) > 0.95)
        seen.tops.append(float(pixels[:3].max()))
        seen.pages = max(seen.pages, pages)
    return seen


def _refuse_wide(data: DataConfig, name: str, pixels: np.ndarray) -> None:
    """Raises InputError for values that are no grey levels: nothing says what range they have."""
    low, high = float(pixels.min()), float(pixels.max())
    if low < 0 or high > 255:
        cure = f"python -m shared.convert {data.source} --out FILE.npy makes an array of such images"
        raise InputError(f"data.source: {name} has values from {low:g} to {high:g}, no grey levels: {cure}")


def _label_column(table: Any) -> str | None:
    """`label`, or the column of the fewest different words or whole numbers; None where there is none.

    Says what else could be classes. A column that divides the images for training is none.
    """
    found = []
    for name, feature in table.features.items():
        kind = str(getattr(feature, "dtype", ""))
        wordy = kind.startswith(("int", "uint")) or kind in ("string", "large_string", "bool")
        counted = kind.startswith(("float", "double")) and name.lower() in sources.SAID
        if not (wordy or counted) or name.lower() in DIVIDING:
            continue
        cells = table.select_columns([name]).with_format("arrow")[:][name]
        different = cells.unique()
        few = 2 <= len(different) <= min(MOST_CLASSES, max(2, len(cells) // 4))
        if counted and not (few and sources.are_whole(different)):
            continue
        # The hub's test splits have -1 for no label; in a column of plain numbers called label it is a class.
        said = name == "label" and not getattr(feature, "names", None)
        lacking = cells.null_count or (few and not said and -1 in different.to_pylist())
        if few and not lacking:
            found.append((name != "label", len(different), name))
        elif name == "label" and len(different) > 1:
            many = f"there are {len(different):,} of them (data.label_column=label takes them)"
            say(f"note: the column label is no class: {'some images have none' if lacking else many}")
        elif few and cells.null_count:
            say(f"note: the column {name} could be classes, but {cells.null_count:,} images have none")
    others = ", ".join(name for _, _, name in sorted(found)[1:])
    if others and min(found)[2] != "label":
        say(f"note: classes by {min(found)[2]}; data.label_column=NAME takes another column: {others}")
    return min(found)[2] if found else None


def _head(file: Image.Image) -> tuple[int, int, str]:
    """Height, width (upright) and mode, from the file's head."""
    turned = file.getexif().get(0x0112, 1) >= 5
    width, height = file.size[::-1] if turned else file.size
    return height, width, file.mode


def _pixels(file: Image.Image) -> np.ndarray:
    """RGBA planes (4,H,W) of grey levels; of a large picture a smaller version."""
    file.draft("RGB", (64, 64))
    parts = picture_parts(file, 4)
    factor = min(parts[0].size) // LARGE
    deep = parts[0].mode == "F" and parts[-1].mode == "L"
    if factor > 1 and not deep:  # values of 16 bits are looked at as they are
        parts = [part.reduce(factor) for part in parts]
    return picture_planes(parts).astype(np.float32)


def _channels(small: np.ndarray, given: Mapping[str, Any]) -> int:
    """1, 3 or 4, told by thumbnails (N,4,h,w): grey, colour, transparency."""
    if "data.channels" in given:
        return given["data.channels"]
    if (small[:, 3] < 250).any(axis=(1, 2)).mean() > 0.01:
        return 4
    red, green, blue = small[:, 0], small[:, 1], small[:, 2]
    differing = np.maximum(np.abs(red - green), np.abs(green - blue)).max(axis=(1, 2))
    return 3 if (differing > FEW_VALUES).mean() > 0.01 else 1


def _name_of(source: sources.ImageSource, row: int) -> str:
    cell = source.table[row][source.column] or {}
    return Path(cell["path"]).name if cell.get("path") else f"row {row}"


# ---------------------------------------------------------------- of both


def _counts(labels: np.ndarray | None, names: list[str]) -> dict[str, int] | None:
    if labels is None or len(names) < 2:
        return None
    return dict(zip(names, np.bincount(labels, minlength=len(names)).tolist(), strict=True))
