"""One image as planes (C,H,W) of a recipe's mode and size. Does not depend on where it came from."""

import io

import numpy as np
from PIL import Image, ImageOps

from shared.data.config import DataConfig

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
DEEP = 257  # a grey level of 8 bits in those of 16
DRAFT = 2  # times the recipe's size: what a large JPEG is decoded to at least, before it is resized


def decode(content: bytes | str, data: DataConfig) -> np.ndarray:
    """An encoded image (bytes or a path) as grey levels 0..255, (C,H,W): uint8; float32 from a 16-bit file.

    Turned upright by its EXIF tag; transparency is laid on white unless the recipe keeps an alpha channel.
    Raises what Pillow raises where the content is no image.
    """
    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as file:
        file.draft(None, (DRAFT * max(data.size),) * 2)  # None keeps the mode
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I") or image.mode == "F":
            planes = _deep_planes(image, data.channels)
        else:
            image = _to_mode(image, data.channels)
            if image.mode == "RGB":  # at once; with an alpha channel Pillow would weigh the colours by it
                return np.ascontiguousarray(np.asarray(resize(image, data)).transpose(2, 0, 1))
            planes = list(image.split())
    return np.stack([np.asarray(resize(plane, data)) for plane in planes])  # (C,H,W)


def _deep_planes(image: Image.Image, channels: int) -> list[Image.Image]:
    """The planes of a 16-bit grey image as floats on the 8-bit scale (65535 becomes 255); alpha is opaque."""
    values = np.asarray(image).astype(np.float32)
    grey = Image.fromarray(values / np.float32(1 if image.mode == "F" else DEEP))
    alpha = [Image.new("F", image.size, 255)] if channels in (2, 4) else []
    return [grey] * (channels - len(alpha)) + alpha


def _to_mode(image: Image.Image, channels: int) -> Image.Image:
    if "transparency" in image.info or image.mode in ("LA", "PA", "La"):
        image = image.convert("RGBA")
    if image.mode == "RGBA" and channels in (1, 3):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(MODES[channels])


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
