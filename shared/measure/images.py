"""Images and latents as tensors to measure, a batch at a time and within a GiB.

Dimension key: N images, C H W pixels, c h w latents.
"""

from typing import Any

import torch

from shared.data import splits
from shared.data.config import DataConfig
from shared.sampling.transforms import ValueTransform

BATCH = 64  # images that a network is shown at once
MOST_VALUES = 2**28  # of pixels in memory: a GiB
MOST_PIXELS = 2**20  # of a batch, which a VAE at full size makes a hundred channels of


@torch.inference_mode()
def encode(vae: Any, x: torch.Tensor, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance, each (N,c,h,w), of pixels (N,C,H,W), a batch at a time."""
    mean, logvar = zip(*(vae.moments(part.to(device)) for part in x.split(BATCH)), strict=True)
    return torch.cat(mean).float().cpu(), torch.cat(logvar).float().cpu()


@torch.inference_mode()
def decode(vae: Any, z: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Pixels (N,C,H,W) of latents (N,c,h,w), a batch at a time."""
    return torch.cat([vae.decode(part.to(device)).sample.float().cpu() for part in z.split(BATCH)])


def pixels(
    part: splits.Pixels, transform: ValueTransform, count: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Up to `count` images of a split, evenly taken, as pixels (N,C,H,W) in [-1, 1], and their labels (N,).

    Fewer where they would need more than a GiB.
    """
    data = part.source.data
    most = max(BATCH, MOST_VALUES // (data.channels * data.height * data.width))
    rows = splits.evenly(len(part), min(count, most))
    x = torch.empty(len(rows), data.channels, *data.size)  # parts that are joined would be there twice
    labels = []
    for first, batch in zip(range(0, len(rows), BATCH), splits.read(part, rows, BATCH), strict=True):
        x[first : first + BATCH] = transform(batch["raw"])
        if "label" in batch:
            labels.append(batch["label"])
    return x, torch.cat(labels) if labels else None


def batch_size(data: DataConfig) -> int:
    """Images that are decoded at once: BATCH, fewer from 128 px on."""
    return max(4, min(BATCH, MOST_PIXELS // (data.height * data.width)))


def are_photographs(part: splits.Pixels) -> bool:
    """Whether the Inception has something to say: 8-bit images that are not scikit-learn's digits."""
    return part.source.integer and part.source.data.source != "digits"
