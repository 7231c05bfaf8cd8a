"""One image as planes (C,H,W) of a recipe's mode and size. Does not depend on where it came from.

Dimension key: C channels, H W pixels.
"""

import functools
import io
import math
import os
import zlib
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps

from shared.cache import CachedRows
from shared.data.config import DataConfig
from shared.disk import path_of, sha256
from shared.sampling import transforms
from shared.sampling.transforms import picture_parts, picture_planes

Image.MAX_IMAGE_PIXELS = 300_000_000  # one's own scans and photos are large; twice as many are refused
DRAFT = 2  # times the recipe's size: what a large JPEG is decoded to at least, before it is resized


def decode(content: bytes | str, data: DataConfig) -> np.ndarray:
    """An encoded image (bytes or a path) as grey levels 0..255, (C,H,W): uint8; float32 from a 16-bit file.

    Turned upright by its EXIF tag; transparency is laid on white unless the recipe keeps an alpha channel.
    Raises what Pillow raises where the content is no image, ValueError where a value is not finite.
    """
    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as file:
        file.draft(None, (DRAFT * max(data.size),) * 2)  # None keeps the mode
        return picture_planes([resize(part, data) for part in picture_parts(file, data.channels)])


class Decoder:
    """Decodes the images of a source, a large file once: to decode it takes longer than to learn from it.

    What was made of it is kept in the cache folder, and taken as long as the file, our code and Pillow are
    what they were.

    Arguments:
        data: of the recipe.
        count: of images.
    """

    def __init__(self, data: DataConfig, count: int):
        self.data = data
        self.shape = (data.channels, *data.size)
        place = f"{path_of(data.source).absolute()} {data.split}"
        key = f"{place} {self.shape} {data.resize} {PIL.__version__} {_version()}"
        sizes = {kind: math.prod(self.shape) * np.dtype(kind).itemsize for kind in ("uint8", "float32")}
        self.kept = {kind: CachedRows(f"{key} {kind}", count, size) for kind, size in sizes.items()}

    def __call__(self, index: int, content: bytes | str) -> np.ndarray:
        """The image of this number, as `decode` makes it of its content or its path."""
        origin, length = _origin(content)
        slow = self.data.channels in (2, 4)  # whatever its size: see picture_planes
        large = {kind: rows for kind, rows in self.kept.items() if slow or rows.length < length}
        for kind, rows in large.items():
            known = rows.take(index, origin)
            if known is not None:
                return np.frombuffer(known, kind).reshape(self.shape)
        image = decode(content, self.data)
        if image.dtype.name in large:
            large[image.dtype.name].keep(index, origin, image.tobytes())
        return image


@functools.cache
def _version() -> str:
    """Of the code that makes an image of a file."""
    return " ".join(sha256(Path(file)) for file in (__file__, transforms.__file__))


def _origin(content: bytes | str) -> tuple[str, int]:
    """What tells an encoded image (bytes or a path) from what it was before and from others; its length."""
    if isinstance(content, bytes):
        return f"{zlib.crc32(content)}", len(content)
    state = os.stat(content)
    # The last is changed by whoever sets the second.
    return f"{content} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}", state.st_size


def resize(image: Image.Image, data: DataConfig) -> Image.Image:
    """To height x width: crop (one side fits, centre kept), stretch or pad (zeros, never enlarged)."""
    size = (data.width, data.height)
    if image.size == size:
        return image
    if data.resize == "stretch":
        return image.resize(size, Image.Resampling.BICUBIC)
    if data.resize == "crop":
        return ImageOps.fit(image, size, Image.Resampling.BICUBIC)
    if image.width > data.width or image.height > data.height:
        image = ImageOps.contain(image, size, Image.Resampling.BICUBIC)
    framed = Image.new(image.mode, size)
    framed.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return framed


# ---------------------------------------------------------------- values of an array, which are no picture


def resize_values(values: np.ndarray, data: DataConfig) -> np.ndarray:
    """Channels (C,h,w) to (C,H,W), as `resize`, but where neither side grows cells become means over areas.

    So a detector with larger cells would see it, and means are kept. pad takes whole blocks of cells, so that
    a zero stays one unless a hit is in its block. Nothing but these zeros leaves the range of a channel.
    """
    height, width = values.shape[1:]
    ratios = (height / data.height, width / data.width)
    if data.resize == "pad":
        return _framed(_in_blocks(values, max(1, math.ceil(max(ratios)))), data)
    if min(ratios) < 1:
        grown = np.stack([np.asarray(resize(Image.fromarray(plane), data)) for plane in values])
        return grown.clip(values.min((1, 2), keepdims=True), values.max((1, 2), keepdims=True))
    down, across = ratios if data.resize == "stretch" else (min(ratios),) * 2
    return _shares(height, data.height, down) @ values @ _shares(width, data.width, across).T


def _in_blocks(values: np.ndarray, side: int) -> np.ndarray:
    """Means over blocks of side x side cells; beyond the edge there are zeros."""
    channels, height, width = values.shape
    whole = np.pad(values, ((0, 0), (0, -height % side), (0, -width % side)))
    blocks = whole.reshape(channels, whole.shape[1] // side, side, whole.shape[2] // side, side)
    return blocks.mean((2, 4))


def _framed(values: np.ndarray, data: DataConfig) -> np.ndarray:
    """In the middle of zeros."""
    height, width = values.shape[1:]
    framed = np.zeros((len(values), *data.size), values.dtype)
    top, left = (data.height - height) // 2, (data.width - width) // 2
    framed[:, top : top + height, left : left + width] = values
    return framed


@functools.lru_cache(maxsize=4)
def _shares(length: int, count: int, each: float) -> np.ndarray:
    """The share that each of `length` cells has in `count` means over `each` of them, the middle's: (n,l)."""
    edges = (length - count * each) / 2 + each * np.arange(count + 1)
    cells = np.arange(length)
    overlaps = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    return (overlaps.clip(0) / each).astype(np.float32)
