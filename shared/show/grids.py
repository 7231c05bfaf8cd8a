"""Pictures for people: grids and GIFs. Pixels come in [-1, 1]. Does not depend on models or runs."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image

GAP = 2  # white pixels between the tiles of a grid
GIF_MILLISECONDS = 4000  # of one way through


def on_white(x: torch.Tensor) -> torch.Tensor:
    """RGBA (B,4,H,W) in [-1, 1] laid on white, (B,3,H,W); other numbers of channels as they are."""
    if x.shape[1] != 4:
        return x
    colour, alpha = x.split([3, 1], dim=1)
    share = (alpha + 1) / 2
    return share * colour + (1 - share)


def pictures(x: torch.Tensor, grey_levels: bool) -> torch.Tensor:
    """What is shown of pixels (B,C,H,W): four channels of a field, which are no RGBA, stand in a row."""
    return x if grey_levels or x.shape[1] != 4 else rearrange(x, "b c h w -> b 1 h (c w)")


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """Pixels (B,C,H,W) in [-1, 1] to uint8 (B,H,W,3): RGBA on white, other than 1 or 3 channels in a row."""
    y = (on_white(x.detach().float().cpu().clamp(-1, 1)) + 1) / 2
    levels = (y * 255).round().to(torch.uint8)
    if levels.shape[1] not in (1, 3):
        levels = rearrange(levels, "b c h w -> b 1 h (c w)")
    return rearrange(levels.expand(-1, 3, -1, -1), "b c h w -> b h w c").numpy()


def single(x: torch.Tensor) -> Image.Image:
    """One image (C,H,W) in [-1, 1] as in a file: grey, RGB or RGBA; other channels side by side."""
    levels = ((x.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    if len(levels) in (3, 4):
        return Image.fromarray(
            rearrange(levels, "c h w -> h w c").numpy(), {3: "RGB", 4: "RGBA"}[len(levels)]
        )
    return Image.fromarray(rearrange(levels, "c h w -> h (c w)").numpy())


def grid(x: torch.Tensor, columns: int | None = None) -> Image.Image:
    """Images (B,C,H,W) in rows on white, in reading order; small ones are enlarged without blurring."""
    tiles = to_uint8(x)
    count, height, width, _ = tiles.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    scale = max(1, round(64 / math.sqrt(height * width)))  # channels in a row are wide already
    tiles = tiles.repeat(scale, axis=1).repeat(scale, axis=2)
    tile_height = height * scale
    tile_width = width * scale
    shape = (rows * (tile_height + GAP) + GAP, columns * (tile_width + GAP) + GAP, 3)
    canvas = np.full(shape, 255, np.uint8)
    for i, tile in enumerate(tiles):
        top = i // columns * (tile_height + GAP) + GAP
        left = i % columns * (tile_width + GAP) + GAP
        canvas[top : top + tile_height, left : left + tile_width] = tile
    return Image.fromarray(canvas)


def pairs(x: torch.Tensor, x_hat: torch.Tensor) -> Image.Image:
    """Inputs over their reconstructions, in pairs of full rows of 8 (one shorter pair of fewer)."""
    columns = min(8, len(x))
    full = len(x) // columns * columns
    rows = []
    for above, below in zip(x[:full].split(columns), x_hat[:full].split(columns), strict=True):
        rows += [above, below]
    return grid(torch.cat(rows), columns)


def frames(x: torch.Tensor) -> list[Image.Image]:
    """Images (B,C,H,W) in [-1, 1] as frames of a GIF, small ones enlarged smoothly to about 256 pixels."""
    images = [Image.fromarray(frame) for frame in to_uint8(x)]
    scale = max(1, round(256 / images[0].height))
    size = (images[0].width * scale, images[0].height * scale)
    return [image.resize(size, Image.Resampling.BICUBIC) for image in images]


def save_gif(images: list[Image.Image], path: Path, back: bool = True) -> None:
    """A GIF of four seconds, there and back; with back=False once through, resting on its last picture."""
    images = images + (images[-2:0:-1] if back else [images[-1]] * (len(images) // 3))
    duration = max(20, round(GIF_MILLISECONDS / len(images)))
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0)


def as_image(figure: Any) -> Image.Image:
    """A matplotlib figure as a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
