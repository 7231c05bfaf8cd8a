"""One image as planes (C,H,W) of a recipe's mode and size. Does not depend on where it came from."""

import io

import numpy as np
from PIL import Image, ImageOps

from shared.data.config import DataConfig
from shared.sampling.transforms import picture_parts, picture_planes

DRAFT = 2  # times the recipe's size: what a large JPEG is decoded to at least, before it is resized


def decode(content: bytes | str, data: DataConfig) -> np.ndarray:
    """An encoded image (bytes or a path) as grey levels 0..255, (C,H,W): uint8; float32 from a 16-bit file.

    Turned upright by its EXIF tag; transparency is laid on white unless the recipe keeps an alpha channel.
    Raises what Pillow raises where the content is no image, ValueError where a value is not finite.
    """
    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as file:
        file.draft(None, (DRAFT * max(data.size),) * 2)  # None keeps the mode
        return picture_planes([resize(part, data) for part in picture_parts(file, data.channels)])


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
