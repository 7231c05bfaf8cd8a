"""What a call of the pipeline gives: images, values, pixels and latents.

Dimension key: B batch, C image channels, H W pixels, c h w latents.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput


@dataclass
class LatentDiffusionOutput(BaseOutput):
    """What a call gives.

    `images` as output_type asks; `values` (B,C,H,W) in the user's units; `pixels`, the same in [-1, 1];
    `latents` (B,c,h,w), as the decoder takes them.
    """

    images: Any = None
    values: Any = None  # beside the dict's method of that name, which nobody needs of an output
    pixels: Any = None
    latents: Any = None


def as_images(pixels: torch.Tensor, output_type: str) -> Any:
    """Pixels (B,C,H,W) in [-1, 1] as pil, np or pt; what Pillow has no mode for stays an array."""
    levels = pixels.float().cpu().clamp(-1, 1) / 2 + 0.5
    if output_type == "pt":
        return levels
    array = levels.permute(0, 2, 3, 1).numpy()
    if output_type == "np" or array.shape[-1] not in (1, 3, 4):
        return array
    return DiffusionPipeline.numpy_to_pil(array)
